"""Checkpoints: written completely or not at all, the latest few kept, resumed on any number of processes.

A checkpoint is a directory `step-N` with DeepSpeed's shards, one `state-R.pt` per rank (RNG and the caller's state)
and, written last, `complete.json` with the size and a checksum of every file. A directory without it, or with a file
that has changed, is incomplete and skipped. Shards of another number of processes are first converted to a universal
checkpoint (DeepSpeed's `ds_to_universal`, arXiv 2406.18820): one file per parameter, which any number of processes can
read, with the optimizer's moments and fp32 weights.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from keye.errors import CheckpointError
from stages.distributed.conversion import convert, load_frozen, size_text
from stages.distributed.ranks import first_rank, gather, waiting_group

MARKER = "complete.json"
FULL_CHECKSUM = 8 << 20  # bytes up to which the checksum covers the entire file; else its first and last MiB
PART = 1 << 20


def checksum(path: Path) -> int:
    """CRC-32 of a file, of a large file only of its first and last MiB; the file is also flushed to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        if size <= FULL_CHECKSUM:
            return zlib.crc32(file.read())
        crc = zlib.crc32(file.read(PART))
        file.seek(-PART, os.SEEK_END)
        return zlib.crc32(file.read(PART), crc)


def validate_checkpoint(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if it is complete."""
    try:
        files = json.loads((checkpoint / MARKER).read_text())["files"]
        for name, (size, crc) in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if checksum(path) != crc:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MARKER} cannot be read"
    return None


def checkpoints(directory: str | Path) -> list[Path]:
    """All checkpoints under `directory`, incomplete ones included, oldest first."""
    found = [p for p in Path(directory).glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest(directory: str | Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, and a message about each newer one that is skipped."""
    skipped = []
    for path in reversed(checkpoints(directory)):
        reason = validate_checkpoint(path)
        if reason is None:
            return path, [f"{text}; resuming from {path.name}" for text in skipped]
        skipped.append(f"{path} is skipped: {reason}")
    return None, [f"{text}; there is no other, so training starts at the first step" for text in skipped]


def save_checkpoint(
    engine: Any, directory: str | Path, step: int, state: dict[str, Any], keep: int = 2, shared: bool = False
) -> Path:
    """Write `directory/step-N` and remove all but the last `keep` checkpoints; collective.

    Args:
        engine: DeepSpeed's.
        state: tensors and plain values of this rank. The RNG of every rank is added.
        shared: `state` is the same on every rank and saved once; only then can another number of processes resume.

    Raises:
        CheckpointError: on all ranks, if the disk is full or a file cannot be written; its directory is removed.
    """
    return start_checkpoint(engine, directory, step, state, keep, shared).finish()


@dataclass
class PendingCheckpoint:
    """A checkpoint whose files are written, also in the background; it is valid after `finish`.

    target: its directory. needed: its approximate bytes. about: further entries of its marker. failures: of this rank.
    writer: the background writer; None if all files are written.
    """

    target: Path
    needed: int
    about: dict[str, Any]
    keep: int
    failures: list[tuple[str, BaseException]]
    writer: Any = None

    @property
    def written(self) -> bool:
        """Whether this rank has written all its files or has failed."""
        return self.writer is None or self.writer.done

    def finish(self) -> Path:
        """Wait for the files of all ranks, write the marker and remove all but the last `keep`; collective.

        Raises:
            CheckpointError: on all ranks, if any rank could not write a file; the directory is removed.
        """
        failures = self.failures + ([] if self.writer is None else self.writer.wait())
        reason = _first_message([f"{file}: {_reason(error)}" for file, error in failures[:1]])
        directory, target, needed = self.target.parent, self.target, self.needed
        if reason is not None:
            first_rank(lambda: _remove(directory, target, needed, reason))
        first_rank(lambda: _finish(directory, target, needed, self.about, self.keep))
        return target


def start_checkpoint(
    engine: Any, directory: str | Path, step: int, state: dict[str, Any], keep: int = 2, shared: bool = False
) -> PendingCheckpoint:
    """The first part of `save_checkpoint`: write the files, or copy them for the background writer; collective.

    The previous checkpoint must be finished.

    Raises:
        CheckpointError: on all ranks, if the disk has no room for it.
    """
    directory, rank = Path(directory), dist.get_rank()
    target, needed = directory / f"step-{step}", bytes_needed(engine)
    first_rank(lambda: _make_room(directory, target, needed), OSError)
    with _gathered_failures(engine) as failures:
        try:
            engine.save_checkpoint(str(directory), tag=target.name, client_state={"step": step}, save_latest=False)
        except OSError as error:  # of DeepSpeed's recovery script; errors of shards are in `failures`
            failures.append((str(error.filename), error))
            dist.barrier()  # the others wait in the last one of `engine.save_checkpoint`
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        mine = {"state": state if rank == 0 or not shared else {}, "rng": rng}
        engine.checkpoint_engine.save(mine, str(target / f"state-{rank}.pt"))
    writer = engine.checkpoint_engine if hasattr(engine.checkpoint_engine, "wait") else None
    return PendingCheckpoint(target, needed, {"step": step, "shared": shared}, keep, failures, writer)


def bytes_needed(engine: Any) -> int:
    """Approximate bytes of a checkpoint: the module, and fp32 weights and Adam's two moments of trained parameters."""
    every = list(engine.module.parameters())
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in every if p.requires_grad)
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in every) + 12 * trained


