"""Rewards of completions: one protocol, a weighted sum, and each reward logged by name."""

from rl.rewards.base import Earned, Judgement, Reward, RewardSum, register, rewards_from
from rl.rewards.constraints import AllConstraints, Constraints
from rl.rewards.rules import Accuracy, Format

__all__ = [
    "Accuracy", "AllConstraints", "Constraints", "Earned", "Format", "Judgement", "Reward", "RewardSum", "register",
    "rewards_from",
]  # fmt: skip
