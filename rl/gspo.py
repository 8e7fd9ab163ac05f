"""GSPO as a function of tensors; the losses themselves are in `rl.losses`."""

from __future__ import annotations

from torch import Tensor

from rl.losses import EPSILON_HIGH, EPSILON_LOW, Gspo, LossInput, group_advantages, sequence_log_ratio
from rl.losses import LossOutput as GspoOutput

__all__ = ["EPSILON_HIGH", "EPSILON_LOW", "GspoOutput", "group_advantages", "gspo_loss", "sequence_log_ratio"]


def gspo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    owner: Tensor,
    advantages: Tensor,
    num_sequences: float | None = None,
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
    batch = LossInput(
        log_probs, old_log_probs, owner, advantages, num_sequences or advantages.numel(), max(1, log_probs.numel())
    )
    return Gspo(epsilon_low=epsilon_low, epsilon_high=epsilon_high)(batch)
