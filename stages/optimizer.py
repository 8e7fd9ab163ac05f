"""The optimizer of pre-training and RL: its settings, AdamW's parameter groups and the learning-rate schedule."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stages.typed_toml import Need

PARTS = ("vision", "projector", "decoder")
"""Parts of the model that may have their own learning rate."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a learning-rate schedule and gradient clipping."""

    learning_rate: float = field(metadata={"former": "lr"})
    """Highest learning rate."""

    schedule: str = "cosine"
    """Learning rate over the steps: "cosine" (to zero) or "constant"."""

    warmup: int = 0
    """Optimizer steps of linear rise of the learning rate."""

    weight_decay: float = 0.0
    """Of matrices; vectors have none."""

    betas: tuple[float, ...] = (0.9, 0.95)
    """Of AdamW."""

    max_grad_norm: float = field(default=1.0, metadata={"former": "clip"})
    """Largest norm of the gradient of all parameters; 0 = no clipping."""

    lr_scale: dict[str, float] = field(default_factory=dict)
    """Part of the model ("vision", "projector" or "decoder") → factor on its learning rate."""

    def check(self, table: str, need: Need, parts: Collection[str] = PARTS) -> None:
        """Refuse impossible values.

        Args:
            table: the recipe's table, for the messages. parts: those that the stage trains.

        Raises:
            RecipeError: by `need`.
        """
        need(0 < self.learning_rate < math.inf, f"{table}.learning_rate must be above 0")
        need(self.schedule in ("cosine", "constant"), f'{table}.schedule must be "cosine" or "constant"')
        for key in ("warmup", "weight_decay", "max_grad_norm"):
            need(getattr(self, key) >= 0, f"{table}.{key} must not be below 0")
        need(len(self.betas) == 2, f"{table}.betas must be two numbers")
        need(set(self.lr_scale) <= set(parts), f"{table}.lr_scale may name only {', '.join(parts)}")
        need(all(factor > 0 for factor in self.lr_scale.values()), f"{table}.lr_scale: factors must be above 0")


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over the parameters of `module` that require gradients, and its schedule over so many optimizer steps."""
    groups = parameter_groups(module, config)
    cuda = torch.cuda.is_available()
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=tuple(config.betas), fused=cuda)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, config.warmup, config.schedule)
    )
    return optimizer, schedule


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Factor on the learning rate at `step` (from 0): linear rise over `warmup` steps, "cosine" to 0 or "constant"."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trained parameters by learning rate and decay: first those without a factor, matrices before vectors.

    A parameter below a module `visual` belongs to "vision", below `projector` to "projector", else to "decoder".
    Biases, norms and other vectors are not decayed.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            modules = set(name.split("."))
            part = "vision" if "visual" in modules else "projector" if "projector" in modules else "decoder"
            shape = getattr(parameter, "ds_shape", parameter.shape)  # the former of what ZeRO-3 has partitioned already
            groups.setdefault((config.lr_scale.get(part, 1.0), len(shape) < 2), []).append(parameter)
    order = sorted(groups, key=lambda key: (key[0] != 1.0, *key))
    decays = {False: config.weight_decay, True: 0.0}
    return [
        {"params": groups[key], "lr": config.learning_rate * key[0], "weight_decay": decays[key[1]]} for key in order
    ]
