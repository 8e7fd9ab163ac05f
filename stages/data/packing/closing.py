"""Closing: nearly full packs are filled exactly, then exchange samples until they cost the same."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from stages.data.packing.planner import TokenCounts

WINDOW = 96  # rows on either side of a place in a sorted column that are examined first
NEIGHBOURS = 8  # rows on either side that an exchange chooses from


@dataclass(frozen=True)
class View:
    """The columns of the pool that decide on the packs. Costs are integers, so their sums are equal on every machine.

    cost: excess int64 `[N]` in units of about a thousandth of a token's cost. late: bool `[N]`, has waited long enough.
    per_token: cost of a token without excess, in the same units.
    """

    tokens: np.ndarray
    cost: np.ndarray
    kind: np.ndarray
    late: np.ndarray
    per_token: float

    @property
    def density(self) -> np.ndarray:
        """Cost per token, float64 `[N]`."""
        return self.cost / self.tokens


class Rules(Protocol):
    """See the constants of `stages.data.packing.packer.BalancedPacker`."""

    context: int
    choices: int
    tolerance: float
    exchanges: int
    loss: float


class Build:
    """A pack under construction. rows: of the pool. target: the final cost of all packs of its group."""

    def __init__(self, room: int, target: float, group: int) -> None:
        self.rows: list[int] = []
        self.room, self.cost, self.target, self.group = room, 0, target, group

    @property
    def missing(self) -> float:
        """Cost to the target."""
        return self.target - self.cost

    def add(self, row: int, tokens: int, cost: int) -> None:
        self.rows.append(row)
        self.room -= tokens
        self.cost += cost


def fill(room: int, sizes: list[int]) -> list[int]:
    """Indices of the sizes with the largest sum that is at most `room`: an exact subset sum.

    Bit s of a Python integer is set if the sum s can be reached; each size is one shift. Of equal sums, the one of
    earlier sizes is taken.
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


def close(builds: list[Build], rest: np.ndarray, view: View, counts: TokenCounts, rules: Rules) -> np.ndarray:
    """Fill each pack from the rows `rest`, the emptiest pack first; returns the rows that remain."""
    candidates = _Candidates(rest, view, rules.choices)
    open_room = sum(build.room for build in builds)
    for build in sorted(builds, key=lambda build: -build.room):
        density = build.missing / max(build.room, 1)
        lacking = counts.owed(open_room) > 0
        found = np.zeros(0, np.int64)
        for kinds in (lacking, None):
            near = candidates.find(kinds, density, build.room)
            sizes = view.tokens[near].tolist()
            tried = near[fill(build.room, sizes)]
            if view.tokens[tried].sum() > view.tokens[found].sum():
                found = tried
            if build.room - view.tokens[found].sum() <= 0.005 * rules.context:
                break
        open_room -= int(view.tokens[found].sum())
        for row, size, cost in zip(found.tolist(), view.tokens[found].tolist(), view.cost[found].tolist(), strict=True):
            build.add(row, size, cost)
        counts.add(view.kind[found], view.tokens[found])
        candidates.there[found] = False
    return rest[candidates.there[rest]]


class _Candidates:
    """Rows that may fill a pack, by cost per token and by length. there: bool over the pool, still available."""

    def __init__(self, rest: np.ndarray, view: View, choices: int) -> None:
        self.view, self.choices = view, choices
        density = view.cost[rest] / view.tokens[rest]
        order = np.lexsort((rest, density))
        self.by_density, self.density = rest[order], density[order]
        self.by_length = rest[np.lexsort((rest, view.tokens[rest]))]
        self.there = np.zeros(len(view.tokens), bool)
        self.there[rest] = True
        self.begin = 0  # no row before this place in `by_length` is available

    def find(self, kinds: np.ndarray | None, density: float, room: int) -> np.ndarray:
        """Rows of about the cost per token that a pack needs, nearest first, then short rows to fill the remainder.

        Args:
            kinds: mask of the kinds that may be taken; None for all.
            density: cost per token that the pack needs.
            room: tokens that fit in it.
        """
        place, width = int(np.searchsorted(self.density, density)), WINDOW
        while True:
            low, high = max(0, place - width), place + width
            rows = self.by_density[low:high]
            fits = self._fits(rows, kinds, room)
            rows, apart = rows[fits], abs(self.density[low:high][fits] - density)
            near = rows[np.lexsort((rows, apart))]
            filled = np.cumsum(self.view.tokens[near])
            count = max(self.choices, int(np.searchsorted(filled, 2 * room)) + 1)
            if count <= len(near) or (low == 0 and high >= len(self.by_density)):
                break
            width *= 2
        near = near[:count]
        return np.concatenate([near, self._short(near, kinds, room)])

    def _short(self, near: np.ndarray, kinds: np.ndarray | None, room: int) -> np.ndarray:
        while self.begin < len(self.by_length) and not self.there[self.by_length[self.begin]]:
            self.begin += 1
        width = 4 * self.choices
        while True:
            rows = self.by_length[self.begin : self.begin + width]
            rows = rows[self._fits(rows, kinds, room)]
            rows = rows[~np.isin(rows, near)]
            if len(rows) >= self.choices or self.begin + width >= len(self.by_length):
                return rows[: self.choices]
            width *= 2

    def _fits(self, rows: np.ndarray, kinds: np.ndarray | None, room: int) -> np.ndarray:
        fits = self.there[rows] & (self.view.tokens[rows] <= room)
        return fits if kinds is None else fits & kinds[self.view.kind[rows]]


