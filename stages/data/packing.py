"""Packing: samples → rows of one context length with explicit document boundaries; the choice of what goes together.

A pack is closed by an exact subset sum, so that it is full; the packs of a step are chosen to cost the same.
"""

import heapq

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
    core = 0.85  # of a step's tokens, dealt by cost; the rest closes the packs
    patience = 8  # steps that a sample waits at most for its like
    choices = 48  # candidates of a subset sum
    tolerance = 0.02  # how far above the mean a pack may cost before samples are exchanged

    def __init__(self, context: int, packs: int, per_token: int) -> None:
        self.context, self.packs, self.per_token = context, packs, per_token
        self.amount, self.guess = context * packs, context

    def units(self, tokens: float) -> float:
        """A step is measured in tokens."""
        return tokens

    def form(self, pool: list[Waiting], ledger: Ledger, step: int) -> list[list[Waiting]]:
        """See `Former`."""
        chosen = self._choose(pool, ledger, step)
        packs = [_Pack(self.context) for _ in range(self.packs)]
        left = self._deal(chosen, packs)
        for waiting in left:
            ledger.add(waiting.meta, -1)
        taken = {waiting.serial for pack in packs for waiting in pack.samples}
        rest = [waiting for waiting in pool if waiting.serial not in taken]
        self._close(packs, rest, ledger)
        self._even_out(packs)
        return [sorted(pack.samples, key=lambda waiting: waiting.serial) for pack in packs]

    def _choose(self, pool: list[Waiting], ledger: Ledger, step: int) -> list[Waiting]:
        """The oldest of the kinds that are behind, up to the core; without those that could not be matched."""
        held: set[int] = set()
        while True:
            chosen = self._oldest(pool, ledger, step, held)
            mean = sum(waiting.meta.excess for waiting in chosen) / self.packs / self.core
            limit = mean + self.tolerance * (self.context * self.per_token + mean)
            dear = [w for w in chosen if w.meta.excess > limit and step - w.born < self.patience]
            if not dear or len(dear) == len(chosen):
                return chosen
            held.add(max(dear, key=lambda w: (w.meta.excess, w.serial)).serial)
            for waiting in chosen:
                ledger.add(waiting.meta, -1)

    def _oldest(self, pool: list[Waiting], ledger: Ledger, step: int, held: set[int]) -> list[Waiting]:
        wanted = self.core * self.amount
        late = [waiting for waiting in pool if step - waiting.born >= self.patience]
        queues: dict[str, list[Waiting]] = {}
        for waiting in reversed(pool):
            if waiting.serial not in held and step - waiting.born < self.patience:
                queues.setdefault(waiting.meta.kind, []).append(waiting)
        chosen, tokens, late = [], 0, late[::-1]
        while tokens < wanted and (late or any(queues.values())):
            if late:
                chosen.append(late.pop())
            else:
                kind = max((k for k in queues if queues[k]), key=lambda k: (ledger.owed(k), k))
                chosen.append(queues[kind].pop())
            ledger.add(chosen[-1].meta)
            tokens += chosen[-1].meta.tokens
        return chosen

    def _deal(self, chosen: list[Waiting], packs: list["_Pack"]) -> list[Waiting]:
        """Dearest first, each to the pack that has cost least and has room; returns what fits nowhere."""
        # What has waited longest is placed before a pack can be too full for it.
        first = min(chosen, key=lambda waiting: (waiting.born, waiting.serial))
        order = sorted(chosen, key=lambda w: (w is not first, -w.meta.excess, -w.meta.tokens, w.serial))
        heap = [(0, -self.context, i) for i in range(len(packs))]  # a heap already: it rises
        left: list[Waiting] = []
        for waiting in order:
            passed = []
            while heap and packs[heap[0][2]].room < waiting.meta.tokens:
                passed.append(heapq.heappop(heap))
            if heap:
                pack = packs[heap[0][2]]
                pack.add(waiting)
                heapq.heapreplace(heap, (pack.excess, -pack.room, heap[0][2]))
            else:
                left.append(waiting)
            for entry in passed:
                heapq.heappush(heap, entry)
        return left

    def _close(self, packs: list["_Pack"], rest: list[Waiting], ledger: Ledger) -> None:
        """Fill what is left of each pack from the pool, the emptiest pack first."""
        target = max(pack.excess for pack in packs)
        for pack in sorted(packs, key=lambda pack: -pack.room):
            # What a token should bring with it for the pack to end at the dearest one's cost.
            density = (target - pack.excess) / max(pack.room, 1)
            open_room = sum(p.room for p in packs)
            fitting = [w for w in rest if w.meta.tokens <= pack.room]
            behind = [w for w in fitting if ledger.owed(w.meta.kind, open_room) > 0]
            for candidates in (behind, fitting):
                near = sorted(candidates, key=lambda w: (abs(w.meta.excess / w.meta.tokens - density), w.serial))
                near = near[: self.choices]
                found = [near[i] for i in fill(pack.room, [w.meta.tokens for w in near])]
                if pack.room - sum(w.meta.tokens for w in found) <= 0.005 * self.context:
                    break
            for waiting in found:
                pack.add(waiting)
                ledger.add(waiting.meta)
            taken = {waiting.serial for waiting in found}
            rest = [waiting for waiting in rest if waiting.serial not in taken]

    def _even_out(self, packs: list["_Pack"]) -> None:
        """Exchange samples of like length between the dearest pack and the cheapest while that helps."""
        for _ in range(4 * len(packs)):
            dear = max(packs, key=lambda pack: pack.excess)
            cheap = min(packs, key=lambda pack: pack.excess)
            gap = dear.excess - cheap.excess
            if gap <= self.tolerance * (self.context * self.per_token + cheap.excess):
                return
            best = None
            for a in dear.samples:
                for b in cheap.samples:
                    more = a.meta.tokens - b.meta.tokens
                    moved = a.meta.excess - b.meta.excess
                    if -dear.room <= more <= cheap.room and 0 < moved < gap:
                        missed = abs(gap - 2 * moved)
                        if best is None or missed < best[0]:
                            best = (missed, a, b)
            if best is None:
                return
            dear.exchange(best[1], best[2])
            cheap.exchange(best[2], best[1])


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
