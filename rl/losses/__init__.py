"""Policy losses behind one protocol: `LossInput` → `LossOutput`. `rl.policy.update` calls the one of the recipe."""

from rl.losses.advantages import group_advantages
from rl.losses.base import LossInput, LossOutput, PolicyLoss
from rl.losses.grpo import Cispo, Dapo, DrGrpo, Grpo
from rl.losses.gspo import EPSILON_HIGH, EPSILON_LOW, Gspo, GspoToken, sequence_log_ratio

LOSSES: dict[str, type[PolicyLoss]] = {
    "gspo": Gspo,
    "gspo_token": GspoToken,
    "grpo": Grpo,
    "dapo": Dapo,
    "dr_grpo": DrGrpo,
    "cispo": Cispo,
}
"""Name in the recipe → the loss."""

__all__ = [
    "EPSILON_HIGH",
    "EPSILON_LOW",
    "LOSSES",
    "Cispo",
    "Dapo",
    "DrGrpo",
    "Grpo",
    "Gspo",
    "GspoToken",
    "LossInput",
    "LossOutput",
    "PolicyLoss",
    "build_loss",
    "group_advantages",
    "sequence_log_ratio",
]


def build_loss(
    name: str, epsilon_low: float | None = None, epsilon_high: float | None = None, kl: float = 0.0
) -> PolicyLoss:
    """The loss of a name of `LOSSES`.

    Args:
        epsilon_low, epsilon_high: the clip range; None: that of the loss's paper.
        kl: weight of the KL to the reference; 0 = none.
    """
    given = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high}
    return LOSSES[name](kl=kl, **{key: value for key, value in given.items() if value is not None})
