"""Checkpoint files written in the background: copied to host memory first, and to disk while training continues.

DeepSpeed writes every file through its checkpoint engine. This one copies the data, queues the writing for one thread
and returns. The thread issues no collective; `stages.distributed.checkpoints` asks all ranks at the same steps whether
their files are on disk.
"""

import copy
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from torch import Tensor, UntypedStorage


def write_in_background(engine: Any) -> None:
    """Have a DeepSpeed engine write its checkpoints in the background, in the format of its own checkpoint engine."""
    engine.checkpoint_engine = BackgroundWriter(engine.checkpoint_engine)


class BackgroundWriter(CheckpointEngine):
    """Wraps the checkpoint engine `inner`, whose `save` runs in one thread on a copy in host memory."""

    def __init__(self, inner: CheckpointEngine) -> None:
        super().__init__()
        self.name, self.inner = "BackgroundWriter", inner
        # The interpreter waits for this thread at its end, so an orderly exit truncates no file.
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writes: list[tuple[str, Future[None]]] = []

    def create(self, info: CheckpointCommitInfo) -> None:
        self.inner.create(info)

    def load(self, path: str, map_location: Any = None) -> Any:
        return self.inner.load(path, map_location=map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """DeepSpeed calls this at the end of a save, before the files are written; see `wait`."""
        return True

    def save(self, state_dict: Any, path: str) -> None:
        """Copy `state_dict` and queue the writing; the original may change after the return."""
        copied = to_host(state_dict)
        self.writes.append((Path(path).name, self.pool.submit(self._write, copied, str(path))))

    def _write(self, state_dict: Any, path: str) -> None:
        self.inner.save(state_dict, path)
        with open(path, "rb") as file:  # in this thread, so the later checksum does not wait for the disk
            os.fsync(file.fileno())

    @property
    def done(self) -> bool:
        """Whether all files of this process are written."""
        return all(write.done() for _, write in self.writes)

    def wait(self) -> list[tuple[str, BaseException]]:
        """Wait until all files are written; returns (file, error) for each failure since the last call."""
        writes, self.writes = self.writes, []
        return [(file, error) for file, write in writes if (error := write.exception()) is not None]


def to_host(state: Any) -> Any:
    """A copy of `state` whose tensors are in host memory, pinned where they come from a GPU.

    Each storage is copied once: tensors that share a storage share its copy, so a file of the copy is as large as one
    of the original.
    """
    copies: dict[tuple[str, int], UntypedStorage] = {}
    copied = _copied(state, copies)
    if any(device != "cpu" for device, _ in copies):
        torch.cuda.synchronize()  # one wait for all copies
    return copied


def _copied(value: Any, copies: dict[tuple[str, int], UntypedStorage]) -> Any:
    if isinstance(value, Tensor):
        return _copied_tensor(value.detach(), copies)
    if isinstance(value, dict):
        made = copy.copy(value)  # with the attributes of an OrderedDict, such as a state dict's `_metadata`
        for key, inner in value.items():
            made[key] = _copied(inner, copies)
        return made
    if isinstance(value, list):
        return [_copied(inner, copies) for inner in value]
    if isinstance(value, tuple):
        parts = [_copied(inner, copies) for inner in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return copy.deepcopy(value)


def _copied_tensor(value: Tensor, copies: dict[tuple[str, int], UntypedStorage]) -> Tensor:
    storage = value.untyped_storage()
    key = str(value.device), storage.data_ptr()
    if not storage.nbytes():
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
    if key not in copies:
        pinned = value.device.type != "cpu"
        copied = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
        copied.copy_(torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage), non_blocking=pinned)
        copies[key] = copied.untyped_storage()
    made = torch.empty(0, dtype=value.dtype)
    return made.set_(copies[key], value.storage_offset(), value.size(), value.stride())
