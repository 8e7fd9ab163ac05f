"""Checkpoints of a small model in one safetensors file, and sums over processes.

A checkpoint is written completely or not at all. Samples and noise of a step are drawn from the step's number, so that
weights, Adam's moments and the step are the entire state of a run.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from keye.errors import CheckpointError, writing
from keye.files import atomic_file, write_atomically

FORMAT = "keye dream checkpoint 1"


def record_inputs(record: Path, inputs: dict[str, Any]) -> None:
    """Write what determines a result, or check that the work in this folder was begun with the same.

    Collective.

    Args:
        record: a JSON file in the folder.
        inputs: name → value, as JSON.

    Raises:
        CheckpointError: it was begun with others, or the folder cannot be written.
    """
    given = json.loads(json.dumps(inputs))
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = [key for key in given if given[key] != before.get(key)]
        if changed:
            raise CheckpointError(
                f"{record.parent} was begun with another {', '.join(changed)}; give the former values or another --out"
            )
    if rank() == 0:
        with writing(record.parent, "the run", CheckpointError):
            record.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(record, json.dumps(given) + "\n")
    wait()


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """A hash of the values of tensors."""
    found = hashlib.sha256()
    for value in tensors:
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write weights, Adam's moments and the number of steps taken.

    Raises:
        CheckpointError: it cannot be written.
    """
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value.contiguous()
    with writing(path, "the checkpoint", CheckpointError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as part:
            save_file(tensors, part, metadata={"about": json.dumps({"format": FORMAT, "step": step})})


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read a checkpoint in place; returns its step, 0 if there is none.

    Raises:
        CheckpointError: the file is no checkpoint of this model.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about.get("format") != FORMAT:
            raise ValueError("another format")
        model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    except (OSError, SafetensorError, ValueError, LookupError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} is not a checkpoint of this recipe's model ({reason}); give another --out or remove the file"
        ) from error
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if found:
            optimizer.state[parameter] = found
    return int(about["step"])


class MetricsFile:
    """metrics.jsonl: a line for each step. On resumption, lines from that step on are removed."""

    def __init__(self, path: Path, begin: int, key: str = "step") -> None:
        self.path, self.key = path, key
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)[key] <= begin]
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(line + "\n" for line in kept))

    def add(self, **values: Any) -> None:
        """Append a line, on rank 0."""
        if rank() == 0:
            with writing(self.path, "the metrics"), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


def rank() -> int:
    """This process's rank; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def sum_gradients(model: nn.Module, *values: float) -> list[float]:
    """Add up the gradients of all processes, and some numbers with them, in one fp32 all-reduce.

    A parameter without a gradient on this process counts as zero, so that every process sends the same bytes.
    """
    parameters = list(model.parameters())
    parts = [
        (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).float().flatten()
        for parameter in parameters
    ]
    flat = torch.cat([*parts, torch.tensor(values, device=parts[0].device)])
    if dist.is_initialized():
        dist.all_reduce(flat)
    at = 0
    for parameter in parameters:
        count = parameter.numel()
        parameter.grad = flat[at : at + count].view_as(parameter).to(parameter.dtype)
        at += count
    return flat[at:].tolist()
