"""Read a stage's weights from the files of a model to the devices, and write them back, one tensor at a time.

No process has a copy of the model in host memory. Each tensor is read from the mapped pages of its file, which the
processes of a machine share, and copied to the device in the dtype of training. Parts that a stage neither trains nor
runs are not read. When the model is written, trained tensors are gathered one by one from the optimizer's fp32 weights,
and the others are copied from the files with which the stage started.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GenerationConfig

from keye.checkpoint.convert import open_weights
from keye.checkpoint.shards import MAX_SHARD, Computed, Stored, atomic_directory, write_shards
from keye.errors import CheckpointError
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from stages.distributed import engine
from stages.distributed.ranks import agree, waiting_group

MODULES = ("visual", "projector", "language_model", "lm_head")


@dataclass(frozen=True)
class Start:
    """The directory of the model with which a stage starts. stored: its tensors by name, not yet read."""

    directory: Path
    config: KeyeConfig
    stored: dict[str, Stored]

    def build(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", parts: tuple[str, ...] = MODULES
    ) -> KeyeForConditionalGeneration:
        """The model with the weights of `parts` in `dtype` on `device`; its other parts stay on the meta device.

        Tensors are copied one by one from their files to the device. On the meta device nothing is read: `engine.build`
        with ZeRO-3 reads such a model from `sources`.
        """
        with torch.device("meta"):
            model = KeyeForConditionalGeneration(self.config)
        made: dict[nn.Parameter, nn.Parameter] = {}  # a head tied to the embeddings is one parameter in two places
        for prefix, module in model.named_modules():
            if prefix.removeprefix("model.").partition(".")[0] in parts:
                for name, empty in list(module.named_parameters(recurse=False)):
                    if empty not in made:
                        made[empty] = _read(self.stored[f"{prefix}.{name}"], dtype, device)
                    setattr(module, name, made[empty])
        if (self.directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.directory)
        return model

    def sources(self, model: nn.Module) -> dict[nn.Parameter, Stored]:
        """The file of each parameter of a model of `build`, with its exact value."""
        parameters = dict(model.named_parameters())
        return {parameters[name]: stored for name, stored in self.stored.items()}


def open_start(directory: str | Path) -> Start:
    """Open the directory of a model, in this project's layout or the release's.

    Raises:
        CheckpointError: it is no Keye model, or weights are missing, damaged or of another shape.
    """
    return Start(Path(directory), *open_weights(directory))


@torch.no_grad()
def _read(stored: Stored, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    value = torch.empty(stored.shape, dtype=dtype, device=device)
    return nn.Parameter(value if value.is_meta else value.copy_(stored.mapped()))


def write_model(
    model: KeyeForConditionalGeneration,
    module: nn.Module,
    start: Start,
    out: Path,
    write_extras: Callable[[Path], Any],
    max_shard: int = MAX_SHARD,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a stage's model to `out`, completely or not at all; collective, rank 0 writes.

    Args:
        model: the model.
        module: the trained module, which contains `model` or a part of it. Frozen tensors are copied from `start`.
        start: the files with which the stage started.
        out: the directory.
        write_extras: is called with the directory to write further files (the processor).
        max_shard: bytes of a file at most.
        dtype: of the tensors in the files.

    Raises:
        OSError, CheckpointError: on rank 0 only, after all ranks have gathered all tensors.
    """
    training = {id(p) for p in module.parameters() if p.requires_grad}
    parameters = dict(model.named_parameters())
    trained = {name: parameters[name] for name in start.stored if id(parameters[name]) in training}
    values = _masters(trained)
    try:
        if dist.get_rank() == 0:
            with atomic_directory(out) as part:
                write_shards(_tensors(start.stored, trained, values, dtype), part, max_shard)
                model.config.architectures, model.config.dtype = [type(model).__name__], dtype
                model.config.save_pretrained(part)
                model.generation_config.save_pretrained(part)
                write_extras(part)
    finally:
        for _ in values:  # every rank gathers every tensor, also after an error of the file
            pass


def replace_model(
    model: KeyeForConditionalGeneration,
    module: nn.Module,
    start: Start,
    out: Path,
    write_extras: Callable[[Path], Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """`write_model` after removing the contents of `out`; collective.

    Raises:
        KeyeError: on all ranks, if rank 0 cannot write it.
    """
    error: Exception | None = None
    if dist.get_rank() == 0:
        shutil.rmtree(out, ignore_errors=True)  # of a run that was killed before it recorded the stage as finished
    try:
        write_model(model, module, start, out, write_extras, dtype=dtype)
    except OSError as caught:
        reason = caught.strerror or caught
        error = CheckpointError(f"{out} cannot be written ({reason}); make room and repeat the command")
    except Exception as caught:
        error = caught
    agree(error, waiting_group(dist.group.WORLD))


def _masters(trained: Mapping[str, nn.Parameter]) -> Iterator[Tensor | None]:
    """The fp32 values of parameters one by one, on the CPU of rank 0 and None on the others; collective."""
    for parameter in trained.values():
        value = engine.master_weight(parameter)
        yield value.to("cpu", torch.float32) if dist.get_rank() == 0 else None


def _tensors(
    stored: Mapping[str, Stored],
    trained: Mapping[str, nn.Parameter],
    values: Iterator[Tensor | None],
    dtype: torch.dtype,
) -> dict[str, Stored | Computed]:
    """The tensor to write under each name; trained ones are taken from `values` in the order of the names."""
    tensors: dict[str, Stored | Computed] = {}
    for name, before in stored.items():
        fresh = Computed(before.shape, dtype, partial(next, values))
        tensors[name] = fresh if name in trained else before.to(dtype)
    return tensors
