"""Shards of another number of processes: their conversion to a universal checkpoint, and what that leaves out."""

import os
import pickle
import shutil
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from keye.errors import CheckpointError

REPORT = 60.0  # seconds between two messages of a long conversion
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def convert(found: Path, made: Path, needed: int) -> None:
    """Write the universal form of a checkpoint in a separate process, which uses several cores."""
    shutil.rmtree(made, ignore_errors=True)
    free = shutil.disk_usage(found).free
    if free < 2 * needed:  # fragments first, then the merged files
        raise CheckpointError(
            f"{found}: to convert its shards takes about {size_text(2 * needed)}, but only {size_text(free)} are free "
            "there; make room, or start the number of processes that wrote it"
        )
    workers = str(_workers(found))
    command = [
        *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"),
        *("--input_folder", str(found), "--output_folder", str(made)),
        *("--num_extract_workers", workers, "--num_merge_workers", workers),
    ]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    environment["DS_ACCELERATOR"] = "cpu"
    started, done, errors = time.monotonic(), None, ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as work:
        while done is None:
            try:
                _, errors = work.communicate(timeout=REPORT)
                done = work.returncode
            except subprocess.TimeoutExpired:
                written = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
                minutes = (time.monotonic() - started) / 60
                print(f"{found}: {size_text(written)} converted after {minutes:.0f} minutes", flush=True)
    if done:
        shutil.rmtree(made, ignore_errors=True)
        lines = [line for line in errors.splitlines() if line.strip()]
        raise CheckpointError(
            f"{found}: its shards cannot be converted ({lines[-1] if lines else done}); "
            "start the number of processes that wrote it"
        )


def _workers(found: Path) -> int:
    """Number of conversion processes: each has a shard and a copy of it in host memory."""
    largest = max((path.stat().st_size for path in found.glob("*optim_states.pt")), default=1)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(8, len(os.sched_getaffinity(0)), free // (2 * largest)))


def load_frozen(engine: Any, found: Path) -> None:
    """Load frozen parameters, which no optimizer shard has, from the model files; collective with ZeRO-3.

    Without ZeRO-3 the first file has complete parameters. With ZeRO-3 the file of each rank has its share of them.
    """
    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    files = sorted(found.glob("mp_rank_*_model_states.pt"))[:1]
    shares = sorted(found.glob("zero_pp_rank_*_model_states.pt"), key=lambda path: int(path.name.split("_")[3]))
    if not frozen or not (files or shares):
        return
    saved = [_read_tensors(file)["frozen_param_fragments" if shares else "module"] for file in shares or files]
    with torch.no_grad():
        for name, parameter in frozen.items():
            with _complete(parameter):
                if not shares or dist.get_rank() == 0:
                    value = torch.cat([part[name].flatten() for part in saved])
                    parameter.copy_(value[: parameter.numel()].view_as(parameter))  # the last share may be padded


def _read_tensors(file: Path) -> dict[str, Any]:
    """A file of DeepSpeed, memory-mapped, without executing code of it."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} contains more than tensors and plain values; remove {file.parent}") from error


def _complete(parameter: torch.nn.Parameter) -> AbstractContextManager[Any]:
    """The complete parameter; with ZeRO-3 it is afterwards divided among the ranks as rank 0 has changed it."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters([parameter], modifier_rank=0)


def size_text(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
