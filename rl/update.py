"""The update of a GSPO step: its answers are scored once, then one optimizer step follows for each mini-batch.

Every rank takes part in the same number of collectives, whatever its data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rl.gspo import gspo_loss
from rl.policy import Group, Score, score
from rl.recipe import Gspo


@dataclass(frozen=True)
class Update:
    """Metrics of one mini-batch of S sequences on one rank: entropy of each token, ratio of each sequence."""

    loss: float
    entropy: list[float]
    ratio: list[float]
    clipped: list[bool]
    grad_norm: float


class PolicyUpdate:
    """Trains the policy on the answers of a step.

    Args:
        engine: the DeepSpeed engine around `KeyeForConditionalGeneration`. config: the recipe's `[gspo]`.
    """

    def __init__(self, engine: Any, config: Gspo) -> None:
        self.engine, self.config = engine, config
        self.world = dist.get_world_size()

    def run(self, groups: list[Group], advantages: Tensor, parts: list[slice]) -> list[Update]:
        """One optimizer step for each mini-batch; collective.

        Args:
            groups: this rank's P groups of G completions. advantages: float32 [P, G].
            parts: the groups of each mini-batch; none is empty.
        """
        chosen = [informative(advantages, part) for part in parts]
        # Scored before the first update: this is the policy that all mini-batches are compared with.
        with torch.no_grad():
            old = [score(self.engine, [groups[i] for i in places], self.config.temperature) for places in chosen]
        return [
            self._step([groups[i] for i in places], advantages[places], o)
            for places, o in zip(chosen, old, strict=True)
        ]

    def _step(self, groups: list[Group], advantages: Tensor, old: Score) -> Update:
        """One optimizer step on groups with advantages [P, G]."""
        g = self.config
        new = score(self.engine, groups, g.temperature)
        # DeepSpeed averages gradients over the ranks; the loss is a sum over all ranks' sequences.
        sequences = g.prompts * g.group_size / g.mini_batches / self.world
        flat = advantages.flatten().to(new.log_probs.device)
        output = gspo_loss(new.log_probs, old.log_probs, new.owner, flat, sequences, g.epsilon_low, g.epsilon_high)
        self.engine.backward(output.loss)
        self.engine.step()
        return Update(
            output.loss.item(),
            new.entropy.tolist(),
            output.ratio.tolist(),
            output.clipped.tolist(),
            float(self.engine.get_global_grad_norm() or 0.0),
        )


def informative(advantages: Tensor, part: slice) -> list[int]:
    """The groups of a mini-batch whose rewards differ; at least one group, because every rank must take part.

    Args:
        advantages: [P, G]. part: the groups of the mini-batch.
    """
    places = range(len(advantages))[part]
    return [i for i in places if advantages[i].any()] or [places[0]]
