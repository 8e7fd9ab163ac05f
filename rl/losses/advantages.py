"""Advantages: the rewards of a group compared with one another."""

from __future__ import annotations

import torch
from torch import Tensor

RESOLUTION = 1e-6
"""Rewards of a group that differ by less than this, relative to the largest or to 1, are equal: float32 rounding."""


def group_advantages(rewards: Tensor, standardise: bool = True) -> Tensor:
    """Rewards [P, G] of G completions for each of P prompts → advantages float32 [P, G].

    The advantages of a group whose rewards are all equal, up to `RESOLUTION`, are exactly zero.

    Args:
        standardise: divide by the population standard deviation of the group; otherwise only its mean is subtracted.
    """
    rewards = rewards.double()  # in float32 the mean of 0.7 and 0.7 + 6e-8 is one of the two
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    # Rounding errors of 1e-8 in rewards, mean and std would have quotients of about ±1.
    spread = rewards.amax(dim=-1, keepdim=True) - rewards.amin(dim=-1, keepdim=True)
    flat = spread <= RESOLUTION * rewards.abs().amax(dim=-1, keepdim=True).clamp_min(1.0)
    if standardise:
        std = rewards.std(dim=-1, correction=0, keepdim=True)
        centred = centred / std.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(flat, torch.zeros_like(centred), centred).float()
