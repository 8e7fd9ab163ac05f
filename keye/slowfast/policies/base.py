"""The base class of policies, and their input and output.

A policy is a frozen dataclass: its fields are its options, and `get_policy` builds it from the text `spec`. Your own
policy derives from `Policy` and defines `spec` and `is_slow`.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import ClassVar, NamedTuple

import torch

from keye.errors import KeyeError
from keye.slowfast.budget import (
    LEAST_FAST,
    SIDE,
    Allocation,
    allocate,
    bounds,
    fit_size,
    most_frames,
    size_tokens,
    smallest_size,
)
from keye.slowfast.measures.base import Measure

SLOW, FAST = 0, 1


class FrameContext(NamedTuple):
    """The input of a policy's decision about one frame.

    index: position among the sampled frames, 1 or more (the first frame is always slow). similarity: in [0, 1], with
    the latest slow frame. gap: how many frames ago that was, 1 or more. peak_similarity: the highest similarity since
    then, including the slow frame's own when it became slow, excluding this frame's; 1 after the first frame.
    previous: similarity with the frame before; NaN unless the policy's `looks_back` is true.
    """

    index: int
    similarity: float
    gap: int
    peak_similarity: float
    previous: float


@dataclass(frozen=True)
class Limits:
    """The limits of the sizes of a clip's frames; see `keye.slowfast.budget.allocate`.

    size: (height, width) of the clip in pixels. ratio: tokens of a fast frame over those of a slow one.
    min_tokens, max_tokens_per_frame: of one frame. max_tokens: of the video. side: pixels along a token. multiple:
    tokens of a slow frame over those of a fast one where the budget binds, at least; 0 for no such rule (see
    `keye.slowfast.concessions`).
    """

    size: tuple[int, int]
    ratio: float
    min_tokens: int
    max_tokens_per_frame: int
    max_tokens: int
    side: int = SIDE
    multiple: float = 0.0

    def allocate(
        self, slow: int, fast: int, *, fast_tokens: int | None = None, max_tokens: int | None = None
    ) -> Allocation:
        """The sizes of `slow` and `fast` frames; max_tokens: a budget other than the video's own."""
        limits = self if max_tokens is None else replace(self, max_tokens=max_tokens)
        return allocate(*self.size, slow, fast, fast_tokens=fast_tokens, **limits._options)

    def bounds(self, slow: int, frames: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Upper bounds (height, width) of slow and of fast frames if at least `slow` of `frames` are slow."""
        return bounds(*self.size, slow, frames, **self._options)

    @property
    def full_size(self) -> tuple[int, int]:
        """(height, width) of a slow frame where the budget does not bind."""
        return fit_size(*self.size, self.min_tokens, self.max_tokens_per_frame, self.side)

    @property
    def least_slow_tokens(self) -> int:
        """Fewest tokens of a slow frame: `min_tokens`, or `multiple` where that is more."""
        full = size_tokens(self.full_size, self.side)
        return min(full, max(self.min_tokens, math.ceil(self.multiple)), self.max_tokens)

    @property
    def least_slow_size(self) -> tuple[int, int]:
        """The size of about `least_slow_tokens`, with more where the aspect ratio gains by it."""
        least, full = self.least_slow_tokens, size_tokens(self.full_size, self.side)
        return smallest_size(*self.size, least, min(full, 2 * least, self.max_tokens), self.side)

    def fast_tokens(self, slow_tokens: int) -> int:
        """Most tokens of a fast frame beside slow ones of `slow_tokens`, by `multiple`; 1 or more."""
        return max(1, int(slow_tokens / self.multiple)) if self.multiple else slow_tokens

    def least_fast_size(self, most: int | None = None) -> tuple[int, int]:
        """The smallest size of fast frames, of `LEAST_FAST` to twice as many tokens and at most `most`."""
        limit = self.fast_tokens(self.least_slow_tokens)
        limit = limit if most is None else min(limit, most)
        least = min(LEAST_FAST, self.min_tokens, limit)
        return fit_size(*self.size, least, min(2 * least, limit), self.side)

    @property
    def _options(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if name not in ("size", "multiple")}


@dataclass(frozen=True)
class Decisions:
    """The decisions of a policy about a clip, entry by entry in the order in which the model reads them.

    types: SLOW or FAST. scores: similarity with the latest slow entry before, NaN for the first. positions: which
    sampled frame an entry shows, ascending. warnings: sentences about what differs from the request. threshold: the one
    that adaptive_budget found. max_tokens: the budget, where the policy sets one below the video's. levels: the place
    of each entry's size in `sizes`, where the policy sets sizes.
    """

    types: list[int]
    scores: list[float]
    positions: list[int]
    warnings: list[str] = field(default_factory=list)
    threshold: float | None = None
    max_tokens: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    levels: list[int] | None = None


class Policy:
    """Base class of policies, which decide which frames are slow.

    online: it decides frame by frame (`is_slow`); otherwise it needs all frames of a clip (`decide`). walks: it goes
    over the frames in a pass of its own, which also sets sizes (`keye.slowfast.policies.ladder`). looks_back: it uses
    `FrameContext.previous`, which takes one more comparison per frame. fast_tokens: a fixed size of fast frames.
    ranks: where not all frames fit, those that are least similar to the latest slow frame are kept; otherwise frames
    are kept evenly.
    """

    name: ClassVar[str]
    value: ClassVar[str | None] = None  # the option that a value without a key sets
    online: ClassVar[bool] = True
    walks: ClassVar[bool] = False
    looks_back: ClassVar[bool] = False
    fast_tokens: ClassVar[int | None] = None
    ranks: ClassVar[bool] = True

    @property
    def spec(self) -> str:
        """Name and options as text: the option `value` always, others where they differ from their default."""
        if self.value is not None:
            return f"{self.name}:{getattr(self, self.value)}"
        shown = [
            f"{option.name}={getattr(self, option.name)}"
            for option in fields(self)
            if option.default is not MISSING and getattr(self, option.name) != option.default
        ]
        return self.name + (":" + ",".join(shown) if shown else "")

    def is_slow(self, seen: FrameContext) -> bool:
        """Whether a frame after the first is slow; called where `online` is true."""
        raise NotImplementedError

    def decide(self, clip: "ClipFeatures", limits: Limits) -> Decisions:
        """Decide about a clip of one frame or more; called where `online` is false."""
        raise NotImplementedError

    def most_frames(self, max_tokens: int, min_tokens: int) -> int:
        """Number of sampled frames that fit into `max_tokens`; at least 1 where one frame of `min_tokens` does."""
        return most_frames(max_tokens, min_tokens)


class WalkState:
    """The state between frames from which `FrameContext` is filled, apart from the scores."""

    def __init__(self) -> None:
        self.index, self.gap, self.peak_similarity = 1, 0, 1.0

    def judge(self, policy: Policy, similarity: float, previous: float) -> bool:
        """Whether the policy makes the next frame slow; advances the state by that frame."""
        self.gap += 1
        slow = policy.is_slow(FrameContext(self.index, similarity, self.gap, self.peak_similarity, previous))
        self.index += 1
        if slow:
            self.gap, self.peak_similarity = 0, similarity
        else:
            self.peak_similarity = max(self.peak_similarity, similarity)
        return slow


class ClipFeatures:
    """The features of a clip's T frames in blocks [t, ...], and a cache of the scores computed so far."""

    def __init__(self, measure: Measure, blocks: Sequence[torch.Tensor]):
        self._measure, self._blocks = measure, blocks
        self._starts = [0]
        for block in blocks:
            self._starts.append(self._starts[-1] + len(block))
        self._rows: dict[int, list[float]] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def score(self, reference: int, index: int) -> float:
        """Similarity of frame `index` with the earlier frame `reference`; scores up to `index` are cached."""
        row = self._rows.setdefault(reference, [])
        while len(row) < index - reference:
            # As in `FrameClassifier`: the batch of comparisons grows with the distance from the reference.
            block, start = self._find(reference + 1 + len(row))
            ahead = self._blocks[block][start : start + len(row) + 1]
            row += self._measure.compare(self._feature(reference), ahead).tolist()
        return row[index - reference - 1]

    def walk(self, policy: Policy) -> tuple[list[int], list[float]]:
        """Types and scores under a policy that decides frame by frame, as `FrameClassifier` computes them."""
        types, scores, reference, state = [SLOW], [math.nan], 0, WalkState()
        for index in range(1, len(self)):
            scores.append(self.score(reference, index))
            previous = self.score(index - 1, index) if policy.looks_back else math.nan
            slow = state.judge(policy, scores[-1], previous)
            types.append(SLOW if slow else FAST)
            reference = index if slow else reference
        return types, scores

    def _find(self, index: int) -> tuple[int, int]:
        block = bisect_right(self._starts, index) - 1
        return block, index - self._starts[block]

    def _feature(self, index: int) -> torch.Tensor:
        block, offset = self._find(index)
        return self._blocks[block][offset]


def check(policy: Policy, option: str, valid: bool, wanted: str) -> None:
    """Raise a KeyeError that names `wanted` unless the value of an option is `valid`."""
    if not valid:
        raise KeyeError(f"policy {policy.name}: {option} is {getattr(policy, option)}; give {wanted}")


def check_count(policy: Policy, *options: str) -> None:
    """Raise a KeyeError unless the options are integers of 1 or more, or None."""
    for option in options:
        value = getattr(policy, option)
        count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        check(policy, option, value is None or count, "a whole number of 1 or more")


def is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
