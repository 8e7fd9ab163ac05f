"""The policy `ladder`: the size of each frame follows what it adds, and frames that add nothing are not shown.

The information of a frame at a size is its novelty times the share of its detail that the size keeps. Novelty is one
minus the similarity with what is shown already; detail is measured on the frame's pixels (`detail.py`). The sizes that
keep the most information within the budget are found on the convex hull of the options (`rate_distortion.py`).
"""

import math
from dataclasses import dataclass, field

import torch

from keye.slowfast.budget import pooled_size, size_tokens
from keye.slowfast.measures.base import Measure
from keye.slowfast.policies.base import FAST, SLOW, Decisions, Limits, Policy, check, is_fraction
from keye.slowfast.policies.detail import kept_detail, octave_energies, octaves_between
from keye.slowfast.policies.rate_distortion import best_levels, hull, slope

Size = tuple[int, int]
STEP = math.sqrt(2)  # tokens of a size over those of the next smaller one
PACE = 30.0  # how fast the price rises with what was spent ahead of the pace
"""At 1 / PACE of the budget ahead, the price of a token is e times as high."""


@dataclass(frozen=True)
class Ladder(Policy):
    """Sizes that keep the most information within the budget, "not shown" among them.

    price: least information per token, so that clips without change cost little where the budget is large. At 0.0002,
    720p frames of an animated film get their full size (720 tokens) from a novelty of about 0.4 on, about 100 tokens at
    0.1 and 6 tokens at 0.015.

    Frames at `min_tokens_per_frame` or more are slow, and later frames are compared with the latest of them. Frames
    below are fast: they have at most the tokens of the smallest slow frame over `slow_multiple`.

    What a frame adds depends on which frames are shown before it, and these on the budget. A plan takes as shown what
    an ample budget would show: novelty is against the latest frame that was less similar than `threshold` to the one
    before (the rule of `adaptive`), and against the latest frame worth its price since then. The budget is then
    distributed over all frames exactly. A stream decides at once, with a price that follows the tokens spent so far,
    and novelty is against what was shown. Both keep two frames in memory (`LadderWalk`).
    """

    name = "ladder"
    online = False
    walks = True

    threshold: float
    price: float = 2e-4

    def __post_init__(self) -> None:
        check(self, "threshold", is_fraction(self.threshold), "a similarity from 0 to 1")
        right = isinstance(self.price, int | float) and not isinstance(self.price, bool) and 0 < self.price < 1
        check(self, "price", right, "a number above 0 and below 1")

    def walk(self, measure: Measure, limits: Limits, frames: int, *, remember: bool = True) -> "LadderWalk":
        """A pass over a clip or stream of about `frames` frames."""
        return LadderWalk(self, measure, limits, frames, remember)


@dataclass(frozen=True)
class Steps:
    """The sizes of a clip's frames by ascending tokens; those from `slow` on are of slow frames."""

    sizes: tuple[Size, ...]
    tokens: tuple[int, ...]
    octaves: tuple[float, ...]
    slow: int
    full: Size

    @classmethod
    def of(cls, limits: Limits) -> "Steps":
        """Sizes in steps of about the square root of 2, from the smallest fast to the largest slow frame."""
        full, smallest = limits.full_size, limits.least_slow_size
        least, most = size_tokens(smallest, limits.side), min(size_tokens(full, limits.side), limits.max_tokens)
        slow = {least: smallest, **_between(limits, least, most)}
        if size_tokens(full, limits.side) == most:
            slow[most] = full
        limit = min(limits.fast_tokens(limits.least_slow_tokens), least - 1)
        fast = {}
        if limit >= 1:
            smallest = limits.least_fast_size(limit)
            tokens = size_tokens(smallest, limits.side)
            fast = {tokens: smallest, **_between(limits, tokens, limit)}
        by_tokens = {**fast, **slow}
        tokens = sorted(by_tokens)
        sizes = tuple(by_tokens[count] for count in tokens)
        return cls(sizes, tuple(tokens), tuple(octaves_between(size, full) for size in sizes), len(fast), full)


def _between(limits: Limits, least: int, most: int) -> dict[int, Size]:
    """Sizes of more than `least` to `most` tokens in steps of `STEP`, by their tokens."""
    found, wanted = {}, least * STEP
    while wanted < most * STEP:
        size = pooled_size(*limits.size, min(int(wanted), most), limits.side)
        if size_tokens(size, limits.side) > least:
            found[size_tokens(size, limits.side)] = size
        wanted *= STEP
    return found


