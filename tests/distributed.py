"""Runs a function on several gloo processes and returns each result or raises the first exception.

The ranks are forked from a server that has imported the large packages and the parts of the project that most ranks
use, which saves about eight CPU seconds a rank.
They then share the seed of `hash(str)`, unlike the ranks of torchrun; KEYE_TEST_START=spawn starts each as a new
process.
"""

import contextlib
import faulthandler
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
import unittest.mock
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GRACE = 10.0  # seconds for the other ranks after one has failed
STACKS = 2.0  # seconds to write the stacks of a rank that is late
PRELOADED = ["torch", "torch.distributed", "transformers.modeling_utils", "deepspeed", "pytest", "hypothesis"]
PRELOADED += ["deepspeed.runtime.zero.muon.original_muon"]  # imports torch's compiler; every engine imports it
PRELOADED += ["torch.utils.tensorboard", "datasets", "scipy.stats", "keye.world", "stages.run", "rl.trainer"]
PRELOADED += ["tests.probed_ops"]
"""Modules that start no thread when they are imported: a fork copies only one."""
NO_THREADS = {"DS_ACCELERATOR": "cpu", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Variables that deepspeed and the allocator of pyarrow read when they are imported."""
END = " in <module>\n"  # of the stack of the main thread, which is the last one


def run_distributed(fn: Callable[..., Any], world_size: int = 2, timeout: float = 120, *args: Any) -> list[Any]:
    """Call `fn(*args)` in `world_size` new processes of a gloo group, each with one thread.

    Args:
        fn: a module-level function (pickled by name); its result and exceptions are pickled.
        timeout: seconds, including start-up.

    Returns:
        The results, by rank.

    Raises:
        TimeoutError: a rank exceeded the timeout; all are killed. Its notes are the stacks of the ranks' threads.
        Exception: the first exception that any rank raised, with its traceback as a note.
    """
    with tempfile.TemporaryDirectory() as folder:
        context, port, caller = _context(), free_port(), (dict(os.environ), _Output())
        processes = [
            context.Process(target=_work, args=(fn, args, rank, world_size, port, timeout, folder, caller), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        late = _wait(processes, timeout, Path(folder))
        stacks = {rank: _stacks(Path(folder) / f"{rank}.stacks") for rank in late}
        found = {rank: _read(Path(folder) / f"{rank}.pickle") for rank in range(world_size)}
    failed = [outcome for outcome in found.values() if outcome is not None and outcome["error"] is not None]
    if failed:
        first = min(failed, key=lambda outcome: outcome["time"])
        first["error"].add_note(f"on rank {first['rank']} of {world_size}:\n{first['trace']}")
        raise first["error"]
    if late:
        error = TimeoutError(f"ranks {late} of {world_size} were not done after {timeout} s")
        for rank, text in stacks.items():
            error.add_note(f"rank {rank}: {text}")
        raise error
    lost = {rank: processes[rank].exitcode for rank, outcome in found.items() if outcome is None}
    if lost:
        raise RuntimeError(f"ranks ended without a result: {lost} (rank: exit code)")
    return [found[rank]["result"] for rank in range(world_size)]


def _context() -> Any:
    """How the ranks start; a process with CUDA cannot be forked."""
    if torch.cuda.is_available() or os.environ.get("KEYE_TEST_START") == "spawn":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with unittest.mock.patch.dict(os.environ, NO_THREADS):
        forkserver.ensure_running()
    return context


class _Output:
    """Standard output and error of the process that pickles it; unpickled in a rank, their file descriptors there."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _descriptors, (DupFd(1), DupFd(2))


def _descriptors(*streams: Any) -> list[int]:
    return [stream.detach() for stream in streams]


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(processes: list[Any], timeout: float, folder: Path) -> list[int]:
    """Join all processes, kill those that exceed the timeout, and return their ranks.

    After a rank has failed, the others have `GRACE` seconds. A rank that is killed has written the stacks of its
    threads to `<rank>.stacks` in the folder, unless it had not begun.
    """
    deadline = time.monotonic() + timeout
    while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        if any(p.exitcode not in (None, 0) for p in processes):
            deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(0.05)
    late = [rank for rank, p in enumerate(processes) if p.is_alive()]
    _ask_for_stacks([processes[rank] for rank in late], [folder / f"{rank}.stacks" for rank in late])
    for rank in late:
        processes[rank].kill()
    for process in processes:
        process.join()
    return late


def _ask_for_stacks(processes: list[Any], files: list[Path]) -> None:
    begun = [(process, file) for process, file in zip(processes, files, strict=True) if file.exists()]
    for process, _ in begun:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR2)
    deadline = time.monotonic() + STACKS
    while not all(_stacks(file).endswith(END) for _, file in begun) and time.monotonic() < deadline:
        time.sleep(0.05)


def _stacks(file: Path) -> str:
    return file.read_text() if file.exists() else "it had not begun"


def _read(path: Path) -> dict[str, Any] | None:
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _work(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world: int,
    port: int,
    timeout: float,
    folder: str,
    caller: tuple[dict[str, str], list[int]],
) -> None:
    # A rank has the environment and the output of the server, or in a new process those of the caller.
    environment, output = caller
    for target, given in enumerate(output, 1):
        if given != target:
            os.dup2(given, target)
            os.close(given)
    os.environ.clear()
    os.environ |= environment | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    # Registered before the file has its name, because the signal would end a process that does not handle it.
    stacks = (Path(folder) / f"{rank}.begun").open("w")
    faulthandler.register(signal.SIGUSR2, stacks, all_threads=True)
    Path(stacks.name).rename(Path(folder) / f"{rank}.stacks")
    outcome: dict[str, Any] = {"rank": rank, "result": None, "error": None, "trace": ""}
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=timeout + GRACE))
        outcome["result"] = fn(*args)
        # No rank leaves while another still communicates with it.
        if dist.is_initialized():
            dist.barrier()
    except Exception as error:
        outcome |= {"error": error, "trace": traceback.format_exc()}
    outcome["time"] = time.time()
    _write(Path(folder) / f"{rank}.pickle", outcome)
    if dist.is_initialized() and outcome["error"] is None:
        dist.destroy_process_group()
    # A rank that failed must not wait for the others in the destructors of its group.
    os._exit(0 if outcome["error"] is None else 1)


def _write(path: Path, outcome: dict[str, Any]) -> None:
    try:
        blob = pickle.dumps(outcome)
        pickle.loads(blob)
    except Exception as error:
        said = outcome["error"] if outcome["error"] is not None else f"its result cannot be pickled: {error}"
        blob = pickle.dumps(outcome | {"result": None, "error": RuntimeError(str(said))})
    partial = path.with_suffix(".partial")
    partial.write_bytes(blob)
    partial.rename(path)
