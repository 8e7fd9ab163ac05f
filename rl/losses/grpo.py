"""Losses with one importance ratio for each token: GRPO, DAPO, Dr. GRPO and CISPO.

With r_t = π_θ(y_t) / π_old(y_t), the first three clip r_t Â as PPO does and differ in what their sums are divided by:

    GRPO      (2402.03300)  mean over the tokens of a sequence, then over sequences: a long answer's tokens count less
    DAPO      (2503.14476)  mean over all tokens of the mini-batch; the upper clip is wider
    Dr. GRPO  (2503.20783)  sum over tokens by a constant length; advantages are not divided by a standard deviation
    CISPO     (2506.13585)  mean over all tokens of min(r_t, 1 + ε_high) Â log π_θ(y_t), where the ratio has no gradient
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rl.losses.base import (
    LossInput,
    LossOutput,
    Settings,
    sampler_gap,
    sequence_means,
    token_log_ratio,
    weighted,
)


@dataclass(frozen=True, kw_only=True)
class _TokenLoss(Settings):
    """A clipped term for each token; the classes below sum them up."""

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2

    def __call__(self, batch: LossInput) -> LossOutput:
        """The loss; ratio and clipped are [T]."""
        ratio = token_log_ratio(batch).exp()
        objective, clipped = self._terms(batch, ratio, batch.advantages.float()[batch.owner])
        objective, kl = weighted(objective, batch), self.token_kl(batch)
        if self.kl:
            objective = objective - self.kl * kl
        found = None if kl is None else kl.detach()
        return LossOutput(-self._mean(objective, batch), ratio.detach(), clipped, found, sampler_gap(batch))

    def _terms(self, batch: LossInput, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """The objective of each token and where the clip acts: two [T]."""
        return self.limited(ratio, advantages)

    def _mean(self, objective: Tensor, batch: LossInput) -> Tensor:
        """This batch's part of the mean of [T]: over all tokens of the mini-batch."""
        return objective.sum() / batch.tokens


@dataclass(frozen=True, kw_only=True)
class Grpo(_TokenLoss):
    """Group Relative Policy Optimization, without its KL term unless `kl` is set."""

    def _mean(self, objective: Tensor, batch: LossInput) -> Tensor:
        return sequence_means(objective, batch.owner, batch.advantages.numel()).sum() / batch.sequences


@dataclass(frozen=True, kw_only=True)
class Dapo(_TokenLoss):
    """DAPO's loss: an asymmetric clip, and every token of the mini-batch has the same weight."""

    epsilon_high: float = 0.28


@dataclass(frozen=True, kw_only=True)
class DrGrpo(_TokenLoss):
    """GRPO without the biases of length and difficulty: a constant divisor and centred advantages."""

    standardise = False

    def _mean(self, objective: Tensor, batch: LossInput) -> Tensor:
        return objective.sum() / (batch.sequences * batch.max_tokens)


@dataclass(frozen=True, kw_only=True)
class Cispo(_TokenLoss):
    """Clipped importance weights on the policy gradient: every token keeps a gradient.

    The default has no lower limit and the upper limit 5.
    """

    epsilon_low: float = 1.0
    epsilon_high: float = 4.0

    def _terms(self, batch: LossInput, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        weight = ratio.detach().clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        return weight * advantages * batch.log_probs.float(), weight != ratio.detach()
