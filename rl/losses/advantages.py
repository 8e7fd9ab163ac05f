"""Advantages: the rewards of a group compared with one another."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, standardise: bool = True) -> Tensor:
    """Rewards [P, G] of G completions for each of P prompts → advantages float32 [P, G].

    The advantages of a group whose rewards are all equal are exactly zero.

    Args:
        standardise: divide by the population standard deviation of the group; otherwise only its mean is subtracted.
    """
    rewards = rewards.float()
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    # Equal rewards such as 1.1 give rounding errors of 1e-8 in mean and std, whose quotient would be about ±1.
    flat = rewards.amax(dim=-1, keepdim=True) == rewards.amin(dim=-1, keepdim=True)
    if standardise:
        std = rewards.std(dim=-1, correction=0, keepdim=True)
        centred = centred / std.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(flat, torch.zeros_like(centred), centred)
