"""Rewards of completions: one protocol, a weighted sum, and each reward logged by name."""

from rl.rewards.base import Earned, Judgement, Outcome, Reward, counted_advantages, register
from rl.rewards.constraints import AllConstraints, Constraints
from rl.rewards.judge import Judge
from rl.rewards.mathematics import Math
from rl.rewards.measures import BoxIou, Number, Seconds, TemporalIou
from rl.rewards.reward_model import RewardModelScore
from rl.rewards.rules import Accuracy, Anls, Choice, Exact, Format, Length
from rl.rewards.structure import Json, Markdown
from rl.rewards.weighted import RewardOptions, RewardSum, Term, rewards_from

__all__ = [
    "Accuracy", "AllConstraints", "Anls", "BoxIou", "Choice", "Constraints", "Earned", "Exact", "Format", "Json",
    "Judge", "Judgement", "Length", "Markdown", "Math", "Number", "Outcome", "Reward", "RewardModelScore",
    "RewardOptions", "RewardSum", "Seconds", "TemporalIou", "Term", "counted_advantages", "register", "rewards_from",
]  # fmt: skip
