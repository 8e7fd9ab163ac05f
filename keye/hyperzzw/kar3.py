"""Kar3, the optimizer of HyperZ·Z·W: three steps of the size of the learning rate, each in the direction of a sign."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from keye.errors import KeyeError


class Kar3(torch.optim.Optimizer):
    """p ← p − η (sign g + sign m₁ + sign m₂); then m_i ← β_i m_i + (1 − β_i) g. There is no weight decay.

    The averages are those before the current gradient, so the first step is sign g alone.

    Args:
        params: parameters or groups of them.
        lr: η; 1.215e-3 for the released CIFAR-10 net.
        betas: β₁, β₂; 0.75, 0.99 for the released CIFAR-100 net.

    Raises:
        KeyeError: a learning rate below 0, or a β outside [0, 1).
    """

    def __init__(self, params: Iterable[Any], lr: float = 1.215e-3, betas: tuple[float, float] = (0.5, 0.95)) -> None:
        if lr < 0 or not all(0 <= beta < 1 for beta in betas):
            raise KeyeError(f"Kar3: lr = {lr}, betas = {betas}; give lr ≥ 0 and betas in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter with a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["short"], state["long"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                averages = state["short"], state["long"]
                signs = torch.sign(parameter.grad) + torch.sign(averages[0]) + torch.sign(averages[1])
                parameter.add_(signs, alpha=-group["lr"])
                for average, beta in zip(averages, group["betas"], strict=True):
                    average.lerp_(parameter.grad.to(average.dtype), 1 - beta)
        return loss
