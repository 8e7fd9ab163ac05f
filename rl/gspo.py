"""Group Sequence Policy Optimization (arXiv 2507.18071), which the report uses in its reasoning RL (§5).

For a completion y_i of a group of G completions to one prompt, with reward r_i:

    s_i = exp( 1/|y_i| · Σ_t [log π_θ(y_i,t) − log π_old(y_i,t)] )        one importance ratio per sequence
    Â_i = (r_i − mean(r)) / std(r)                                         over the group
    J   = mean over sequences of min( s_i Â_i, clip(s_i, 1 − ε_low, 1 + ε_high) Â_i )

There is no KL term. The clip range is narrow (3e-4 below, 4e-4 above), because s_i is a geometric mean over tokens.
bf16 resolves only 1 ± 4e-3, so everything in this file is float32 whatever the model computes in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON_LOW, EPSILON_HIGH = 3e-4, 4e-4


@dataclass(frozen=True)
class GspoOutput:
    """Loss and ratios of one mini-batch of S sequences."""

    loss: Tensor
    """float32 scalar with gradient, to be minimised (= −J over `num_sequences`)."""

    ratio: Tensor
    """float32 [S], s_i, detached."""

    clipped: Tensor
    """bool [S], the sequences whose gradient is zero because of the clip."""


def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards [P, G] of G completions for each of P prompts → advantages float32 [P, G].

    Standardised within each group with the population standard deviation. The advantages of a group whose rewards are
    all equal are exactly zero.
    """
    rewards = rewards.float()
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    std = rewards.std(dim=-1, correction=0, keepdim=True)
    # Equal rewards such as 1.1 give rounding errors of 1e-8 in mean and std, whose quotient would be about ±1.
    flat = rewards.amax(dim=-1, keepdim=True) == rewards.amin(dim=-1, keepdim=True)
    return torch.where(flat, torch.zeros_like(centred), centred / std.clamp_min(torch.finfo(torch.float32).tiny))


def sequence_log_ratio(log_probs: Tensor, old_log_probs: Tensor, owner: Tensor, sequences: int) -> Tensor:
    """log s_i float32 [S]: the mean over the sequence's tokens of log π_θ − log π_old; 0 without tokens.

    Args:
        log_probs, old_log_probs: [T], completion tokens of all sequences one after another.
        owner: int64 [T], the sequence (0 … S−1) of each token.
    """
    difference = log_probs.float() - old_log_probs.float()
    sums = difference.new_zeros(sequences).index_add(0, owner, difference)
    lengths = torch.bincount(owner, minlength=sequences).clamp_min(1)
    return sums / lengths


def gspo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    owner: Tensor,
    advantages: Tensor,
    num_sequences: int | None = None,
    epsilon_low: float = EPSILON_LOW,
    epsilon_high: float = EPSILON_HIGH,
) -> GspoOutput:
    """The GSPO loss of S sequences, given as T flat completion tokens.

    Args:
        log_probs: [T], with gradient. old_log_probs: [T]. owner: int64 [T], see `sequence_log_ratio`.
        advantages: [S].
        num_sequences: divisor of the sum. Give the count over all ranks, with sequences of zero advantage, so that
            several processes compute the loss of one. Default: S.
        epsilon_low, epsilon_high: the ratio is clipped to [1 − epsilon_low, 1 + epsilon_high].
    """
    advantages = advantages.float()
    sequences = advantages.numel()
    ratio = torch.exp(sequence_log_ratio(log_probs, old_log_probs.detach(), owner, sequences))
    unclipped = ratio * advantages
    limited = ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages
    loss = -torch.minimum(unclipped, limited).sum() / (num_sequences or sequences)
    with torch.no_grad():
        above = (advantages > 0) & (ratio > 1 + epsilon_high)
        below = (advantages < 0) & (ratio < 1 - epsilon_low)
    return GspoOutput(loss, ratio.detach(), above | below)
