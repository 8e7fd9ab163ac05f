"""Packer: which samples of the pool share a pack in a step.

Samples are distributed over the packs by their cost. Then an exact subset sum fills each pack, and in the end samples
are exchanged until the packs cost the same. A pool of short samples has tens of thousands of them: everything here
works on columns, and the work per pack looks at a window of a sorted column.
"""

import numpy as np

from stages.data.packing.closing import Build, View, close, even_out
from stages.data.packing.planner import TokenCounts
from stages.data.packing.samples import Pool


class BalancedPacker:
    """Forms packs of one context length that are full, cost the same, and keep the kinds' shares of the tokens.

    The oldest samples of the kinds that lack tokens make up most of a step. They are distributed over the packs, most
    expensive first. The rest of each pack is filled exactly with samples that bring its cost to that of the others.

    A sample is deferred if its pack would cost more than the others with any other content. It waits until there are
    as many such samples as packs in a round. Then each of them has a pack of its own, and these packs cost the same.

    Args:
        context: tokens of a pack.
        packs: packs a step.
        per_token: see `Cost`.
        balanced_packs: packs that must cost the same: those of a round, or more. 0: a quarter of a step.
    """

    samples = 64  # in the pool: enough for a subset sum to fill a pack
    core = 0.85  # of a step's tokens is distributed by cost; the rest fills the packs
    patience = 8  # steps that a sample is deferred at most
    choices = 48  # candidates of a subset sum by cost, and the same number by length
    tolerance = 0.02  # distance from the mean cost beyond which samples are deferred or exchanged
    exchanges = 4  # in a pack, at most
    loss = 0.01  # of a pack that may stay empty to improve its cost
    singly = 2048  # the longest samples are distributed one by one; the others in groups of one per pack

    def __init__(self, context: int, packs: int, per_token: int, balanced_packs: int = 0) -> None:
        self.context, self.packs, self.per_token = context, packs, per_token
        self.balanced_packs = balanced_packs or -(-packs // 4)
        self.amount, self.guess = context * packs, context
        self._unit = max(1, per_token >> 10)

    def units(self, tokens: np.ndarray) -> np.ndarray:
        """A step is measured in tokens."""
        return tokens

    def form(self, pool: Pool, counts: TokenCounts, step: int) -> list[np.ndarray]:
        """See `Packer`."""
        late = step - pool.born >= self.patience
        view = View(pool.tokens, pool.excess // self._unit, pool.kind, late, self.per_token / self._unit)
        expensive, excluded = self._expensive(view, counts)
        groups = self._groups(expensive, view)
        leading = np.concatenate([np.zeros(0, np.int64), *groups])
        excluded[leading] = True
        chosen = oldest(view.tokens, view.kind, view.late, counts, self.amount, excluded, leading)
        builds = self._builds(groups, chosen, view)
        self._distribute(chosen, builds, view)
        rows = np.concatenate([build.rows for build in builds]).astype(np.int64)
        counts.add(view.kind[rows], view.tokens[rows])
        excluded[rows] = True
        rest = close(builds, np.flatnonzero(~excluded), view, counts, self)
        even_out(builds, rest, view, counts, self)
        return [np.sort(np.array(build.rows, np.int64)) for build in builds]

    def _expensive(self, view: View, counts: TokenCounts) -> tuple[np.ndarray, np.ndarray]:
        """Samples whose pack costs more than the mean even with the cheapest quarter of all tokens as its rest.

        Returns:
            Rows of those whose turn it is in this step, and a mask of all such samples.
        """
        excluded = np.zeros(len(view.tokens), bool)
        found: list[np.ndarray] = []
        if self.packs == 1:
            return np.zeros(0, np.int64), excluded
        spare = int(view.tokens.sum()) - 1.2 * self.amount
        while True:
            chosen = oldest(view.tokens, view.kind, view.late, counts, self.amount, excluded)
            mean = int(view.cost[chosen].sum()) / self.packs
            limit = mean + self.tolerance * (self.context * view.per_token + mean)
            cheap = _cheapest(chosen, view, self.amount / 4)
            over = view.cost + cheap * (self.context - view.tokens) > limit
            more = chosen[over[chosen]]
            more = more[np.lexsort((-more, -view.cost[more]))]
            # A few at a time, because their replacements change the mean.
            more = more[: 1 + len(more) // 4]
            spare -= int(view.tokens[more].sum())
            if not len(more) or spare < 0:
                return np.concatenate([np.zeros(0, np.int64), *found]), excluded if len(more) else excluded | over
            excluded[more] = True
            found.append(more)

    def _groups(self, expensive: np.ndarray, view: View) -> list[np.ndarray]:
        """Groups of `balanced_packs` expensive samples, each of which leads a pack of this step; the others wait."""
        near = expensive[np.lexsort((expensive, view.cost[expensive]))]
        count = min(len(near), self.packs) // self.balanced_packs * self.balanced_packs
        if not count and view.late[near].any():
            # A sample has waited long enough: the most expensive of the others fill its group.
            others = np.setdiff1d(np.arange(len(view.tokens)), near)
            others = others[np.lexsort((others, view.cost[others]))]
            near = np.concatenate([others[-(self.balanced_packs - len(near)) :], near])
            count = len(near)
        if not count:
            return []
        eldest, costs = int(near.argmin()), view.cost[near]
        starts = np.arange(max(0, eldest - count + 1), min(eldest, len(near) - count) + 1)
        first = int(starts[(costs[starts + count - 1] - costs[starts]).argmin()])
        return [near[i : i + self.balanced_packs] for i in range(first, first + count, self.balanced_packs)]

    def _builds(self, groups: list[np.ndarray], others: np.ndarray, view: View) -> list[Build]:
        """Packs with their leading samples and the target of their cost."""
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

    def _distribute(self, others: np.ndarray, builds: list[Build], view: View) -> None:
        """Distribute the longest of the other samples over the packs; `close` takes the shortest.

        A pack needs a certain cost per token to reach its target. Expensive samples go where most is needed, cheap ones
        where least is needed.
        """
        if not len(others):
            return
        room, missing = (np.array([getattr(build, name) for build in builds], float) for name in ("room", "missing"))
        # The oldest sample is placed before a pack can be too full for it.
        first = others.min()
        order = others[others != first]
        order = order[np.lexsort((-order, -view.tokens[order]))]
        placed = self.amount - room.sum() + view.tokens[first] + np.cumsum(view.tokens[order])
        order = order[: int(np.searchsorted(placed, self.core * self.amount)) + 1]
        order, small = order[: self.singly], order[self.singly :]
        # Samples of more than a quarter of a pack come first, so that they find room; then the most expensive.
        order = order[np.lexsort((order, -view.cost[order], 4 * view.tokens[order] < self.context))]
        for row in [int(first), *order.tolist()]:
            size, cost = int(view.tokens[row]), int(view.cost[row])
            apart = abs(missing / np.maximum(room, 1) - cost / size)
            place = int(np.where(room >= size, apart, np.inf).argmin())
            if room[place] >= size:
                builds[place].add(row, size, cost)
                room[place] -= size
                missing[place] -= cost
        self._distribute_small(small[np.lexsort((small, -view.cost[small]))], builds, view, room, missing)

    def _distribute_small(
        self, order: np.ndarray, builds: list[Build], view: View, room: np.ndarray, missing: np.ndarray
    ) -> None:
        """One sample to every pack, round after round: the highest cost per token goes where most is needed."""
        density, count = view.density, len(builds)
        for begin in range(0, len(order), count):
            rows = order[begin : begin + count]
            rows = rows[np.argsort(-density[rows], kind="stable")]
            needs = np.argsort(-missing / np.maximum(room, 1), kind="stable")
            # If there are fewer samples than packs, the packs with the most room get them.
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
    counts: TokenCounts,
    amount: int,
    without: np.ndarray,
    leading: np.ndarray | None = None,
    each: np.ndarray | None = None,
) -> np.ndarray:
    """The rows of a step: late samples first, then the oldest of the kinds that lack tokens.

    Samples are taken in the order of their kind's tokens so far ÷ its share, so the kinds keep their shares.

    Args:
        tokens, kind, late: columns of the pool, oldest first.
        amount: of a step.
        without: mask of rows to skip.
        leading: rows that are in the step already.
        each: part of the amount that a row takes; its tokens by default.
    """
    each = tokens if each is None else each
    leading = np.zeros(0, np.int64) if leading is None else leading
    first, rest = np.flatnonzero(late & ~without), np.flatnonzero(~late & ~without)
    emitted = counts.emitted.copy()
    for rows in (leading, first):
        np.add.at(emitted, kind[rows], tokens[rows])
    turns = np.empty(len(rest))
    for place, share in enumerate(counts.shares.tolist()):
        mine = kind[rest] == place
        sizes = tokens[rest[mine]]
        # The middle of a sample, so that no kind has an advantage.
        turns[mine] = (int(emitted[place]) - share * int(emitted.sum()) + np.cumsum(sizes) - sizes / 2) / share
    rows = np.concatenate([first, rest[np.argsort(turns, kind="stable")]])
    taken = int(each[leading].sum()) + np.cumsum(each[rows])
    return rows[: int(np.searchsorted(taken, amount)) + 1] if each[leading].sum() < amount else rows[:0]


def _cheapest(rows: np.ndarray, view: View, enough: float) -> float:
    """Cost per token of the cheapest of these rows that have `enough` tokens together."""
    order = rows[np.lexsort((rows, view.density[rows]))]
    count = int(np.searchsorted(np.cumsum(view.tokens[order]), enough)) + 1
    return int(view.cost[order[:count]].sum()) / max(int(view.tokens[order[:count]].sum()), 1)


class PairPacker:
    """Forms steps of single samples, the oldest of the kinds that lack tokens.

    Args:
        count: samples a step.
    """

    guess, samples = 1, 0

    def __init__(self, count: int) -> None:
        self.amount = count

    def units(self, tokens: np.ndarray) -> np.ndarray:
        """A step is measured in samples."""
        return tokens * 0 + 1

    def form(self, pool: Pool, counts: TokenCounts, step: int) -> list[np.ndarray]:
        """See `Packer`."""
        none = np.zeros(len(pool), bool)
        each = np.ones(len(pool), np.int64)
        rows = oldest(pool.tokens, pool.kind, none, counts, self.amount, none, each=each)
        counts.add(pool.kind[rows], pool.tokens[rows])
        return [rows[i : i + 1] for i in range(len(rows))]
