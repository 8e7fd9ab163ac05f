"""Checkpoints: whole or not there, the last few kept, and resumed on any number of processes.

A checkpoint is a directory `step-N` with DeepSpeed's shards, one `state-R.pt` a rank (RNG, and what the caller gives)
and, written last, `complete.json` with the size and a checksum of every file. A directory without it, or with a file
that is not as it was, is torn and passed over. Shards that another number of processes wrote are turned into a
universal checkpoint first (DeepSpeed's `ds_to_universal`, arXiv 2406.18820): a file a parameter, which any number of
processes can read; the optimizer's moments and fp32 weights come back whole.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from keye.errors import CheckpointError
from stages.distributed.ranks import first_rank, waiting_group

MARKER = "complete.json"
WHOLE = 8 << 20  # bytes up to which a file is summed whole; of a larger one the first and the last MiB
PART = 1 << 20
REPORT = 60.0  # seconds between two lines on a conversion that takes long
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# --- what is on disk


def checksum(path: Path) -> int:
    """CRC-32 of a file, of a large one only of its first and last MiB, so that it costs little; flushed to disk too."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE:
            return zlib.crc32(file.read())
        crc = zlib.crc32(file.read(PART))
        file.seek(-PART, os.SEEK_END)
        return zlib.crc32(file.read(PART), crc)


def flaw(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None for a whole one."""
    try:
        files = json.loads((checkpoint / MARKER).read_text())["files"]
        for name, (size, crc) in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if checksum(path) != crc:
                return f"{name} has other contents than were written"
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MARKER} cannot be read"
    return None


def checkpoints(directory: str | Path) -> list[Path]:
    """All checkpoints under `directory`, torn ones too, oldest first."""
    found = [p for p in Path(directory).glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def whole_checkpoints(directory: str | Path) -> list[Path]:
    """Checkpoints under `directory` that were finished and are as they were written, oldest first."""
    return [path for path in checkpoints(directory) if flaw(path) is None]


def newest(directory: str | Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a sentence on each newer one that was passed over."""
    said = []
    for path in reversed(checkpoints(directory)):
        reason = flaw(path)
        if reason is None:
            return path, [f"{text}; going on from {path.name}" for text in said]
        said.append(f"{path} is passed over: {reason}")
    return None, [f"{text}; there is no other, so the beginning is taken" for text in said]


# --- saving


def save_checkpoint(
    engine: Any, directory: str | Path, step: int, state: dict[str, Any], keep: int = 2, shared: bool = False
) -> Path:
    """Write `directory/step-N` and leave the last `keep`; collective.

    state: tensors and plain values, this rank's own or, if `shared`, the same on every rank, saved once; only then
    can another number of processes go on from it. The RNG of every rank is added.

    Raises:
        CheckpointError: on all ranks, when the disk is full or a file cannot be written; what was begun is removed.
    """
    return begin_checkpoint(engine, directory, step, state, keep, shared).finish()


@dataclass
class Begun:
    """A checkpoint whose files are written, or are being written in the background: it counts once it is finished.

    target: its directory. needed: bytes it takes, about. told: what its marker says besides. failures: of this rank.
    writer: what still writes, None where all is written.
    """

    target: Path
    needed: int
    told: dict[str, Any]
    keep: int
    failures: list[tuple[str, BaseException]]
    writer: Any = None

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write, or has failed."""
        return self.writer is None or self.writer.done

    def finish(self) -> Path:
        """Wait for the files of all ranks, mark the checkpoint as whole and leave the last `keep`; collective.

        Raises:
            CheckpointError: on all ranks, when a file of any rank could not be written; what was begun is removed.
        """
        failures = self.failures + ([] if self.writer is None else self.writer.wait())
        reason = _first_said([f"{file}: {_plainly(error)}" for file, error in failures[:1]])
        directory, target, needed = self.target.parent, self.target, self.needed
        if reason is not None:
            first_rank(lambda: _undo(directory, target, needed, reason))
        first_rank(lambda: _finish(directory, target, needed, self.told, self.keep))
        return target


def begin_checkpoint(
    engine: Any, directory: str | Path, step: int, state: dict[str, Any], keep: int = 2, shared: bool = False
) -> Begun:
    """`save_checkpoint` up to where files are written, or copied by `stages.distributed.background`; collective.

    The one before must be finished.

    Raises:
        CheckpointError: on all ranks, when there is no room for it.
    """
    directory, rank = Path(directory), dist.get_rank()
    target, needed = directory / f"step-{step}", bytes_needed(engine)
    first_rank(lambda: _make_room(directory, target, needed), OSError)
    with _gathered_failures(engine) as failures:
        try:
            engine.save_checkpoint(str(directory), tag=target.name, client_state={"step": step}, save_latest=False)
        except OSError as error:  # beside the shards, which `failures` holds: DeepSpeed's script for recovery
            failures.append((str(error.filename), error))
            dist.barrier()  # the others wait in the last one of `engine.save_checkpoint`
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        mine = {"state": state if rank == 0 or not shared else {}, "rng": rng}
        engine.checkpoint_engine.save(mine, str(target / f"state-{rank}.pt"))
    writer = engine.checkpoint_engine if hasattr(engine.checkpoint_engine, "wait") else None
    return Begun(target, needed, {"step": step, "shared": shared}, keep, failures, writer)


def bytes_needed(engine: Any) -> int:
    """About how much a checkpoint takes: the module, and of what trains the fp32 weights and Adam's two moments."""
    every = list(engine.module.parameters())
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in every if p.requires_grad)
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in every) + 12 * trained


