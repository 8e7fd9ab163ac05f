"""Forming: which samples of the pool go together in the packs of a step.

A pack is closed by an exact subset sum, so that it is full; the packs of a step are chosen to cost the same.
"""

from collections.abc import Sequence

import numpy as np

from stages.data.planner import Ledger, Waiting


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
    what is left of each pack is closed exactly with samples that bring its cost to the others'.

    A sample so dear that its pack would cost more than the others whatever lay beside it waits until there are as many
    of its like as ranks meet in a round. Then each of them has a pack of its own, and these packs cost the same again.

    Args:
        context: tokens a pack holds. packs: packs a step. per_token: see `Cost`.
        alike: packs that shall cost the same; what a round takes, or more. 0: a quarter of a step.
    """

    samples = 64  # in the pool: enough for a subset sum to close a pack
    core = 0.85  # of a step's tokens is dealt by cost; the rest closes the packs
    patience = 8  # steps that a sample waits at most for its like
    choices = 48  # candidates of a subset sum, by cost, and as many by length
    tolerance = 0.02  # how far from the mean a pack may cost before samples are held back or exchanged
    exchanges = 4  # in a pack, at most
    loss = 0.01  # of a pack that may be left open for the sake of its cost

    def __init__(self, context: int, packs: int, per_token: int, alike: int = 0) -> None:
        self.context, self.packs, self.per_token = context, packs, per_token
        self.alike = alike or -(-packs // 4)
        self.amount, self.guess = context * packs, context

    def units(self, tokens: float) -> float:
        """A step is measured in tokens."""
        return tokens

    def form(self, pool: list[Waiting], ledger: Ledger, step: int) -> list[list[Waiting]]:
        """See `Former`."""
        dear, held = self._dear(pool, ledger, step)
        groups = self._gathered(dear, pool, step)
        leading = [waiting for group in groups for waiting in group]
        held -= {waiting.serial for waiting in leading}
        chosen = self._oldest(pool, ledger, step, held, leading)
        packs = self._packs(groups, chosen[len(leading) :])
        for waiting in self._deal(chosen[len(leading) :], packs):
            ledger.add(waiting.meta, -1)
        gone = held | {waiting.serial for pack in packs for waiting in pack.samples}
        rest = [waiting for waiting in pool if waiting.serial not in gone]
        rest = self._close(packs, rest, ledger)
        self._even_out(packs, rest, ledger, step)
        return [sorted(pack.samples, key=lambda waiting: waiting.serial) for pack in packs]

    def _dear(self, pool: list[Waiting], ledger: Ledger, step: int) -> tuple[list[Waiting], set[int]]:
        """Samples whose pack would cost more than the mean, were the rest of it the cheapest quarter of all tokens.

        Returns:
            Those that it would be the turn of, and the serials of these and all others like that.
        """
        dear: list[Waiting] = []
        if self.packs == 1:
            return dear, set()
        spare = sum(waiting.meta.tokens for waiting in pool) - 1.2 * self.amount
        while True:
            chosen = self._oldest(pool, ledger, step, {waiting.serial for waiting in dear})
            for waiting in chosen:
                ledger.add(waiting.meta, -1)
            mean = sum(waiting.meta.excess for waiting in chosen) / self.packs
            limit = mean + self.tolerance * (self.context * self.per_token + mean)
            cheap = _cheapest(chosen, self.amount / 4)
            over = {w.serial for w in pool if w.meta.excess + cheap * (self.context - w.meta.tokens) > limit}
            more = sorted((w for w in chosen if w.serial in over), key=_excess, reverse=True)
            # A few at a time, because what takes their place changes the mean.
            more = more[: 1 + len(more) // 4]
            spare -= sum(waiting.meta.tokens for waiting in more)
            if not more or spare < 0:
                return dear, {waiting.serial for waiting in dear} | (set() if more else over)
            dear += more

    def _gathered(self, dear: list[Waiting], pool: list[Waiting], step: int) -> list[list[Waiting]]:
        """Groups of the dear, `alike` in each, that shall lead a pack of this step each; the others wait."""
        near = sorted(dear, key=_excess)
        count = min(len(near), self.packs) // self.alike * self.alike
        if not count and any(step - waiting.born >= self.patience for waiting in near):
            # Time is up: those that come nearest join in.
            held = {waiting.serial for waiting in near}
            others = sorted((w for w in pool if w.serial not in held), key=_excess)
            near = others[-(self.alike - len(near)) :] + near
            count = len(near)
        if not count:
            return []
        eldest = min(range(len(near)), key=lambda i: (near[i].born, near[i].serial))
        first = min(
            range(max(0, eldest - count + 1), min(eldest, len(near) - count) + 1),
            key=lambda i: near[i + count - 1].meta.excess - near[i].meta.excess,
        )
        return [near[i : i + self.alike] for i in range(first, first + count, self.alike)]

    def _oldest(
        self, pool: list[Waiting], ledger: Ledger, step: int, held: set[int], leading: Sequence[Waiting] = ()
    ) -> list[Waiting]:
        """A step's tokens: what leads, what has waited too long, and the oldest of the kinds that are behind."""
        without = held | {waiting.serial for waiting in leading}
        late: list[Waiting] = []
        queues: dict[str, list[Waiting]] = {}
        for waiting in reversed(pool):
            if waiting.serial not in without:
                old = step - waiting.born >= self.patience
                (late if old else queues.setdefault(waiting.meta.kind, [])).append(waiting)
        chosen, tokens = list(leading), 0
        for waiting in leading:
            ledger.add(waiting.meta)
            tokens += waiting.meta.tokens
        while tokens < self.amount and (late or any(queues.values())):
            if late:
                chosen.append(late.pop())
            else:
                kind = max((k for k in queues if queues[k]), key=lambda k: (ledger.owed(k), k))
                chosen.append(queues[kind].pop())
            ledger.add(chosen[-1].meta)
            tokens += chosen[-1].meta.tokens
        return chosen

    def _packs(self, groups: list[list[Waiting]], others: list[Waiting]) -> list["_Pack"]:
        """Packs with what leads them, and the excess that each shall have in the end."""
        tokens, excess = (sum(getattr(w.meta, name) for w in others) for name in ("tokens", "excess"))
        density, packs = excess / max(tokens, 1), []
        for number, group in enumerate(groups):
            ends = [w.meta.excess + density * (self.context - w.meta.tokens) for w in group]
            target = max(sum(ends) / len(ends), max(w.meta.excess for w in group))
            for waiting in group:
                packs.append(_Pack(self.context, target, number))
                packs[-1].add(waiting)
                excess -= target - waiting.meta.excess
        plain = self.packs - len(packs)
        return packs + [_Pack(self.context, max(0.0, excess) / plain, len(groups)) for _ in range(plain)]

    def _deal(self, others: list[Waiting], packs: list["_Pack"]) -> list[Waiting]:
        """Deal the longest of the others to the packs; returns what is not dealt: the shortest, which close the packs.

        A pack needs so much excess a token to end at its target. Dear samples go where most is needed, cheap ones
        where least is.
        """
        if not others:
            return []
        # What has waited longest is placed before a pack can be too full for it.
        first = min(others, key=lambda waiting: (waiting.born, waiting.serial))
        order = [first, *sorted((w for w in others if w is not first), key=_length, reverse=True)]
        room, missing = (np.array([getattr(pack, name) for pack in packs], float) for name in ("room", "missing"))
        tokens, count = self.amount - sum(room), 0
        while count < len(order) and tokens < self.core * self.amount:
            tokens += order[count].meta.tokens
            count += 1
        left = order[count:]
        # Those that are long for a pack come first, so that they find room; then the dearest.
        order = [first, *sorted(order[1:count], key=self._urgency)]
        for waiting in order:
            meta = waiting.meta
            apart = abs(missing / np.maximum(room, 1) - meta.excess / meta.tokens)
            place = int(np.where(room >= meta.tokens, apart, np.inf).argmin())
            if room[place] < meta.tokens:
                left.append(waiting)
                continue
            packs[place].add(waiting)
            room[place] -= meta.tokens
            missing[place] -= meta.excess
        return left

    def _urgency(self, waiting: Waiting) -> tuple[bool, int, int]:
        return 4 * waiting.meta.tokens < self.context, -waiting.meta.excess, waiting.serial

    def _close(self, packs: list["_Pack"], rest: list[Waiting], ledger: Ledger) -> list[Waiting]:
        """Fill what is left of each pack from the rest of the pool, the emptiest pack first; returns what remains."""
        for pack in sorted(packs, key=lambda pack: -pack.room):
            density = pack.missing / max(pack.room, 1)
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
        for group in {pack.group for pack in packs}:
            like = [pack for pack in packs if pack.group == group]
            for pack in like:
                pack.target = sum(p.excess for p in like) / len(like)
        tokens = np.array([waiting.meta.tokens for waiting in rest])
        excess = np.array([waiting.meta.excess for waiting in rest])
        kinds = np.array([waiting.meta.kind for waiting in rest])
        for pack in packs:
            near = self.tolerance / 2 * (self.context * self.per_token + pack.target)
            for _ in range(self.exchanges):
                gap = -pack.missing
                if abs(gap) <= near:
                    break
                found = []
                for place, out in enumerate(pack.samples):
                    if step - out.born < self.patience:
                        longer = tokens - out.meta.tokens
                        fits = (longer <= pack.room) & (pack.room - longer <= self.loss * self.context)
                        fits &= kinds == out.meta.kind
                        missed = np.where(fits, abs(gap - out.meta.excess + excess), abs(gap))
                        found.append((float(missed.min()), place, int(missed.argmin())))
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


def _excess(waiting: Waiting) -> tuple[int, int]:
    return waiting.meta.excess, waiting.serial


def _cheapest(samples: list[Waiting], enough: float) -> float:
    """Excess a token of the cheapest samples that have `enough` tokens together."""
    tokens = excess = 0
    for waiting in sorted(samples, key=lambda w: (w.meta.excess / w.meta.tokens, w.serial)):
        if tokens >= enough:
            break
        tokens += waiting.meta.tokens
        excess += waiting.meta.excess
    return excess / max(tokens, 1)


class _Pack:
    """A pack in the making. target: the excess that it shall have, as all packs of its group."""

    def __init__(self, room: int, target: float, group: int) -> None:
        self.samples: list[Waiting] = []
        self.room, self.excess, self.target, self.group = room, 0, target, group

    @property
    def missing(self) -> float:
        """Excess to the target."""
        return self.target - self.excess

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
