"""A mini-batch in micro-batches: parts whose tokens, each prompt counted once for its completions, fit a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rl.policy.scoring import Group


@dataclass(frozen=True)
class MicroBatch:
    """Groups of one forward and backward pass; S completions.

    A group whose completions do not fit the budget is in several micro-batches, in each with its prompt and some of its
    completions.
    """

    groups: list[Group]

    advantages: Tensor
    """float32 [S]."""

    weight: float = 1.0
    """0 for a pass that only keeps this rank in step with the others."""

    @property
    def tokens(self) -> int:
        """Tokens of the pass: prompts and completions."""
        return sum(len(group.sample.input_ids) + sum(map(len, group.completions)) for group in self.groups)


def split(groups: list[Group], advantages: Tensor, budget: int) -> list[MicroBatch]:
    """Micro-batches of at most `budget` tokens.

    A completion whose prompt leaves no room for it has a micro-batch of its own, which exceeds the budget.

    Args:
        groups: P groups of G completions. advantages: float32 [P, G]. budget: 0 = one micro-batch of everything.
    """
    if not budget:
        return [MicroBatch(groups, advantages.flatten())]
    pieces = [piece for group, row in zip(groups, advantages, strict=True) for piece in _pieces(group, row, budget)]
    # Largest first, each into the first micro-batch with room: few micro-batches, the same in every run.
    batches: list[list[MicroBatch]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda piece: -piece.tokens):
        place = next((i for i, left in enumerate(room) if piece.tokens <= left), len(room))
        if place == len(room):
            room.append(budget)
            batches.append([])
        room[place] -= piece.tokens
        batches[place].append(piece)
    return [
        MicroBatch([group for piece in batch for group in piece.groups], torch.cat([p.advantages for p in batch]))
        for batch in batches
    ]


def pad(batches: list[MicroBatch], count: int, groups: list[Group]) -> list[MicroBatch]:
    """`count` micro-batches: those of a list, and passes of weight 0 over one token after the shortest prompt.

    Args:
        groups: of the mini-batch, with and without advantage; at least one.
    """
    shortest = min(groups, key=lambda group: len(group.sample.input_ids))
    one = _part(shortest, slice(0, 1))
    idle = MicroBatch(
        [replace(one, completions=[one.completions[0][:1]], log_probs=[], sampler_log_probs=None)], torch.zeros(1), 0.0
    )
    return batches + [idle] * (count - len(batches))


def _pieces(group: Group, advantages: Tensor, budget: int) -> list[MicroBatch]:
    """A group in parts of consecutive completions; `advantages` [G]."""
    prompt = len(group.sample.input_ids)
    pieces, first, used = [], 0, prompt
    for place, completion in enumerate(group.completions):
        if place > first and used + len(completion) > budget:
            pieces.append(MicroBatch([_part(group, slice(first, place))], advantages[first:place]))
            first, used = place, prompt
        used += len(completion)
    return [*pieces, MicroBatch([_part(group, slice(first, None))], advantages[first:])]


def _part(group: Group, places: slice) -> Group:
    return replace(
        group,
        completions=group.completions[places],
        log_probs=group.log_probs[places],
        finished=group.finished[places],
        texts=group.texts[places],
        sampler_log_probs=None if group.sampler_log_probs is None else group.sampler_log_probs[places],
    )