@dataclass
class LadderWalk:
    """One pass in the memory of two frames: what each frame adds, and its size.

    remember: for a plan. It keeps what `finish` needs (about 20 numbers a frame), and sizes follow the price alone.
    Otherwise for a stream: what was spent is compared with an even pace of the budget over `frames` frames, and ahead
    of it the price of a token rises exponentially. The total of the first `frames` frames never exceeds the budget;
    after them the budget grows at the same pace.
    """

    policy: Ladder
    measure: Measure
    limits: Limits
    frames: int
    remember: bool = True
    spent: int = 0
    index: int = 0
    novelty: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    details: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.steps = Steps.of(self.limits)
        self._reference = _Reference(self.measure)
        self._glimpse = _Reference(self.measure)  # the latest frame shown since the reference, if there is one
        self._glimpsed = 0.0  # the share of its detail that was shown

    def step(self, frames: torch.Tensor) -> tuple[list[int], list[float], list[Size | None]]:
        """The next frames uint8 [T, 3, H, W]: types, similarities with the reference, and sizes.

        The size of a frame that is not shown is None.
        """
        features = self.measure.prepare(frames)
        details = kept_detail(octave_energies(frames, self.steps.full), self.steps.octaves).tolist()
        self._reference.begin(features)
        self._glimpse.begin(features)
        types, scores, sizes = [], [], []
        for place, kept in enumerate(details):
            score, novelty = self._judge(place)
            level = self._level(novelty, kept)
            self._show(place, level, kept, score)
            types.append(SLOW if level >= self.steps.slow else FAST)
            scores.append(score)
            sizes.append(None if level < 0 else self.steps.sizes[level])
            if self.remember:
                self.novelty.append(novelty)
                self.scores.append(score)
                self.details.append(kept)
        return types, scores, sizes

    def finish(self) -> Decisions:
        """The decisions about all frames: the novelties of this pass, and the sizes that keep the most of them."""
        information = [
            [novelty * share for share in kept] for novelty, kept in zip(self.novelty, self.details, strict=True)
        ]
        budget, steps = self.limits.max_tokens, self.steps
        most = max(1, budget // self.limits.min_tokens)
        options = {"price": self.policy.price, "first": steps.slow}
        levels = best_levels(steps.tokens, information, budget, most=most, **options)
        shown = [frame for frame, level in enumerate(levels) if level >= 0]
        used = sorted({levels[frame] for frame in shown})
        free = best_levels(steps.tokens, information, 1 << 62, **options)
        warnings = [] if free == levels else [self._given_up(free, len(shown))]
        return Decisions(
            [SLOW if levels[frame] >= steps.slow else FAST for frame in shown],
            [self.scores[frame] for frame in shown],
            shown,
            warnings,
            sizes=tuple(steps.sizes[level] for level in used),
            levels=[used.index(levels[frame]) for frame in shown],
        )

    def _given_up(self, free: list[int], shown: int) -> str:
        """What is given up of the sizes that the price alone would give."""
        wanted = [level for level in free if level >= 0]
        tokens = sum(self.steps.tokens[level] for level in wanted)
        left = (
            f"{len(wanted) - shown} of {len(wanted)} frames are left out and others"
            if len(wanted) > shown
            else "frames"
        )
        return (
            f"the budget of {self.limits.max_tokens} tokens does not hold the {tokens} of price={self.policy.price:g}:"
            f" {left} have fewer tokens, where that loses least"
        )

    def _judge(self, place: int) -> tuple[float, float]:
        """(similarity with the reference, novelty) of a frame of the batch.

        Of a frame shown since the reference, the share of its detail that was shown is not new again.
        """
        if not self._reference.exists:
            return math.nan, 1.0
        score = self._reference.score(place)
        novelty = 1 - score
        if self._glimpse.exists and self._glimpsed > 0:
            since = min(novelty, 1 - self._glimpse.score(place))
            novelty = (1 - self._glimpsed) * novelty + self._glimpsed * since
        return score, novelty

    def _level(self, novelty: float, kept: list[float]) -> int:
        """The largest size whose last step is worth its price, as far as the budget holds it; -1 for none."""
        tokens, price, left = self.steps.tokens, self.policy.price, math.inf
        if not self.remember:
            budget, pace = self.limits.max_tokens, self.limits.max_tokens / self.frames
            ahead = (self.spent - pace * self.index) / budget
            price *= math.exp(min(PACE * max(0.0, ahead), 500.0))
            left = budget + pace * max(0, self.index + 1 - self.frames) - self.spent
        level, chain = self.steps.slow if not self._reference.exists else -1, []
        for place in hull(tokens, kept):
            if novelty * slope(tokens, kept, chain, place) < price or tokens[place] > left:
                break
            level = max(level, place)
            chain.append(place)
        return level

    def _show(self, place: int, level: int, kept: list[float], score: float) -> None:
        self.index += 1
        self.spent += self.steps.tokens[level] if level >= 0 else 0
        moves = not score >= self.policy.threshold if self.remember else level >= self.steps.slow
        if moves:
            self._reference.set(place)
            self._glimpse.clear()
        elif level >= 0:
            self._glimpse.set(place)
            self._glimpsed = kept[level]


class _Reference:
    """A frame that others are compared with; the longer it lasts, the more frames are compared in one call."""

    def __init__(self, measure: Measure):
        self._measure = measure
        self._features: torch.Tensor | None = None
        self._feature: torch.Tensor | None = None
        self._first, self._scores, self._lasted = 0, [], 0

    @property
    def exists(self) -> bool:
        return self._feature is not None

    def begin(self, features: torch.Tensor) -> None:
        """A new batch of features [T, ...]."""
        self._features, self._first, self._scores = features, 0, []

    def set(self, place: int) -> None:
        """The frame at `place` of the batch becomes the reference."""
        self._feature = self._features[place].clone()  # not a view, so that its batch is freed
        self._first, self._scores, self._lasted = place + 1, [], 0

    def clear(self) -> None:
        self._feature = None

    def score(self, place: int) -> float:
        """The similarity of the frame at `place`, which never falls within a batch."""
        if not self._first <= place < self._first + len(self._scores):
            self._first = place
            ahead = self._features[place : place + self._lasted + 1]
            self._scores = self._measure.compare(self._feature, ahead).tolist()
        self._lasted += 1
        return self._scores[place - self._first]
