"""Mixed Preference Optimization (MPO, arXiv 2411.10442), which the report uses between SFT and RL (§5).

For a prompt x with a chosen answer y_c and a rejected answer y_r, r(y) = β · [log π_θ(y|x) − log π_0(y|x)] is the
implicit reward of an answer, where π_0 is the start model and log π(y|x) is summed over the tokens of y:

    preference (DPO)   L_p = −log σ( r(y_c) − r(y_r) )                        which answer is better
    quality (BCO)      L_q = −log σ( r(y_c) − δ ) − log σ( −(r(y_r) − δ) )    whether an answer is good
    generation (NLL)   L_g = −log π_θ(y_c|x) / |y_c|                          how to write a good answer
    MPO                L   = w_p L_p + w_q L_q + w_g L_g                      0.8, 0.2 and 1.0 in the report

δ is the moving mean of the rewards of earlier steps (`RewardShift`). Sums over hundreds of tokens need float32: bf16
resolves a sum near −300 only to ±1, more than all rewards of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from stages.distributed.engine import device


def sequence_log_probs(log_probs: Tensor, owner: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """Sum and number of the tokens of each of S sequences: float32 [S] with gradient, float32 [S].

    Args:
        log_probs: [T], the tokens of all sequences one after another. owner: int64 [T], the sequence of each token.
    """
    sums = torch.zeros(sequences, device=log_probs.device).index_add(0, owner, log_probs.float())
    return sums, torch.bincount(owner, minlength=sequences).float()


def dpo_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Preference loss float32 [P] of the implicit rewards float32 [P] of chosen and rejected answers."""
    return -F.logsigmoid(chosen.float() - rejected.float())


def bco_loss(chosen: Tensor, rejected: Tensor, shift: float) -> Tensor:
    """Quality loss float32 [P] of the implicit rewards float32 [P]; `shift` is δ, a constant."""
    return -F.logsigmoid(chosen.float() - shift) - F.logsigmoid(shift - rejected.float())


def nll_loss(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Generation loss float32 [P]: the chosen answers' summed log-probabilities [P] over their lengths [P]."""
    return -log_probs.float() / lengths.float()


@dataclass(frozen=True)
class MpoWeights:
    """Weights of the three terms."""

    preference: float = 0.8
    """Of DPO."""

    quality: float = 0.2
    """Of BCO."""

    generation: float = 1.0
    """Of the chosen answers' NLL."""


@dataclass(frozen=True)
class MpoOutput:
    """The loss of P pairs and its parts; all but `loss` are detached."""

    loss: Tensor
    """float32 [P] with gradient, the weighted sum of the terms of each pair."""

    preference: Tensor
    """float32 [P], L_p."""

    quality: Tensor
    """float32 [P], L_q."""

    generation: Tensor
    """float32 [P], L_g."""

    rewards: Tensor
    """float32 [P, 2], the implicit rewards of the chosen and the rejected answer."""


def mpo_loss(
    log_probs: Tensor, lengths: Tensor, reference: Tensor, beta: float, shift: float, weights: MpoWeights | None = None
) -> MpoOutput:
    """The MPO loss of P pairs.

    Args:
        log_probs: [P, 2], summed log-probabilities of the chosen and the rejected answer, with gradient.
        lengths: [P, 2], tokens of the answers.
        reference: [P, 2], summed log-probabilities of the start model.
        beta: β. shift: δ.
    """
    weights = weights or MpoWeights()
    rewards = beta * (log_probs.float() - reference.detach().float())
    chosen, rejected = rewards.unbind(1)
    preference, quality = dpo_loss(chosen, rejected), bco_loss(chosen, rejected, shift)
    generation = nll_loss(log_probs[:, 0], lengths[:, 0])
    loss = weights.preference * preference + weights.quality * quality + weights.generation * generation
    return MpoOutput(loss, preference.detach(), quality.detach(), generation.detach(), rewards.detach())


@dataclass
class RewardShift:
    """δ of `bco_loss`: the mean of the implicit rewards of all earlier steps, the same on every rank.

    The first step has δ = 0, which is then exact: the policy is the start model, and all rewards are 0.
    """

    total: float = 0.0
    count: float = 0.0
    _pending: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def value(self) -> float:
        """δ of the present step."""
        return self.total / self.count if self.count else 0.0

    def add(self, rewards: Tensor) -> None:
        """Keep this rank's rewards of the present step, of any shape; they count from the next step on."""
        self._pending.append(rewards.detach().double().flatten())

    def end_step(self) -> None:
        """Count the rewards of the step over all ranks; collective, also for a rank without rewards."""
        mine = torch.zeros(2, dtype=torch.float64, device=device())
        for rewards in self._pending:
            mine += torch.stack([rewards.sum(), torch.ones_like(rewards).sum()]).to(mine.device)
        self._pending.clear()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(mine)
        total, count = mine.tolist()
        self.total, self.count = self.total + total, self.count + count

    def state_dict(self) -> dict[str, float]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total, self.count = state["total"], state["count"]
