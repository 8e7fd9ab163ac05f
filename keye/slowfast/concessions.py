"""What a video gives up where its budget binds, so that slow frames keep a multiple of a fast frame's tokens.

In this order, each step only as far as needed:

1. Fast frames shrink, to about `LEAST_FAST` tokens; slow frames keep their full size.
2. Fast frames are left out, until as many fast as slow frames are shown.
3. Slow frames shrink, to `min_tokens`; where not all slow frames fit at this size, to `multiple` times `LEAST_FAST`.
4. Slow frames become fast frames, or are left out.

The frames most similar to the latest slow frame are given up first, since they add least; under a policy that does not
rank frames they are given up evenly. At most as many frames are shown as fit at `min_tokens`, because each costs about
nine more tokens of text, or all slow frames.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from keye.slowfast.budget import LEAST_FAST, Allocation, best_size, box, fast_limit, size_tokens, thin
from keye.slowfast.policies.base import FAST, SLOW, Decisions, Limits, Policy

_UNBOUND = 1 << 62
Size = tuple[int, int]


def concede(decided: Decisions, limits: Limits, policy: Policy) -> tuple[Decisions, Allocation]:
    """The frames that are shown and their sizes; where the budget does not bind, all frames at their full sizes.

    Args:
        decided: the policy's decisions about one frame or more.
        limits: with `multiple`. Without it (0) all frames are shown, at the sizes of `Limits.allocate`.

    Returns:
        (decisions about the frames that are shown, with a warning that says what was given up; their sizes)
    """
    slow = decided.types.count(SLOW)
    fast = len(decided.types) - slow
    if decided.levels is not None:
        return decided, _of_levels(decided, limits)
    if not limits.multiple:
        fixed = policy.fast_tokens
        return decided, limits.allocate(slow, fast, fast_tokens=fixed, max_tokens=decided.max_tokens)
    limits = limits if decided.max_tokens is None else replace(limits, max_tokens=decided.max_tokens)
    budget = limits.max_tokens
    free = limits.allocate(slow, fast, fast_tokens=policy.fast_tokens, max_tokens=_UNBOUND)
    most = budget // limits.min_tokens
    if policy.ranks and slow > most:
        lower = replace(limits, min_tokens=smallest_slow_tokens(limits.min_tokens, limits.multiple))
        # With the tokens of a size of about the clip's aspect, so that a narrow range cannot distort the frames.
        limits = replace(lower, min_tokens=size_tokens(lower.least_slow_size, limits.side))
        most = min(slow, budget // limits.min_tokens)
    most = most if policy.ranks else slow + fast
    if free.tokens <= budget and slow + fast <= most:
        return decided, free
    binding = _Binding(limits, slow, fast, most, free)
    kept, shown, slow_size, fast_size = binding.solve()
    entries = _kept_entries(decided, kept, shown, policy.ranks)
    tokens = kept * size_tokens(slow_size, limits.side) + shown * size_tokens(fast_size, limits.side)
    conceded = replace(
        decided,
        types=list(entries.values()),
        scores=[decided.scores[entry] for entry in entries],
        positions=[decided.positions[entry] for entry in entries],
        warnings=[*decided.warnings, binding.given_up(kept, shown, slow_size, fast_size, policy.ranks)],
    )
    return conceded, Allocation(slow_size, fast_size, tokens)


def smallest_slow_tokens(min_tokens: int, multiple: float) -> int:
    """Fewest tokens of a slow frame before one is given up: `multiple` times the smallest fast frame's."""
    return min(min_tokens, math.ceil(LEAST_FAST * multiple))