def _make_room(directory: Path, target: Path, needed: int) -> None:
    shutil.rmtree(target, ignore_errors=True)
    incomplete = [path for path in checkpoints(directory) if not (path / MARKER).exists()]
    for left in (*incomplete, *directory.glob("universal-*")):  # of a run that was killed while it saved or resumed
        shutil.rmtree(left, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"{target}: a checkpoint takes about {size_text(needed)}, but only {size_text(free)} are free there; "
            f"{_remedy(directory)}"
        )
    target.mkdir()


def _remove(directory: Path, target: Path, needed: int, reason: str) -> None:
    shutil.rmtree(target, ignore_errors=True)
    free = shutil.disk_usage(directory).free
    raise CheckpointError(
        f"{target} could not be written ({reason}) and was removed; a checkpoint takes about {size_text(needed)}, "
        f"{size_text(free)} are free now; {_remedy(directory)}"
    )


def _finish(directory: Path, target: Path, needed: int, about: dict[str, Any], keep: int) -> None:
    try:
        written = [file for file in sorted(target.rglob("*")) if file.is_file()]
        files = {str(file.relative_to(target)): (file.stat().st_size, checksum(file)) for file in written}
        partial = target / (MARKER + ".partial")
        partial.write_text(json.dumps({**about, "world": dist.get_world_size(), "files": files}, indent=1))
        with partial.open() as handle:
            os.fsync(handle.fileno())
        partial.rename(target / MARKER)
    except OSError as error:
        _remove(directory, target, needed, _reason(error))
    finished = [path for path in checkpoints(directory) if (path / MARKER).exists()]
    for old in finished[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _remedy(directory: Path) -> str:
    kept = newest(directory)[0]
    place = f"from {kept.name}" if kept else "at the first step"
    return f"make room or lower keep_checkpoints, then repeat the command, which resumes {place}"


@contextmanager
def _gathered_failures(engine: Any) -> Iterator[list[tuple[str, BaseException]]]:
    """Collect (file, error) instead of raising: a rank that raised would leave the others waiting in a collective."""
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
        del writer.save  # restores the method of the class


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # If the disk is full, torch's writer reports only a position.
    return "a file is incomplete, as on a full disk" if "inline_container" in str(error) else _first_line(error)


def _first_message(mine: list[str]) -> str | None:
    """The first message of all ranks, the same on every rank; collective."""
    # On the host without a time limit, because ranks may wait for a slow disk.
    group = waiting_group(dist.group.WORLD) if dist.get_world_size() > 1 else None
    return next((text for texts in gather(mine, group) for text in texts), None)


def load_checkpoint(engine: Any, directory: str | Path) -> tuple[int, dict[str, Any]] | None:
    """Load the newest complete checkpoint into the engine and the RNG; (step, state), or None without one. Collective.

    Raises:
        CheckpointError: it does not fit the model, or another number of processes wrote it and the state is not shared.
    """
    # Rank 0 chooses, so all ranks take the same one even if files change meanwhile.
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        found, skipped = newest(directory)
        for text in skipped:
            print(text, flush=True)
        box = [None if found is None else (str(found), json.loads((found / MARKER).read_text()))]
    dist.broadcast_object_list(box, src=0)
    if box[0] is None:
        return None
    found, about = Path(box[0][0]), box[0][1]
    world = dist.get_world_size()
    if about["world"] == world:
        _load(engine, found)
    elif not about["shared"]:
        raise CheckpointError(
            f"{found} was written by {about['world']} processes and this run has {world}; "
            f"start {about['world']} processes, or remove the checkpoint to start again"
        )
    else:
        _load_from_others(engine, found, about["world"], world)
    return about["step"], _load_state(found, about)


def _load_state(found: Path, about: dict[str, Any]) -> dict[str, Any]:
    """This rank's state; restores its RNG. A rank that the earlier run did not have keeps its initial seed."""
    rank = dist.get_rank()
    if rank < about["world"]:
        mine = torch.load(found / f"state-{rank}.pt", weights_only=True)
        torch.set_rng_state(mine["rng"]["cpu"])
        if "cuda" in mine["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(mine["rng"]["cuda"])
        if not about["shared"]:
            return mine["state"]
    return torch.load(found / "state-0.pt", weights_only=True)["state"]


def _load(engine: Any, found: Path) -> None:
    errors = []
    try:
        engine.load_checkpoint(str(found.parent), tag=found.name)
    except (RuntimeError, KeyError, IndexError, ValueError, AssertionError, OSError) as error:
        errors.append(_first_line(error))
    reason = _first_message(errors)
    if reason is not None:
        raise CheckpointError(f"{found} does not fit this model ({reason}); remove it or use its recipe")


def _load_from_others(engine: Any, found: Path, before: int, now: int) -> None:
    """Load a checkpoint of another number of processes."""
    if dist.get_rank() == 0:
        print(f"{found} was written by {before} processes; its shards are converted for {now}", flush=True)
    if not engine.zero_optimization():  # there are no shards
        _load(engine, found)
        return
    made = found.with_name(f"universal-{found.name}")
    first_rank(lambda: convert(found, made, bytes_needed(engine)), OSError)
    own = [{key: group[key] for key in ("weight_decay", "initial_lr")} for group in engine.optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        _load(engine, made)
    finally:
        engine._config.load_universal_checkpoint = False
    # ZeRO-3 loads the settings of the first group into all groups.
    rates = engine.lr_scheduler.get_last_lr() if engine.lr_scheduler else [None] * len(own)
    for group, settings, rate in zip(engine.optimizer.param_groups, own, rates, strict=True):
        group |= settings | ({} if rate is None else {"lr": rate})
    # It also gives one counter of steps to all its groups, which each of them would then increase in every step.
    for state in engine.basic_optimizer.state.values():
        state["step"] = torch.as_tensor(state["step"]).clone()
    load_frozen(engine, found)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(made, ignore_errors=True)