def _make_room(directory: Path, target: Path, needed: int) -> None:
    shutil.rmtree(target, ignore_errors=True)
    torn = [path for path in checkpoints(directory) if not (path / MARKER).exists()]
    for left in (*torn, *directory.glob("universal-*")):  # by a run that was killed while it saved, or resumed
        shutil.rmtree(left, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"{target}: a checkpoint takes about {_size(needed)}, but only {_size(free)} are free there; "
            f"make room or lower keep_checkpoints, and give the same command, which goes on {_from(directory)}"
        )
    target.mkdir()


def _undo(directory: Path, target: Path, needed: int, reason: str) -> None:
    shutil.rmtree(target, ignore_errors=True)
    free = shutil.disk_usage(directory).free
    raise CheckpointError(
        f"{target} could not be written ({reason}) and was removed; a checkpoint takes about {_size(needed)}, "
        f"{_size(free)} are free now: make room or lower keep_checkpoints, and give the same command, which goes on "
        f"{_from(directory)}"
    )


def _finish(directory: Path, target: Path, needed: int, told: dict[str, Any], keep: int) -> None:
    try:
        written = [file for file in sorted(target.rglob("*")) if file.is_file()]
        files = {str(file.relative_to(target)): (file.stat().st_size, checksum(file)) for file in written}
        partial = target / (MARKER + ".partial")
        partial.write_text(json.dumps({**told, "world": dist.get_world_size(), "files": files}, indent=1))
        with partial.open() as handle:
            os.fsync(handle.fileno())
        partial.rename(target / MARKER)
    except OSError as error:
        _undo(directory, target, needed, _plainly(error))
    finished = [path for path in checkpoints(directory) if (path / MARKER).exists()]
    for old in finished[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _from(directory: Path) -> str:
    kept = whole_checkpoints(directory)
    return f"from {kept[-1].name}" if kept else "from the beginning"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


@contextmanager
def _gathered_failures(engine: Any) -> Iterator[list[tuple[str, BaseException]]]:
    """What goes wrong with which file is kept for later: a rank that raised would leave the others waiting."""
    failures: list[tuple[str, BaseException]] = []
    writer = engine.checkpoint_engine
    write = writer.save

    def save(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            failures.append((Path(path).name, error))

    writer.save = save
    try:
        yield failures
    finally:
        del writer.save  # the class's own is seen again


def _plainly(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = (str(error).splitlines() or [type(error).__name__])[0]
    # Of a full disk torch's own writer says only where it stood.
    return "a file was cut short, as on a full disk" if "inline_container" in said else said


def _first_said(mine: list[str]) -> str | None:
    """The first of all ranks' sentences, the same on every rank."""
    if dist.get_world_size() == 1:
        return next(iter(mine), None)
    said: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    # On the host, where ranks wait for a slow disk as long as it takes.
    dist.all_gather_object(said, mine, group=waiting_group(dist.group.WORLD))
    return next((text for texts in said for text in texts), None)


# --- loading


def load_checkpoint(engine: Any, directory: str | Path) -> tuple[int, dict[str, Any]] | None:
    """Put the newest whole checkpoint back into the engine and the RNG; (step, state), or None without one.

    Raises:
        CheckpointError: it does not fit the model, or another number of processes wrote it and the state is not shared.
    """
    # Rank 0 looks, so that all ranks take the same one even while files come and go.
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        found, said = newest(directory)
        for text in said:
            print(text, flush=True)
        box = [None if found is None else (str(found), json.loads((found / MARKER).read_text()))]
    dist.broadcast_object_list(box, src=0)
    if box[0] is None:
        return None
    found, told = Path(box[0][0]), box[0][1]
    world = dist.get_world_size()
    if told["world"] == world:
        _load(engine, found)
    elif not told["shared"]:
        raise CheckpointError(
            f"{found} was written by {told['world']} processes, this run has {world}; "
            "start as many, or remove it to begin anew"
        )
    else:
        _load_from_others(engine, found, told["world"], world)
    return told["step"], _load_state(found, told)


def _load_state(found: Path, told: dict[str, Any]) -> dict[str, Any]:
    """This rank's state; puts its RNG back, unless there was no such rank, which keeps the seed it began with."""
    rank = dist.get_rank()
    if rank < told["world"]:
        mine = torch.load(found / f"state-{rank}.pt", weights_only=True)
        torch.set_rng_state(mine["rng"]["cpu"])
        if "cuda" in mine["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(mine["rng"]["cuda"])
        if not told["shared"]:
            return mine["state"]
    return torch.load(found / "state-0.pt", weights_only=True)["state"]


def _load(engine: Any, found: Path) -> None:
    said = []
    try:
        engine.load_checkpoint(str(found.parent), tag=found.name)
    except (RuntimeError, KeyError, IndexError, ValueError, AssertionError, OSError) as error:
        said.append((str(error).splitlines() or [type(error).__name__])[0])
    reason = _first_said(said)
    if reason is not None:
        raise CheckpointError(f"{found} does not fit this model ({reason}); remove it or use its recipe")


def _load_from_others(engine: Any, found: Path, before: int, now: int) -> None:
    """Load what another number of processes wrote."""
    if dist.get_rank() == 0:
        print(f"{found} was written by {before} processes; its shards are put together for {now}", flush=True)
    if not engine.zero_optimization():  # nothing was cut
        _load(engine, found)
        return
    made = found.with_name(f"universal-{found.name}")
    needed = bytes_needed(engine)
    first_rank(lambda: _convert(found, made, needed), OSError)
    keys = ("weight_decay", "initial_lr")
    own = [{key: group[key] for key in keys} for group in engine.optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        _load(engine, made)
    finally:
        engine._config.load_universal_checkpoint = False
    # ZeRO-3 gives all groups the settings of the first.
    rates = engine.lr_scheduler.get_last_lr() if engine.lr_scheduler else [None] * len(own)
    for group, settings, rate in zip(engine.optimizer.param_groups, own, rates, strict=True):
        group |= settings | ({} if rate is None else {"lr": rate})
    _load_frozen(engine, found)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(made, ignore_errors=True)


def _convert(found: Path, made: Path, needed: int) -> None:
    """Write the universal form of a checkpoint, in a process of its own, which can use several cores."""
    shutil.rmtree(made, ignore_errors=True)
    free = shutil.disk_usage(found).free
    if free < 2 * needed:  # fragments first, then the files put together
        raise CheckpointError(
            f"{found}: to put its shards together takes about {_size(2 * needed)}, but only {_size(free)} are free "
            "there; make room, or start as many processes as wrote it"
        )
    workers = str(_workers(found))
    command = [
        *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"),
        *("--input_folder", str(found), "--output_folder", str(made)),
        *("--num_extract_workers", workers, "--num_merge_workers", workers),
    ]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    environment["DS_ACCELERATOR"] = "cpu"
    began, done, said = time.monotonic(), None, ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as work:
        while done is None:
            try:
                _, said = work.communicate(timeout=REPORT)
                done = work.returncode
            except subprocess.TimeoutExpired:
                written = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
                minutes = (time.monotonic() - began) / 60
                print(f"{found}: {_size(written)} put together after {minutes:.0f} minutes", flush=True)
    if done:
        shutil.rmtree(made, ignore_errors=True)
        lines = [line for line in said.splitlines() if line.strip()]
        raise CheckpointError(
            f"{found}: its shards cannot be put together ({lines[-1] if lines else done}); "
            "start as many processes as wrote it"
        )


def _workers(found: Path) -> int:
    """Processes that put shards together: each holds a shard, and a copy of it, in host memory."""
    largest = max((path.stat().st_size for path in found.glob("*optim_states.pt")), default=1)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(8, len(os.sched_getaffinity(0)), free // (2 * largest)))


def _load_frozen(engine: Any, found: Path) -> None:
    """What does not train is in no shard of the optimizer; without ZeRO-3 the first file of the model has it."""
    files = sorted(found.glob("mp_rank_*_model_states.pt"))
    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    if not files or not frozen:
        return
    try:
        saved = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)["module"]
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{files[0]} holds more than tensors and plain values; remove {found}") from error
    with torch.no_grad():
        for name, parameter in frozen.items():
            parameter.copy_(saved[name])
