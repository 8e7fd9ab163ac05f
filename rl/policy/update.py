"""The update of a GSPO step: its answers are scored once, then one optimizer step follows for each mini-batch.

A mini-batch is computed in micro-batches. Every rank makes the same number of forward and backward passes, whatever its
data, because ZeRO communicates in each of them. With sequence parallelism the ranks of a group share every micro-batch
(`rl.policy.sequence_parallel`).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keye.errors import KeyeError
from rl.losses import LossInput, LossOutput
from rl.policy.lora import without_lora
from rl.policy.microbatch import MicroBatch, pad, split
from rl.policy.scoring import Group, Score, score
from rl.policy.sequence_parallel import SequenceParallel
from rl.recipe import Gspo
from rl.rollout.correction import Gap, gap_of, log_ratio_of
from rl.run.metrics import Moments


@dataclass(frozen=True)
class Update:
    """Metrics of one mini-batch on one rank; ratio and clipped are of sequences or of tokens, as in `LossOutput`."""

    loss: float
    entropy: Moments
    ratio: Moments
    clipped: Moments
    kl: Moments
    sampler_kl: Moments
    sampler_difference: Moments
    sampler_weight: Moments
    sampler_weight_squared: Moments
    applied_weight: Moments
    grad_norm: float


@dataclass(frozen=True)
class Plan:
    """One mini-batch: its micro-batches on this rank, equally many on every rank, and its global counts."""

    batches: list[MicroBatch]

    tokens: int
    """Completion tokens of all ranks, those of groups without an advantage included."""


class PolicyUpdate:
    """Trains the policy on the answers of a step; collective: every rank builds it.

    Args:
        engine: the DeepSpeed engine around `KeyeForConditionalGeneration`. config: the recipe's `[gspo]`.
        reference: the start model, if the loss has a KL term. With LoRA None: it is the policy without LoRA's change.

    Raises:
        RecipeError: `sequence_parallel` does not divide the processes and the heads.
    """

    def __init__(self, engine: Any, config: Gspo, reference: nn.Module | None = None) -> None:
        self.engine, self.config, self.reference = engine, config, reference
        self.loss, self.correction = config.policy_loss, config.correction
        self.world, ranks = dist.get_world_size(), config.sequence_parallel
        self.sequence = SequenceParallel(ranks, engine.module.config) if ranks > 1 else None

    def run(self, groups: list[Group], advantages: Tensor, parts: list[slice]) -> list[Update]:
        """One optimizer step for each mini-batch; collective.

        Args:
            groups: this rank's P groups of G completions. advantages: float32 [P, G].
            parts: the groups of each mini-batch; none is empty.
        """
        if self.sequence is not None:
            groups, advantages, parts = self.sequence.shared(groups, advantages, parts)
        plans = self._plan(groups, advantages, parts)
        # Scored before the first update: this is the policy that all mini-batches are compared with.
        with torch.no_grad():
            old = [[self._score(self.engine, batch) for batch in plan.batches] for plan in plans]
            start = self._reference(plans)
        return [self._step(*columns) for columns in zip(plans, old, start, strict=True)]

    def _plan(self, groups: list[Group], advantages: Tensor, parts: list[slice]) -> list[Plan]:
        """The micro-batches of each mini-batch; the counts are exchanged in two collectives."""
        mine = []
        for part in parts:
            # Groups with equal rewards have no gradient but that of the KL term.
            places = [i for i in range(len(groups))[part] if self.config.kl or advantages[i].any()]
            chosen = [groups[i] for i in places]
            mine.append(split(chosen, advantages[places], self.config.micro_batch_tokens) if chosen else [])
        device = self.engine.device
        # At least one pass: an optimizer step needs a backward pass before it.
        counts = torch.tensor([max(1, len(batches)) for batches in mine], device=device)
        lengths = [sum(len(c) for group in groups[part] for c in group.completions) for part in parts]
        tokens = torch.tensor(lengths, dtype=torch.float64, device=device)
        if self.world > 1:
            dist.all_reduce(counts, op=dist.ReduceOp.MAX)
            dist.all_reduce(tokens)
        columns = zip(mine, parts, counts.tolist(), tokens.tolist(), strict=True)
        shares = self.config.sequence_parallel  # ranks that count the same tokens
        return [
            Plan(pad(batches, count, groups[part]), int(total) // shares) for batches, part, count, total in columns
        ]

    def _score(self, model: Any, batch: MicroBatch) -> Score:
        compute = score if self.sequence is None else self.sequence.score
        return compute(model, batch.groups, self.config.temperature)

    def _reference(self, plans: list[Plan]) -> list[list[Tensor | None]]:
        """The start model's log-probabilities [T] of each micro-batch; None of each without a KL term or reference.

        They are computed before the updates, because ZeRO-3 allows no other pass between a forward and its backward.
        """
        lora = self.reference is None and self.config.lora_rank > 0
        if not self.config.kl or (self.reference is None and not lora):
            return [[None] * len(plan.batches) for plan in plans]
        model, start = (self.engine, without_lora(self.engine.module)) if lora else (self.reference, nullcontext())
        with start:
            return [[self._score(model, batch).log_probs for batch in plan.batches] for plan in plans]

    def _step(self, plan: Plan, old: list[Score], start: list[Tensor | None]) -> Update:
        """One optimizer step on a mini-batch: `old` are its answers' scores before, `start` those of the reference."""
        outputs, entropies = [], []
        gaps: list[Gap] = []
        measures = self.sequence is None or self.sequence.first
        for place, (batch, before, reference) in enumerate(zip(plan.batches, old, start, strict=True), 1):
            new = self._score(self.engine, batch)
            given = self._input(plan, batch, before, new, reference)
            if batch.weight and (gap := self._gap(given)) is not None:
                gaps += [gap] * measures
                given = replace(given, weights=gap.applied)
            output = self.loss(given)
            # The gradients of all micro-batches are summed; the last one is followed by the optimizer's step.
            self.engine.set_gradient_accumulation_boundary(place == len(plan.batches))
            self.engine.backward(output.loss * batch.weight)
            if batch.weight and measures:
                outputs.append(_detached(output))
                entropies.append(new.entropy)
        self.engine.step()
        return _metrics(outputs, entropies, gaps, float(self.engine.get_global_grad_norm() or 0.0))

    def _gap(self, given: LossInput) -> Gap | None:
        """Sampler against trainer, and the factors that correct for it; None if the engine gave no log-probabilities.

        Raises:
            KeyeError: a correction is configured and the engine gave none.
        """
        if given.sampler_log_probs is None:
            if self.correction.kind != "off":
                raise KeyeError(
                    f'gspo.importance = "{self.correction.kind}" needs the log-probabilities of the rollout engine, '
                    'and it gave none; let it return them, or set gspo.importance to "off"'
                )
            return None
        ratio = log_ratio_of(given.old_log_probs, given.sampler_log_probs)
        return gap_of(ratio, given.owner, self.correction.weights(ratio, given.owner))

    def _input(self, plan: Plan, batch: MicroBatch, old: Score, new: Score, reference: Tensor | None) -> LossInput:
        g, device = self.config, new.log_probs.device
        sampled = [row for group in batch.groups for row in group.log_probs]
        complete = sum(map(len, sampled)) == len(new.log_probs)  # an engine may return none
        return LossInput(
            new.log_probs,
            old.log_probs,
            new.owner,
            batch.advantages.to(device),
            # DeepSpeed averages gradients over the ranks; the loss is a sum over all ranks' sequences. The ranks of a
            # sequence group have parts of one gradient, which DeepSpeed's average adds up as well.
            sequences=g.prompts * g.group_size / g.mini_batches / self.world,
            tokens=plan.tokens / self.world,
            max_tokens=g.max_new_tokens,
            reference_log_probs=reference,
            sampler_log_probs=torch.cat(sampled).to(device) if sampled and complete else None,
        )


def _detached(output: LossOutput) -> LossOutput:
    """Without the graph, so that the memory of a micro-batch is free before the next one."""
    return LossOutput(output.loss.detach(), output.ratio, output.clipped, output.kl, output.sampler_kl)


def _metrics(outputs: list[LossOutput], entropies: list[Tensor], gaps: list[Gap], grad_norm: float) -> Update:
    def moments(values: list[Tensor | None]) -> Moments:
        return Moments.join(Moments.of(value) for value in values if value is not None)

    return Update(
        sum(output.loss.item() for output in outputs),
        moments(entropies),
        moments([output.ratio for output in outputs]),
        moments([output.clipped for output in outputs]),
        moments([output.kl for output in outputs]),
        moments([output.sampler_kl for output in outputs]),
        moments([gap.difference for gap in gaps]),
        moments([gap.weight for gap in gaps]),
        moments([gap.weight.double().square() for gap in gaps]),
        moments([gap.applied for gap in gaps]),
        grad_norm,
    )