def concession_bounds(limits: Limits, slow: int) -> tuple[Size, Size]:
    """Upper bounds (height, width) of slow and of fast frames if at least `slow` (1 or more) frames are slow.

    For keeping frames before all types are known.
    """
    full, least = size_tokens(limits.full_size, limits.side), limits.least_slow_tokens
    slow_tokens = min(full, max(limits.max_tokens // slow, 2 * least))
    fast_tokens = fast_limit(full, limits.ratio, limits.min_tokens)
    if slow * full > limits.max_tokens:  # the budget binds
        fast_tokens = min(fast_tokens, limits.fast_tokens(slow_tokens))
    least = min(limits.min_tokens, least)
    slow_box = box(*limits.size, slow_tokens, min(least, slow_tokens), limits.side)
    fast_boxes = [box(*limits.size, fast_tokens, lowest, limits.side) for lowest in {1, min(least, fast_tokens)}]
    return slow_box, (max(height for height, _ in fast_boxes), max(width for _, width in fast_boxes))


def _of_levels(decided: Decisions, limits: Limits) -> Allocation:
    """The largest sizes of slow and of fast frames, where the policy sets sizes, and the tokens of all frames."""
    tokens = [size_tokens(size, limits.side) for size in decided.sizes]
    largest = {SLOW: -1, FAST: -1}
    for kind, level in zip(decided.types, decided.levels, strict=True):
        largest[kind] = max(largest[kind], level, key=lambda place: tokens[place] if place >= 0 else 0)
    slow_size, fast_size = (decided.sizes[largest[kind]] if largest[kind] >= 0 else None for kind in (SLOW, FAST))
    total = sum(tokens[level] for level in decided.levels)
    return Allocation(slow_size or limits.full_size, fast_size or limits.least_fast_size(), total)


@dataclass(frozen=True)
class _Binding:
    """A budget that does not hold all frames. most: number of frames that may be shown; free: the full sizes."""

    limits: Limits
    slow: int
    fast: int
    most: int
    free: Allocation

    def solve(self) -> tuple[int, int, Size, Size]:
        """(slow frames, fast frames, size of slow frames, size of fast frames) that are shown."""
        limits, budget = self.limits, self.limits.max_tokens
        full, floor, least = self._tokens(self.free.slow_size), limits.least_slow_tokens, self._tokens(self._least_fast)
        even = min(self.slow, self.fast, max(self.most - self.slow, 0))  # fast frames that stay in any case
        if self.slow <= self.most and self.slow * full + even * least <= budget:
            return self._with_fast(self.slow, self.free.slow_size)
        if not self.fast and self.slow * limits.min_tokens <= budget:
            return self.slow, 0, limits.allocate(self.slow, 0).slow_size, self._least_fast
        if self.slow <= self.most and self.slow * floor + even * least <= budget:
            room = min(full, (budget - even * least) // self.slow)
            return self._with_fast(self.slow, best_size(*limits.size, floor, room, limits.side))
        # Of a small picture the smallest size with the least tokens can exceed the full size, which has another aspect.
        size = min(limits.least_slow_size, self.free.slow_size, key=self._tokens)
        tokens = self._tokens(size)
        kept = budget // (tokens + least)
        if kept > self.most - kept:
            kept = min(self.most, (budget - self.most * least) // (tokens - least))
        return self._with_fast(max(1, min(kept, self.slow)), size)

    def _with_fast(self, slow: int, size: Size) -> tuple[int, int, Size, Size]:
        """`slow` frames of a size, and the fast frames that the rest of the budget holds."""
        limits, tokens, least = self.limits, self._tokens(size), self._tokens(self._least_fast)
        rest = limits.max_tokens - slow * tokens
        shown = min(self.slow + self.fast - slow, self.most - slow, rest // least)
        room = min(self._tokens(self.free.fast_size), limits.fast_tokens(tokens), rest // max(shown, 1))
        if not shown or room <= least:
            return slow, shown, size, self._least_fast
        return slow, shown, size, best_size(*limits.size, least, room, limits.side)

    @property
    def _least_fast(self) -> Size:
        return self.limits.least_fast_size(self._tokens(self.free.fast_size))

    def _tokens(self, size: Size) -> int:
        return size_tokens(size, self.limits.side)

    def given_up(self, kept: int, shown: int, slow_size: Size, fast_size: Size, ranks: bool) -> str:
        """The sentence that says what was given up."""
        full, fast_full = self._tokens(self.free.slow_size), self._tokens(self.free.fast_size)
        first = "the most similar first" if ranks else "evenly"
        wanted = [f"{self.slow} slow frames of {full} tokens"] if self.slow else []
        wanted += [f"{self.fast} fast frames of {fast_full}"] if self.fast else []
        parts = []
        if shown and self._tokens(fast_size) < fast_full:
            parts.append(f"fast frames have {self._tokens(fast_size)} tokens")
        if self._tokens(slow_size) < full:
            parts.append(f"slow frames have {self._tokens(slow_size)} tokens")
        if kept < self.slow:
            order = "the least similar first" if ranks else "spread evenly"
            parts.append(f"{kept} of {self.slow} slow frames stay slow, {order}")
        if left := self.slow + self.fast - kept - shown:
            parts.append(f"{left} frames are left out, {first}")
        return f"the budget of {self.limits.max_tokens} tokens does not hold {' and '.join(wanted)}: {'; '.join(parts)}"


def _kept_entries(decided: Decisions, slow: int, fast: int, ranks: bool) -> dict[int, int]:
    """The entries that are shown, ascending, and their types."""
    kinds = {SLOW: [], FAST: []}
    for entry, kind in enumerate(decided.types):
        kinds[kind].append(entry)
    kept = set(_first(kinds[SLOW], slow, decided.scores, ranks))
    twice = {decided.positions[entry] for entry in kinds[FAST]}  # two_stream has a frame in both sizes
    others = [entry for entry in kinds[SLOW] if entry not in kept and decided.positions[entry] not in twice]
    others = sorted([*others, *kinds[FAST]])
    kept_fast = _first(others, fast, decided.scores, ranks)
    return dict(sorted({**dict.fromkeys(kept, SLOW), **dict.fromkeys(kept_fast, FAST)}.items()))


def _first(entries: Sequence[int], count: int, scores: Sequence[float], ranks: bool) -> list[int]:
    """At most `count` of the entries: the least similar, evenly among equal ones, or all evenly."""
    if count >= len(entries) or not ranks:
        return [entries[place] for place in thin(len(entries), count)]
    if count < 1:
        return []
    score = {entry: -1.0 if math.isnan(scores[entry]) else scores[entry] for entry in entries}
    last = sorted(score.values())[count - 1]
    sure = [entry for entry in entries if score[entry] < last]
    equal = [entry for entry in entries if score[entry] == last]
    return [*sure, *(equal[place] for place in thin(len(equal), count - len(sure)))]