def even_out(builds: list[Build], rest: np.ndarray, view: View, counts: TokenCounts, rules: Rules) -> None:
    """Exchange samples for others of the same kind and nearly the same length from `rest`, if that evens the costs.

    Late samples stay where they are.
    """
    if not len(rest) or len(builds) == 1:
        return
    for group in {build.group for build in builds}:
        members = [build for build in builds if build.group == group]
        for build in members:
            build.target = sum(b.cost for b in members) / len(members)
    for _ in range(rules.exchanges):
        off = [b for b in builds if abs(b.missing) > rules.tolerance / 2 * (rules.context * view.per_token + b.target)]
        exchange = _Exchange(rest, view, int(rules.loss * rules.context))
        pairs = [pair for build in off if (pair := exchange.improve(build)) is not None]
        if not pairs:
            return
        out, into = np.array(pairs).T
        counts.add(view.kind[out], -view.tokens[out])
        counts.add(view.kind[into], view.tokens[into])
        rest = np.sort(np.concatenate([rest[exchange.there[rest]], out]))


class _Exchange:
    """Finds for a sample of a pack another of its kind that fits and leaves less than `width` tokens empty.

    The rest is sorted by kind, by length in buckets of `width`, and by cost in each bucket.
    """

    def __init__(self, rest: np.ndarray, view: View, width: int) -> None:
        self.view, self.width = view, max(1, width)
        self.buckets = int(view.tokens.max()) // self.width + 3
        self.costs = np.sort(view.cost[rest])
        keys = self._keys(view.kind[rest], view.tokens[rest], view.cost[rest])
        order = np.argsort(keys, kind="stable")
        self.keys, self.rows = keys[order], rest[order]
        self.there = np.zeros(len(view.tokens), bool)
        self.there[rest] = True

    def _keys(self, kind: np.ndarray, tokens: np.ndarray, cost: np.ndarray) -> np.ndarray:
        bucket = kind.astype(np.int64) * self.buckets + np.clip(tokens // self.width, 0, self.buckets - 1)
        return bucket * (len(self.costs) + 1) + np.searchsorted(self.costs, cost)

    def improve(self, build: Build) -> tuple[int, int] | None:
        """Make the exchange that brings a pack nearest to its target; (row out, row in), None if none improves it."""
        gap = -build.missing
        outs = np.array(build.rows, np.int64)
        outs = outs[~self.view.late[outs]]
        if not len(outs):
            return None
        kind, most = self.view.kind[outs], self.view.tokens[outs] + build.room
        wanted = np.floor(self.view.cost[outs] - gap)
        least = np.maximum(1, most - self.width)
        places = np.concatenate([np.searchsorted(self.keys, self._keys(kind, size, wanted)) for size in (least, most)])
        near = places[:, None] + np.arange(-NEIGHBOURS, NEIGHBOURS)
        rows = self.rows[np.clip(near, 0, len(self.rows) - 1)]
        which = np.concatenate([np.arange(len(outs))] * 2)[:, None]
        size = self.view.tokens[rows]
        fits = self.there[rows] & (self.view.kind[rows] == kind[which])
        fits &= (size >= least[which]) & (size <= most[which])
        missed = np.where(fits, abs(gap - self.view.cost[outs][which] + self.view.cost[rows]), np.inf)
        best = int(missed.argmin())
        if missed.flat[best] >= abs(gap):
            return None
        out, into = int(outs[which.flat[best // missed.shape[1]]]), int(rows.flat[best])
        build.rows.remove(out)
        build.add(out, -int(self.view.tokens[out]), -int(self.view.cost[out]))
        build.rows.pop()
        build.add(into, int(self.view.tokens[into]), int(self.view.cost[into]))
        self.there[into] = False
        return out, into
