"""Packing: samples → rows of one context length with explicit document boundaries; the choice of what goes together.

A pack is closed by an exact subset sum, so that it is full; the packs of a step are chosen to cost the same.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from keye.prompt.processor import Sample
from stages.data.items import PIXELS, from_bytes
from stages.data.planner import Ledger, Waiting

IGNORED = -100
GRIDS = ("image_grid_thw", "video_grid_thw")


def pack(samples: list[Sample], multiple: int = 1, pad: int = 0) -> dict[str, Tensor]:
    """Samples end to end as one row.

    Returns:
        input_ids `[1, L]`, position_ids `[3, 1, L]`, shift_labels `[1, L]` (the label at i is token i + 1; the last of
        each document is masked, so that none predicts its neighbour's first token), cu_seqlens int32 `[D + 1]`, and
        the pixels and grids of all stills and frames in stream order. L is a multiple of `multiple`: what is missing
        is a document of its own made of `pad` without labels.
    """
    documents = [(s.input_ids, s.position_ids, F.pad(s.labels[1:], (0, 1), value=IGNORED)) for s in samples]
    rest = -sum(len(ids) for ids, _, _ in documents) % multiple
    if rest:
        positions = torch.arange(rest).expand(3, rest)
        documents.append((torch.full((rest,), pad), positions, torch.full((rest,), IGNORED)))
    lengths = torch.tensor([0] + [len(ids) for ids, _, _ in documents])
    row: dict[str, Tensor] = {
        "input_ids": torch.cat([ids for ids, _, _ in documents])[None],
        "position_ids": torch.cat([positions for _, positions, _ in documents], 1)[:, None],
        "shift_labels": torch.cat([labels for _, _, labels in documents])[None],
        "cu_seqlens": lengths.cumsum(0).to(torch.int32),
    }
    for name in (*PIXELS, *GRIDS):
        parts = [getattr(s, name) for s in samples if getattr(s, name) is not None]
        if parts:
            row[name] = join(parts)
    return row


def join(parts: list[Tensor]) -> Tensor:
    """Pixels or grids of several samples as one; bytes only where all are bytes."""
    same = len({part.dtype for part in parts}) == 1
    return torch.cat(parts if same else [from_bytes(part) for part in parts])


def fill(room: int, sizes: list[int]) -> list[int]:
    """Indices of the sizes whose sum is the largest that is at most `room`: an exact subset sum.

    Bit s of a Python integer says that s can be reached; a size is one shift. Of equal sums, earlier sizes are taken.
    """
    reached, mask = [1], (1 << (room + 1)) - 1
    for size in sizes:
        reached.append((reached[-1] | (reached[-1] << size)) & mask)
        if reached[-1] >> room:
            break
    total, chosen = reached[-1].bit_length() - 1, []
    for i in range(len(reached) - 2, -1, -1):
        if not (reached[i] >> total) & 1:
            chosen.append(i)
            total -= sizes[i]
    return chosen[::-1]


class Packs:
    """Forms packs of one context length that are full, cost the same, and keep the kinds' shares of the tokens.

    The oldest samples of the kinds that are behind make up most of a step. They are dealt to the packs, dearest first;
    what is left of each pack is closed exactly with samples that bring its cost to the others'. A sample so dear that
    no other pack could match it waits for its like.

    Args:
        context: tokens a pack holds. packs: packs a step. per_token: see `Cost`.
    """

    samples = 64  # in the pool: enough for a subset sum to close a pack
    core = 0.85  # of a step's tokens is dealt by cost; the rest closes the packs
    patience = 8  # steps that a sample waits at most for its like
    choices = 48  # candidates of a subset sum, by cost, and as many by length
    tolerance = 0.02  # how far from the mean a pack may cost before samples are held back or exchanged
    exchanges = 4  # in a pack, at most
    loss = 0.01  # of a pack that may be left open for the sake of its cost

    def __init__(self, context: int, packs: int, per_token: int) -> None:
        self.context, self.packs, self.per_token = context, packs, per_token
        self.amount, self.guess = context * packs, context

    def units(self, tokens: float) -> float:
        """A step is measured in tokens."""
        return tokens

    def form(self, pool: list[Waiting], ledger: Ledger, step: int) -> list[list[Waiting]]:
        """See `Former`."""
        packs = [_Pack(self.context) for _ in range(self.packs)]
        chosen = self._choose(pool, ledger, step)
        target = sum(waiting.meta.excess for waiting in chosen) // self.packs
        for waiting in self._deal(chosen, packs, target):
            ledger.add(waiting.meta, -1)
        taken = {waiting.serial for pack in packs for waiting in pack.samples}
        rest = [waiting for waiting in pool if waiting.serial not in taken]
        rest = self._close(packs, rest, ledger, target)
        self._even_out(packs, rest, ledger, step)
        return [sorted(pack.samples, key=lambda waiting: waiting.serial) for pack in packs]

    def _choose(self, pool: list[Waiting], ledger: Ledger, step: int) -> list[Waiting]:
        """The oldest of the kinds that are behind, up to the core; without those that could not be matched.

        A kind holds back no more than what the pool has of it above what it is owed.
        """
        spare = {kind: -ledger.owed(kind, self.amount) for kind in ledger.shares}
        for waiting in pool:
            spare[waiting.meta.kind] += waiting.meta.tokens
        held: set[int] = set()
        while True:
            chosen = self._oldest(pool, ledger, step, held)
            mean = sum(waiting.meta.excess for waiting in chosen) / self.packs
            limit = mean + self.tolerance * (self.context * self.per_token + mean)
            dear = [
                w for w in chosen
                if w.meta.excess > limit and step - w.born < self.patience and w.meta.tokens <= spare[w.meta.kind]
            ]  # fmt: skip
            if not dear:
                return chosen
            # A few at a time, because what takes their place changes the mean.
            dear.sort(key=lambda w: (-w.meta.excess, -w.serial))
            for waiting in dear[: 1 + len(dear) // 4]:
                if waiting.meta.tokens <= spare[waiting.meta.kind]:
                    held.add(waiting.serial)
                    spare[waiting.meta.kind] -= waiting.meta.tokens
            for waiting in chosen:
                ledger.add(waiting.meta, -1)

    def _oldest(self, pool: list[Waiting], ledger: Ledger, step: int, held: set[int]) -> list[Waiting]:
        late = [waiting for waiting in pool if step - waiting.born >= self.patience]
        queues: dict[str, list[Waiting]] = {}
        for waiting in reversed(pool):
            if waiting.serial not in held and step - waiting.born < self.patience:
                queues.setdefault(waiting.meta.kind, []).append(waiting)
        chosen, tokens, late = [], 0, late[::-1]
        while tokens < self.amount and (late or any(queues.values())):
            if late:
                chosen.append(late.pop())
            else:
                kind = max((k for k in queues if queues[k]), key=lambda k: (ledger.owed(k), k))
                chosen.append(queues[kind].pop())
            ledger.add(chosen[-1].meta)
            tokens += chosen[-1].meta.tokens
        return chosen

    def _deal(self, chosen: list[Waiting], packs: list["_Pack"], target: int) -> list[Waiting]:
        """Deal the longest of the chosen to the packs; returns what is not dealt: the shortest, which close the packs.

        A pack needs so much excess a token to end at the target. Dear samples go where most is needed, cheap ones
        where least is.
        """
        # What has waited longest is placed before a pack can be too full for it.
        first = min(chosen, key=lambda waiting: (waiting.born, waiting.serial))
        order = [first, *sorted((w for w in chosen if w is not first), key=_length, reverse=True)]
        tokens, count = 0, 0
        while count < len(order) and tokens < self.core * self.amount:
            tokens += order[count].meta.tokens
            count += 1
        left = order[count:]
        # Those that are long for a pack come first, so that they find room; then the dearest.
        order = [first, *sorted(order[1:count], key=self._urgency)]
        room, missing = np.full(len(packs), self.context), np.full(len(packs), target)
        for waiting in order:
            meta = waiting.meta
            need = missing / np.maximum(room, 1)
            if meta.excess < meta.tokens * target / self.context:
                need = -need
            place = int(np.where(room >= meta.tokens, need, -np.inf).argmax())
            if room[place] < meta.tokens:
                left.append(waiting)
                continue
            packs[place].add(waiting)
            room[place] -= meta.tokens
            missing[place] -= meta.excess
        return left

    def _urgency(self, waiting: Waiting) -> tuple[bool, int, int]:
        return 4 * waiting.meta.tokens < self.context, -waiting.meta.excess, waiting.serial

    def _close(self, packs: list["_Pack"], rest: list[Waiting], ledger: Ledger, target: int) -> list[Waiting]:
        """Fill what is left of each pack from the rest of the pool, the emptiest pack first; returns what remains."""
        for pack in sorted(packs, key=lambda pack: -pack.room):
            density = (target - pack.excess) / max(pack.room, 1)
            open_room = sum(p.room for p in packs)
            fitting = [w for w in rest if w.meta.tokens <= pack.room]
            behind = [w for w in fitting if ledger.owed(w.meta.kind, open_room) > 0]
            found: list[Waiting] = []
            for candidates in (behind, fitting):
                near = self._candidates(candidates, density, pack.room)
                tried = [near[i] for i in fill(pack.room, [w.meta.tokens for w in near])]
                found = max(found, tried, key=lambda part: sum(w.meta.tokens for w in part))
                if pack.room - sum(w.meta.tokens for w in found) <= 0.005 * self.context:
                    break
            for waiting in found:
                pack.add(waiting)
                ledger.add(waiting.meta)
            taken = {waiting.serial for waiting in found}
            rest = [waiting for waiting in rest if waiting.serial not in taken]
        return rest

    def _candidates(self, fitting: list[Waiting], density: float, room: int) -> list[Waiting]:
        """Samples whose cost a token is nearest to what a pack needs, and short ones, which close what these leave."""
        near = sorted(fitting, key=lambda w: (abs(w.meta.excess / w.meta.tokens - density), w.serial))
        count, tokens = 0, 0
        while count < len(near) and (count < self.choices or tokens < 2 * room):
            tokens += near[count].meta.tokens
            count += 1
        return near[:count] + sorted(near[count:], key=_length)[: self.choices]

    def _even_out(self, packs: list["_Pack"], rest: list[Waiting], ledger: Ledger, step: int) -> None:
        """Exchange samples for others of their kind and nearly their length from the rest, where that evens the costs.

        Samples that have waited their time stay where they are.
        """
        if not rest or len(packs) == 1:
            return
        target = sum(pack.excess for pack in packs) // len(packs)
        near = self.tolerance / 2 * (self.context * self.per_token + target)
        tokens = np.array([waiting.meta.tokens for waiting in rest])
        excess = np.array([waiting.meta.excess for waiting in rest])
        kinds = np.array([waiting.meta.kind for waiting in rest])
        for pack in packs:
            for _ in range(self.exchanges):
                gap = pack.excess - target
                if abs(gap) <= near:
                    break
                found = []
                for place, out in enumerate(pack.samples):
                    if step - out.born < self.patience:
                        longer = tokens - out.meta.tokens
                        fits = (longer <= pack.room) & (pack.room - longer <= self.loss * self.context)
                        fits &= kinds == out.meta.kind
                        missed = np.where(fits, abs(gap - out.meta.excess + excess), abs(gap))
                        found.append((int(missed.min()), place, int(missed.argmin())))
                missed, place, into = min(found, default=(abs(gap), 0, 0))
                if missed >= abs(gap):
                    break
                out = pack.samples[place]
                pack.exchange(out, rest[into])
                ledger.add(rest[into].meta)
                ledger.add(out.meta, -1)
                rest[into] = out
                tokens[into], excess[into] = out.meta.tokens, out.meta.excess


def _length(waiting: Waiting) -> tuple[int, int]:
    return waiting.meta.tokens, waiting.serial


class _Pack:
    """A pack in the making."""

    def __init__(self, room: int) -> None:
        self.samples: list[Waiting] = []
        self.room, self.excess = room, 0

    def add(self, waiting: Waiting) -> None:
        self.samples.append(waiting)
        self.room -= waiting.meta.tokens
        self.excess += waiting.meta.excess

    def exchange(self, out: Waiting, into: Waiting) -> None:
        self.samples.remove(out)
        self.room += out.meta.tokens
        self.excess -= out.meta.excess
        self.add(into)


class Pairs:
    """Forms steps of single samples, the oldest of the kinds that are behind.

    Args:
        count: samples a step.
    """

    guess, samples = 1, 0

    def __init__(self, count: int) -> None:
        self.amount = count

    def units(self, tokens: float) -> float:
        """A step is measured in samples."""
        return 1

    def form(self, pool: list[Waiting], ledger: Ledger, step: int) -> list[list[Waiting]]:
        """See `Former`."""
        queues: dict[str, list[Waiting]] = {}
        for waiting in reversed(pool):
            queues.setdefault(waiting.meta.kind, []).append(waiting)
        packs = []
        for _ in range(self.amount):
            kind = max((k for k in queues if queues[k]), key=lambda k: (ledger.owed(k), k))
            packs.append([queues[kind].pop()])
            ledger.add(packs[-1][0].meta)
        return packs
