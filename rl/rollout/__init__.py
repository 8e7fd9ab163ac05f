"""Rollouts: G sampled completions for each prompt, by the model in this process or by a served engine."""

from rl.rollout.engine import RolloutEngine
from rl.rollout.inprocess import InProcessRollout

__all__ = ["InProcessRollout", "RolloutEngine"]
