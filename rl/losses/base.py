"""What every policy loss takes and returns, and the parts that they share.

A loss sees the T completion tokens of S sequences, one sequence after another. Its sums are divided by counts that the
caller gives, so that N processes with M micro-batches each compute the loss of one process with one batch. Ratios and
losses are float32 whatever the model computes in: bf16 resolves only 1 ± 4e-3, and clip ranges are as narrow as 3e-4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # a larger one has no gradient: exp() would overflow, and an overflow times zero is not a number


@dataclass(frozen=True)
class LossInput:
    """S sequences of T completion tokens, and the counts that their sums are divided by."""

    log_probs: Tensor
    """[T], of the policy that trains, with gradient."""

    old_log_probs: Tensor
    """[T], of the policy at the start of the step."""

    owner: Tensor
    """int64 [T], the sequence (0 … S−1) of each token."""

    advantages: Tensor
    """[S]."""

    sequences: float
    """Sequences of the complete mini-batch: of all processes and micro-batches, those without an advantage included.

    Where gradients are averaged over processes, divide this and `tokens` by their number.
    """

    tokens: float
    """Completion tokens of the complete mini-batch, counted in the same way."""

    max_tokens: int = 1
    """Tokens that a sequence may have, the constant divisor of Dr. GRPO."""

    reference_log_probs: Tensor | None = None
    """[T], of the reference model; needed if the loss has a KL term."""

    sampler_log_probs: Tensor | None = None
    """[T], of the engine that sampled; only `weights` changes the loss, these are compared with the old ones."""

    weights: Tensor | None = None
    """[T], factors on the terms of the tokens, such as a correction for the sampler; no gradient."""


@dataclass(frozen=True)
class LossOutput:
    """The loss of a mini-batch or a part of it, and what is logged about it."""

    loss: Tensor
    """float32 scalar with gradient, to be minimised; parts of a mini-batch add up."""

    ratio: Tensor
    """float32, the importance ratios before the clip, detached: [S] of sequences, or [T] of tokens."""

    clipped: Tensor
    """bool, the same shape: where the clip changed the gradient (to zero, except in CISPO)."""

    kl: Tensor | None = None
    """float32 [T], the estimate of KL(policy ‖ reference), detached; None without a reference."""

    sampler_kl: Tensor | None = None
    """float32 [T], the estimate of KL(sampler ‖ old policy), detached; None without the sampler's log-probabilities."""


class PolicyLoss(Protocol):
    """A loss with its settings, see `rl.losses.LOSSES`."""

    epsilon_low: float
    epsilon_high: float
    kl: float
    standardise: bool
    """Whether its advantages are divided by the standard deviation of their group."""

    def __call__(self, batch: LossInput) -> LossOutput:
        """The loss of these sequences."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a policy loss can be configured with."""

    epsilon_low: float
    """The ratio is clipped below 1 minus this."""

    epsilon_high: float
    """The ratio is clipped above 1 plus this."""

    kl: float = 0.0
    """Weight of KL(policy ‖ reference); 0 = none."""

    standardise = True

    def limited(self, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """The clipped objective of ratios and advantages of one shape, and bool: where its gradient is zero."""
        bounded = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        objective = torch.minimum(ratio * advantages, bounded * advantages)
        with torch.no_grad():
            above = (advantages > 0) & (ratio > 1 + self.epsilon_high)
            below = (advantages < 0) & (ratio < 1 - self.epsilon_low)
        return objective, above | below

    def token_kl(self, batch: LossInput) -> Tensor | None:
        """Estimate of KL(policy ‖ reference) float32 [T], None without a reference.

        Raises:
            ValueError: the loss has a KL term and the batch no reference.
        """
        if batch.reference_log_probs is not None:
            return k3(batch.log_probs, batch.reference_log_probs)
        if self.kl:
            raise ValueError(f"a loss with kl = {self.kl} needs reference_log_probs")
        return None


def token_log_ratio(batch: LossInput) -> Tensor:
    """log π_θ − log π_old, float32 [T]."""
    difference = batch.log_probs.float() - batch.old_log_probs.detach().float()
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def token_lengths(owner: Tensor, sequences: int) -> Tensor:
    """int64 [S]: tokens of each sequence, at least 1."""
    return torch.bincount(owner, minlength=sequences).clamp_min(1)


def sequence_means(values: Tensor, owner: Tensor, sequences: int) -> Tensor:
    """float32 [S]: the mean over each sequence's tokens of `values` [T]; 0 without tokens."""
    sums = values.new_zeros(sequences).index_add(0, owner, values)
    return sums / token_lengths(owner, sequences)


def k3(log_probs: Tensor, other: Tensor) -> Tensor:
    """An estimate of KL(π ‖ other) from tokens sampled from π: r − 1 − log r with r = other / π; float32 [T], ≥ 0."""
    difference = (other.detach().float() - log_probs.float()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(difference) - difference


def weighted(terms: Tensor, batch: LossInput) -> Tensor:
    """Terms [T] times the weights of their tokens."""
    return terms if batch.weights is None else terms * batch.weights.detach().float()


def sampler_gap(batch: LossInput) -> Tensor | None:
    """Estimate of KL(sampler ‖ old policy) [T]."""
    if batch.sampler_log_probs is None:
        return None
    return k3(batch.sampler_log_probs.detach(), batch.old_log_probs)
