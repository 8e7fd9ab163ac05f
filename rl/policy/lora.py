"""LoRA (arXiv 2106.09685) on the decoder's matrices, by peft: only its two narrow matrices train."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keye.checkpoint.shards import Computed, Stored, atomic_directory, write_shards
from keye.errors import CheckpointError, RecipeError, writing
from keye.model.keye import KeyeForConditionalGeneration
from stages.distributed.engine import master_weight
from stages.distributed.ranks import first_rank
from stages.distributed.weights import Start

ADAPTER = "default"
TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
"""The modules that get LoRA."""


def add_lora(model: KeyeForConditionalGeneration, rank: int, alpha: float, seed: int, device: torch.device) -> None:
    """Freeze the model and add LoRA in place, the same on every rank; it begins as no change.

    Args:
        alpha: the product of the two matrices is scaled by alpha / rank. device: of the training.

    Raises:
        RecipeError: peft is missing, or the decoder has no such matrices.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise RecipeError("gspo.lora_rank needs peft: pip install 'keye[lora]', or set it to 0") from None
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, lora_dropout=0.0)
    try:
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except ValueError as error:
        raise RecipeError(f"gspo.lora_rank: the decoder has no matrices for LoRA ({error})") from error
    numbers = torch.Generator().manual_seed(seed)
    for module in lora_layers(model).values():
        down, up = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
        bound = down.in_features**-0.5
        value = torch.empty(down.weight.shape).uniform_(-bound, bound, generator=numbers)
        down.weight = nn.Parameter(value.to(device))
        up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=device))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Name → module with LoRA."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The start model: LoRA's change is multiplied by zero, by the same modules and collectives as always.

    peft's own switch also changes which parameters require gradients, which DeepSpeed does not expect.
    """
    layers = lora_layers(model).values()
    kept = [layer.scaling[ADAPTER] for layer in layers]
    for layer in layers:
        layer.scaling[ADAPTER] = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, kept, strict=True):
            layer.scaling[ADAPTER] = scale


def replace_merged(
    model: KeyeForConditionalGeneration,
    start: Start,
    out: Path,
    write_extras: Callable[[Path], Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the model with LoRA merged into its matrices in fp32 to `out` as `dtype`, and LoRA itself to `out/adapter`.

    Collective; the previous contents of `out` are removed.

    Raises:
        KeyeError: on all ranks, if rank 0 cannot write it.
    """
    layers = lora_layers(model)
    pairs = {
        name: [master_weight(part[ADAPTER].weight).to("cpu", torch.float32) for part in (layer.lora_A, layer.lora_B)]
        for name, layer in layers.items()
    }

    def write() -> None:
        shutil.rmtree(out, ignore_errors=True)
        with writing(out, "the model", CheckpointError), atomic_directory(out) as part:
            write_shards(_tensors(start, layers, pairs, dtype), part)
            model.config.architectures, model.config.dtype = [type(model).__name__], dtype
            model.config.save_pretrained(part)
            model.generation_config.save_pretrained(part)
            _write_adapter(model, pairs, part / "adapter")
            write_extras(part)

    first_rank(write)


def _tensors(
    start: Start, layers: dict[str, Any], pairs: dict[str, list[Tensor]], dtype: torch.dtype
) -> dict[str, Stored | Computed]:
    """Every tensor of the start model as `dtype`, those with LoRA with its change added in fp32."""
    tensors: dict[str, Stored | Computed] = {}
    for name, stored in start.stored.items():
        layer = name.removesuffix(".weight")
        if layer in pairs and name != layer:
            merge = partial(_merged, stored, *pairs[layer], layers[layer].scaling[ADAPTER])
            tensors[name] = Computed(stored.shape, dtype, merge)
        else:
            tensors[name] = stored.to(dtype)
    return tensors


def _merged(stored: Stored, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return stored.mapped().float() + scale * (up @ down)


def _write_adapter(model: KeyeForConditionalGeneration, pairs: dict[str, list[Tensor]], folder: Path) -> None:
    """LoRA in the form of `PeftModel.from_pretrained`."""
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": Computed(
            tuple(value.shape), torch.float32, partial(_same, value)
        )
        for name, pair in pairs.items()
        for letter, value in zip("AB", pair, strict=True)
    }
    folder.mkdir()
    write_shards(tensors, folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    model.peft_config[ADAPTER].save_pretrained(folder)


def _same(value: Tensor) -> Tensor:
    return value
