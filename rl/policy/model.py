"""The policy as a module: read, frozen in part, with LoRA and memory options; complete in rollouts; written at the end.

With ZeRO-3 a rank has a share of every weight. A rollout makes a different number of passes on each rank, so nothing
may be gathered during it: all weights are gathered once before it, in the dtype of training, and released after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keye.checkpoint.shards import Stored
from keye.errors import RecipeError
from keye.model.keye import KeyeForConditionalGeneration
from rl.policy.lora import add_lora, replace_merged
from rl.recipe import Gspo
from stages.distributed.activation_memory import apply_memory_options
from stages.distributed.engine import device, resolve_precision
from stages.distributed.weights import Start, replace_model


@dataclass(frozen=True)
class Policy:
    """The model, and the file of each of its parameters that `start` has."""

    model: KeyeForConditionalGeneration
    sources: Mapping[nn.Parameter, Stored]
    start: Start

    def save(self, out: Path, write_extras: Callable[[Path], Any], dtype: torch.dtype = torch.float32) -> None:
        """Write the tuned model to `out` in `dtype`, LoRA merged into its matrices; collective.

        Raises:
            KeyeError: on all ranks, if rank 0 cannot write it.
        """
        if hasattr(self.model, "peft_config"):
            replace_merged(self.model, self.start, out, write_extras, dtype)
        else:
            replace_model(self.model, self.model, self.start, out, write_extras, dtype)


def build_policy(start: Start, config: Gspo, seed: int) -> Policy:
    """The model of `start` as the recipe trains it.

    Raises:
        RecipeError: `freeze` names no part of the model, or peft is missing.
    """
    half = resolve_precision(config.precision) == "bf16"
    # With ZeRO-3 the engine reads the weights, so that no rank keeps more of them than its share.
    place = torch.device("meta") if config.zero == 3 else device()
    model = start.build(torch.bfloat16 if half else torch.float32, place)
    sources = start.sources(model)
    freeze(model, config.freeze, "gspo")
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha, seed, device())
    apply_memory_options(model, config.checkpointing, config.offload, config.mlp_tiles)
    return Policy(model, sources, start)


def freeze(model: KeyeForConditionalGeneration, parts: tuple[str, ...], table: str) -> None:
    """Freeze parts of the model, such as "visual".

    Raises:
        RecipeError: `table`.freeze names a part that the model does not have.
    """
    backbone = model.base_model
    for name in parts:
        try:
            (model if name.startswith("lm_head") else backbone).get_submodule(name).requires_grad_(False)
        except AttributeError:
            known = ", ".join([*(child for child, _ in backbone.named_children()), "lm_head"])
            raise RecipeError(f"{table}.freeze names {name!r}: the model's parts are {known}") from None


@contextmanager
def complete(engine: Any) -> Iterator[None]:
    """All weights on this rank, without collectives in the model's passes; collective at its begin.

    Without ZeRO-3 they are there already, and nothing happens.
    """
    if engine.zero_optimization_stage() != 3:
        yield
        return
    from deepspeed import zero

    # DeepSpeed's hooks gather and release the weights of a unit around its call.
    hooks = [hook for part in engine.module.modules() for hook in (part._forward_pre_hooks, part._forward_hooks)]
    kept = [dict(hook) for hook in hooks]
    with zero.GatheredParameters(list(engine.module.parameters())):
        for hook in hooks:
            hook.clear()
        try:
            yield
        finally:
            for hook, entries in zip(hooks, kept, strict=True):
                hook.update(entries)
