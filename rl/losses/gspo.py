"""GSPO and GSPO-token: one importance ratio for each sequence (arXiv 2507.18071).

For a completion y_i with advantage Â_i:

    s_i = exp( 1/|y_i| · Σ_t [log π_θ(y_i,t) − log π_old(y_i,t)] )
    J   = mean over sequences of min( s_i Â_i, clip(s_i, 1 − ε_low, 1 + ε_high) Â_i )

The clip range is narrow (3e-4 below, 4e-4 above), because s_i is a geometric mean over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl.losses.base import (
    MAX_LOG_RATIO,
    LossInput,
    LossOutput,
    Settings,
    sampler_gap,
    sequence_means,
    weighted,
)

EPSILON_LOW, EPSILON_HIGH = 3e-4, 4e-4


def sequence_log_ratio(log_probs: Tensor, old_log_probs: Tensor, owner: Tensor, sequences: int) -> Tensor:
    """log s_i float32 [S]: the mean over the sequence's tokens of log π_θ − log π_old; 0 without tokens.

    Args:
        log_probs, old_log_probs: [T], completion tokens of all sequences one after another.
        owner: int64 [T], the sequence (0 … S−1) of each token.
    """
    return sequence_means(log_probs.float() - old_log_probs.float(), owner, sequences)


def _log_ratio(batch: LossInput) -> Tensor:
    """log s_i float32 [S]."""
    return sequence_log_ratio(batch.log_probs, batch.old_log_probs.detach(), batch.owner, batch.advantages.numel())


def _ratio(log_ratio: Tensor) -> Tensor:
    """s_i float32 [S]; without a gradient where |log s_i| is above its limit."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@dataclass(frozen=True, kw_only=True)
class Gspo(Settings):
    """Group Sequence Policy Optimization."""

    epsilon_low: float = EPSILON_LOW
    epsilon_high: float = EPSILON_HIGH

    def __call__(self, batch: LossInput) -> LossOutput:
        """The loss; ratio and clipped are [S]. `weights` and the KL are averaged over the tokens of a sequence."""
        advantages = batch.advantages.float()
        ratio = _ratio(_log_ratio(batch))
        objective, clipped = self.limited(ratio, advantages)
        if batch.weights is not None:
            objective = objective * sequence_means(batch.weights.detach().float(), batch.owner, len(advantages))
        kl = self.token_kl(batch)
        if self.kl:
            objective = objective - self.kl * sequence_means(kl, batch.owner, len(advantages))
        loss = -objective.sum() / batch.sequences
        return LossOutput(loss, ratio.detach(), clipped, None if kl is None else kl.detach(), sampler_gap(batch))


@dataclass(frozen=True, kw_only=True)
class GspoToken(Settings):
    """GSPO with a term for each token, whose ratio has the value s_i and the gradient of its own token.

    With one advantage for each sequence it has GSPO's value and gradient; weights then act on single tokens.
    """

    epsilon_low: float = EPSILON_LOW
    epsilon_high: float = EPSILON_HIGH

    def __call__(self, batch: LossInput) -> LossOutput:
        """The loss; ratio and clipped are [S]."""
        count, owner = batch.advantages.numel(), batch.owner
        log_ratio = _log_ratio(batch).detach()
        sequence, new = _ratio(log_ratio), batch.log_probs.float()
        limited = (log_ratio.abs() > MAX_LOG_RATIO)[owner]
        ratio = sequence[owner] * torch.exp(torch.where(limited, new.detach(), new) - new.detach())
        advantages = batch.advantages.float()
        objective = weighted(self.limited(ratio, advantages[owner])[0], batch)
        _, clipped = self.limited(sequence, advantages)
        kl = self.token_kl(batch)
        if self.kl:
            objective = objective - self.kl * kl
        loss = -sequence_means(objective, owner, count).sum() / batch.sequences
        return LossOutput(loss, sequence, clipped, None if kl is None else kl.detach(), sampler_gap(batch))
