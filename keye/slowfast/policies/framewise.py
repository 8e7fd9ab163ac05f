"""Policies that decide frame by frame, in the memory of one slow frame."""

import random
from dataclasses import dataclass

from keye.slowfast.policies.base import FrameContext, Policy, check, check_count, is_fraction


@dataclass(frozen=True)
class Adaptive(Policy):
    """The report's rule (§3.1): slow when the similarity with the latest slow frame is below `threshold`, else fast.

    max_gap: a frame this many frames after the latest slow one is slow even if nothing changed.
    min_gap: a frame less than this many frames after the latest slow one is fast. A lasting change makes a later frame
    slow, since frames are compared with the latest slow one; a flash shorter than the gap is ignored.
    hysteresis: the threshold is lower by this while the picture keeps changing, that is until a frame has a similarity
    of at least `threshold`, or is slow for another reason than a change. Saves slow frames in pans and shaking
    pictures, not at cuts.
    cut: a frame less similar than this to the frame before is slow, regardless of min_gap and hysteresis.
    """

    name = "adaptive"

    threshold: float
    max_gap: int | None = None
    min_gap: int = 1
    hysteresis: float = 0.0
    cut: float | None = None

    def __post_init__(self) -> None:
        check(self, "threshold", is_fraction(self.threshold), "a similarity from 0 to 1")
        check_count(self, "max_gap", "min_gap")
        check(self, "min_gap", self.max_gap is None or self.min_gap <= self.max_gap, f"at most max_gap={self.max_gap}")
        check(self, "hysteresis", is_fraction(self.hysteresis), "a difference of similarity from 0 to 1")
        cut = self.cut is None or (is_fraction(self.cut) and self.cut > 0)
        check(self, "cut", cut, "a similarity above 0 and at most 1")

    @property
    def looks_back(self) -> bool:
        return self.cut is not None

    def is_slow(self, seen: FrameContext) -> bool:
        if self.cut is not None and seen.previous < self.cut:
            return True
        if self.max_gap is not None and seen.gap >= self.max_gap:
            return True
        if seen.gap < self.min_gap:
            return False
        changing = seen.peak_similarity < self.threshold
        return seen.similarity < self.threshold - (self.hysteresis if changing else 0.0)


@dataclass(frozen=True)
class AllSlow(Policy):
    """Every frame is slow, as in a video model without a fast pathway."""

    name = "all_slow"
    ranks = False

    def is_slow(self, seen: FrameContext) -> bool:
        return True


@dataclass(frozen=True)
class Uniform(Policy):
    """One frame in every `every` is slow, starting with the first, regardless of the picture."""

    name = "uniform"
    ranks = False
    value = "every"

    every: int = 4

    def __post_init__(self) -> None:
        check_count(self, "every")

    def is_slow(self, seen: FrameContext) -> bool:
        return seen.gap >= self.every


@dataclass(frozen=True)
class Random(Policy):
    """One frame in `every` is slow on average, regardless of the picture; the control of a policy that looks at it.

    seed: of the draw. The same seed draws the same frames of all clips.
    """

    name = "random"
    ranks = False

    every: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self, "every")
        check(self, "seed", isinstance(self.seed, int) and self.seed >= 0, "a whole number of 0 or more")

    def is_slow(self, seen: FrameContext) -> bool:
        return random.Random(1_000_003 * self.seed + seen.index).random() * self.every < 1


@dataclass(frozen=True)
class Strided(Policy):
    """The pathways of SlowFast Networks (arXiv 1812.03982): every `alpha`-th frame of the fast rate is slow.

    alpha: 8 in the paper (4 in the variant 8x8 of its R50).

    The types equal those of `uniform`; only name and default are the paper's. There the fast pathway reads the slow
    frames, too, since the pathways are two networks over one clip; here a frame is read once. Use two_stream to read
    frames in both sizes.
    """

    name = "strided"
    ranks = False
    value = "alpha"

    alpha: int = 8

    def __post_init__(self) -> None:
        check_count(self, "alpha")

    def is_slow(self, seen: FrameContext) -> bool:
        return seen.gap >= self.alpha
