"""Forming: which samples of the pool go together in the packs of a step.

Samples are dealt to the packs by their cost, then each pack is closed by an exact subset sum, so that it is full, and
in the end samples are exchanged until the packs cost the same. Pools have tens of thousands of samples when they are
short: everything here works on columns, and what is done once a pack looks at a window of a sorted column.
"""

from dataclasses import dataclass

import numpy as np

from stages.data.packing.closing import Build, close, even_out
from stages.data.packing.planner import Ledger
from stages.data.packing.samples import Pool


@dataclass(frozen=True)
class View:
    """The columns that packs are formed by. Costs are integers, so that their sums are the same on every machine.

    cost: excess int64 `[N]` in units of about a thousandth of a token's. late: bool `[N]`, has waited its time.
    per_token: what a token costs without excess, in the same units.
    """

    tokens: np.ndarray
    cost: np.ndarray
    kind: np.ndarray
    late: np.ndarray
    per_token: float

    @property
    def density(self) -> np.ndarray:
        """Cost a token, float64 `[N]`."""
        return self.cost / self.tokens


class BalancedPacker:
    """Forms packs of one context length that are full, cost the same, and keep the kinds' shares of the tokens.

    The oldest samples of the kinds that are behind make up most of a step. They are dealt to the packs, most expensive
    first; what is left of each pack is closed exactly with samples that bring its cost to the others'.

    A sample so expensive that its pack would cost more than the others whatever lay beside it waits until there are as
    many such samples as ranks meet in a round. Then each of them has a pack of its own, and these packs cost the same
    again.

    Args:
        context: tokens a pack holds. packs: packs a step. per_token: see `Cost`.
        alike: packs that shall cost the same; what a round takes, or more. 0: a quarter of a step.
    """

    samples = 64  # in the pool: enough for a subset sum to close a pack
    core = 0.85  # of a step's tokens is dealt by cost; the rest closes the packs
    patience = 8  # steps that a sample waits at most for others as expensive
    choices = 48  # candidates of a subset sum, by cost, and as many by length
    tolerance = 0.02  # how far from the mean a pack may cost before samples are held back or exchanged
    exchanges = 4  # in a pack, at most
    loss = 0.01  # of a pack that may be left open for the sake of its cost
    singly = 2048  # samples, the longest, that are dealt one by one; the others are dealt many at once

    def __init__(self, context: int, packs: int, per_token: int, alike: int = 0) -> None:
        self.context, self.packs, self.per_token = context, packs, per_token
        self.alike = alike or -(-packs // 4)
        self.amount, self.guess = context * packs, context
        self._unit = max(1, per_token >> 10)

    def units(self, tokens: np.ndarray) -> np.ndarray:
        """A step is measured in tokens."""
        return tokens

    def form(self, pool: Pool, ledger: Ledger, step: int) -> list[np.ndarray]:
        """See `Packer`."""
        late = step - pool.born >= self.patience
        view = View(pool.tokens, pool.excess // self._unit, pool.kind, late, self.per_token / self._unit)
        expensive, held = self._expensive(view, ledger)
        groups = self._gathered(expensive, view)
        leading = np.concatenate([np.zeros(0, np.int64), *groups])
        held[leading] = True
        chosen = oldest(view.tokens, view.kind, view.late, ledger, self.amount, held, leading)
        builds = self._builds(groups, chosen, view)
        self._deal(chosen, builds, view)
        rows = np.concatenate([build.rows for build in builds]).astype(np.int64)
        ledger.add(view.kind[rows], view.tokens[rows])
        held[rows] = True
        rest = close(builds, np.flatnonzero(~held), view, ledger, self)
        even_out(builds, rest, view, ledger, self)
        return [np.sort(np.array(build.rows, np.int64)) for build in builds]

    def _expensive(self, view: View, ledger: Ledger) -> tuple[np.ndarray, np.ndarray]:
        """Samples whose pack would cost more than the mean, were the rest of it the cheapest quarter of all tokens.

        Returns:
            Rows of those that it would be the turn of, and a mask of these and all others like that.
        """
        held = np.zeros(len(view.tokens), bool)
        found: list[np.ndarray] = []
        if self.packs == 1:
            return np.zeros(0, np.int64), held
        spare = int(view.tokens.sum()) - 1.2 * self.amount
        while True:
            chosen = oldest(view.tokens, view.kind, view.late, ledger, self.amount, held)
            mean = int(view.cost[chosen].sum()) / self.packs
            limit = mean + self.tolerance * (self.context * view.per_token + mean)
            cheap = _cheapest(chosen, view, self.amount / 4)
            over = view.cost + cheap * (self.context - view.tokens) > limit
            more = chosen[over[chosen]]
            more = more[np.lexsort((-more, -view.cost[more]))]
            # A few at a time, because what takes their place changes the mean.
            more = more[: 1 + len(more) // 4]
            spare -= int(view.tokens[more].sum())
            if not len(more) or spare < 0:
                return np.concatenate([np.zeros(0, np.int64), *found]), held if len(more) else held | over
            held[more] = True
            found.append(more)

    def _gathered(self, expensive: np.ndarray, view: View) -> list[np.ndarray]:
        """Groups of the expensive, `alike` in each, that shall lead a pack of this step each; the others wait."""
        near = expensive[np.lexsort((expensive, view.cost[expensive]))]
        count = min(len(near), self.packs) // self.alike * self.alike
        if not count and view.late[near].any():
            # Time is up: those that come nearest join in.
            others = np.setdiff1d(np.arange(len(view.tokens)), near)
            others = others[np.lexsort((others, view.cost[others]))]
            near = np.concatenate([others[-(self.alike - len(near)) :], near])
            count = len(near)
        if not count:
            return []
        eldest, costs = int(near.argmin()), view.cost[near]
        starts = np.arange(max(0, eldest - count + 1), min(eldest, len(near) - count) + 1)
        first = int(starts[(costs[starts + count - 1] - costs[starts]).argmin()])
        return [near[i : i + self.alike] for i in range(first, first + count, self.alike)]

    def _builds(self, groups: list[np.ndarray], others: np.ndarray, view: View) -> list[Build]:
        """Packs with what leads them, and the cost that each shall have in the end."""
        tokens, cost = int(view.tokens[others].sum()), float(view.cost[others].sum())
        density, builds = cost / max(tokens, 1), []
        for number, group in enumerate(groups):
            costs, sizes = view.cost[group].tolist(), view.tokens[group].tolist()
            ends = [c + density * (self.context - size) for c, size in zip(costs, sizes, strict=True)]
            target = max(sum(ends) / len(ends), max(costs))
            for row, own, size in zip(group.tolist(), costs, sizes, strict=True):
                builds.append(Build(self.context, target, number))
                builds[-1].add(row, size, own)
                cost -= target - own
        plain = self.packs - len(builds)
        return builds + [Build(self.context, max(0.0, cost) / plain, len(groups)) for _ in range(plain)]

    def _deal(self, others: np.ndarray, builds: list[Build], view: View) -> None:
        """Deal the longest of the others to the packs; the shortest, which are not dealt, close them.

        A pack needs so much cost a token to end at its target. Expensive samples go where most is needed, cheap ones
        where least is.
        """
        if not len(others):
            return
        room, missing = (np.array([getattr(build, name) for build in builds], float) for name in ("room", "missing"))
        # What has waited longest is placed before a pack can be too full for it.
        first = others.min()
        order = others[others != first]
        order = order[np.lexsort((-order, -view.tokens[order]))]
        dealt = self.amount - room.sum() + view.tokens[first] + np.cumsum(view.tokens[order])
        order = order[: int(np.searchsorted(dealt, self.core * self.amount)) + 1]
        order, small = order[: self.singly], order[self.singly :]
        # Those that are long for a pack come first, so that they find room; then the most expensive.
        order = order[np.lexsort((order, -view.cost[order], 4 * view.tokens[order] < self.context))]
        for row in [int(first), *order.tolist()]:
            size, cost = int(view.tokens[row]), int(view.cost[row])
            apart = abs(missing / np.maximum(room, 1) - cost / size)
            place = int(np.where(room >= size, apart, np.inf).argmin())
            if room[place] >= size:
                builds[place].add(row, size, cost)
                room[place] -= size
                missing[place] -= cost
        self._deal_small(small[np.lexsort((small, -view.cost[small]))], builds, view, room, missing)

    def _deal_small(
        self, order: np.ndarray, builds: list[Build], view: View, room: np.ndarray, missing: np.ndarray
    ) -> None:
        """One sample to every pack at once, round after round: the most expensive a token where most is needed."""
        density, count = view.density, len(builds)
        for begin in range(0, len(order), count):
            rows = order[begin : begin + count]
            rows = rows[np.argsort(-density[rows], kind="stable")]
            needs = np.argsort(-missing / np.maximum(room, 1), kind="stable")
            # Where there are fewer samples than packs, those packs that have the most room.
            if len(rows) < count:
                widest = np.sort(np.argsort(-room[needs], kind="stable")[: len(rows)])
                needs = needs[widest]
            sizes, costs = view.tokens[rows], view.cost[rows]
            fits = room[needs] >= sizes
            room[needs[fits]] -= sizes[fits]
            missing[needs[fits]] -= costs[fits]
            for place, row, size, cost in zip(
                needs[fits].tolist(), rows[fits].tolist(), sizes[fits].tolist(), costs[fits].tolist(), strict=True
            ):
                builds[place].add(row, size, cost)


def oldest(
    tokens: np.ndarray,
    kind: np.ndarray,
    late: np.ndarray,
    ledger: Ledger,
    amount: int,
    without: np.ndarray,
    leading: np.ndarray | None = None,
    each: np.ndarray | None = None,
) -> np.ndarray:
    """What makes up a step: rows that have waited too long, then the oldest of the kinds that are behind.

    The turns of a kind's samples lie on the scale of its tokens so far ÷ its share; taken in this order, the kinds keep
    their shares.

    Args:
        tokens, kind, late: columns of the pool, oldest first. amount: of a step. without: mask of rows to leave.
        leading: rows that are in the step already. each: how much of the amount a row is; its tokens by default.
    """
    each = tokens if each is None else each
    leading = np.zeros(0, np.int64) if leading is None else leading
    first, rest = np.flatnonzero(late & ~without), np.flatnonzero(~late & ~without)
    emitted = ledger.emitted.copy()
    for rows in (leading, first):
        np.add.at(emitted, kind[rows], tokens[rows])
    turns = np.empty(len(rest))
    for place, share in enumerate(ledger.shares.tolist()):
        mine = kind[rest] == place
        sizes = tokens[rest[mine]]
        # In the middle of a sample, so that no kind is favoured.
        turns[mine] = (int(emitted[place]) - share * int(emitted.sum()) + np.cumsum(sizes) - sizes / 2) / share
    rows = np.concatenate([first, rest[np.argsort(turns, kind="stable")]])
    taken = int(each[leading].sum()) + np.cumsum(each[rows])
    return rows[: int(np.searchsorted(taken, amount)) + 1] if each[leading].sum() < amount else rows[:0]


def _cheapest(rows: np.ndarray, view: View, enough: float) -> float:
    """Cost a token of the cheapest of these rows that have `enough` tokens together."""
    order = rows[np.lexsort((rows, view.density[rows]))]
    count = int(np.searchsorted(np.cumsum(view.tokens[order]), enough)) + 1
    return int(view.cost[order[:count]].sum()) / max(int(view.tokens[order[:count]].sum()), 1)


class PairPacker:
    """Forms steps of single samples, the oldest of the kinds that are behind.

    Args:
        count: samples a step.
    """

    guess, samples = 1, 0

    def __init__(self, count: int) -> None:
        self.amount = count

    def units(self, tokens: np.ndarray) -> np.ndarray:
        """A step is measured in samples."""
        return tokens * 0 + 1

    def form(self, pool: Pool, ledger: Ledger, step: int) -> list[np.ndarray]:
        """See `Packer`."""
        none = np.zeros(len(pool), bool)
        each = np.ones(len(pool), np.int64)
        rows = oldest(pool.tokens, pool.kind, none, ledger, self.amount, none, each=each)
        ledger.add(pool.kind[rows], pool.tokens[rows])
        return [rows[i : i + 1] for i in range(len(rows))]
