"""The sampler's log-probabilities against the trainer's, and weights that correct for their difference.

The tokens of a step come from the sampler μ: another kernel, precision or batch size, or weights that are not
synchronised. The loss takes them as tokens of the policy π_old that the trainer scored. Their expectation is exact with
the factor w = π_old / μ on each term, which has a high variance where μ and π_old differ much; two remedies:

    truncated   min(w, cap)
    masked      w where 1 / cap ≤ w ≤ cap, otherwise 0: the sequence or token is left out

w is of a sequence (the product over its tokens) or of each token. Cuts by top-p and top-k are not corrected: both
log-probabilities are of the softmax over all tokens. Everything is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("off", "truncated", "masked")
LEVELS = ("sequence", "token")
MAX_LOG_WEIGHT = 20.0  # exp() of more would overflow in sums of squares


@dataclass(frozen=True)
class Correction:
    """kind: of `KINDS`. cap: at least 1. level: of `LEVELS`."""

    kind: str = "off"
    cap: float = 2.0
    level: str = "sequence"

    def weights(self, log_ratio: Tensor, owner: Tensor) -> Tensor | None:
        """Factors [T] on the loss terms of T tokens; None for "off".

        Args:
            log_ratio: float32 [T], log π_old − log μ. owner: int64 [T], the sequence of each token.
        """
        if self.kind == "off":
            return None
        weight = raw_weights(log_ratio, owner)[owner] if self.level == "sequence" else _exp(log_ratio)
        if self.kind == "truncated":
            return weight.clamp(max=self.cap)
        return weight * ((weight <= self.cap) & (weight >= 1 / self.cap))


@dataclass(frozen=True)
class Gap:
    """How far sampler and trainer are apart on some sequences."""

    difference: Tensor
    """float32 [T], |log π_old − log μ| of each token."""

    weight: Tensor
    """float32 [S], π_old / μ of each sequence, before any cut."""

    applied: Tensor
    """float32 [T], the factors on the loss; 1 without a correction."""


def log_ratio_of(old: Tensor, sampled: Tensor) -> Tensor:
    """log π_old − log μ, float32 [T]; no gradient."""
    return old.detach().float() - sampled.detach().to(old.device).float()


def raw_weights(log_ratio: Tensor, owner: Tensor) -> Tensor:
    """π_old / μ of each sequence, float32 [S]."""
    sequences = int(owner.max()) + 1 if len(owner) else 0
    return _exp(log_ratio.new_zeros(sequences).index_add(0, owner, log_ratio))


def gap_of(log_ratio: Tensor, owner: Tensor, weights: Tensor | None) -> Gap:
    """The gap of S sequences; `weights` as `Correction.weights` gives them."""
    applied = torch.ones_like(log_ratio) if weights is None else weights
    return Gap(log_ratio.abs(), raw_weights(log_ratio, owner), applied)


def effective_share(total: float, squares: float, count: int) -> float:
    """Effective sample size of `count` weights as a share of their number, (Σ w)² / (n Σ w²): 1 if all are equal."""
    return total * total / (count * squares) if count and squares else 1.0


def _exp(log_weight: Tensor) -> Tensor:
    return log_weight.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp()
