"""What a completion earns: rewards behind one protocol, summed with weights and logged apart."""

from rl.rewards.base import Earned, Judgement, Reward, RewardSum, register, rewards_from
from rl.rewards.rules import Accuracy, Format

__all__ = ["Accuracy", "Earned", "Format", "Judgement", "Reward", "RewardSum", "register", "rewards_from"]
