"""The policies that judge frame by frame, in the memory of one slow frame."""

from dataclasses import dataclass

from keye.slowfast.policies.base import FrameContext, Policy, check, check_count, is_share


@dataclass(frozen=True)
class Adaptive(Policy):
    """The report's rule (§3.1): slow when the similarity with the latest slow frame is below `threshold`, else fast.

    max_gap: a frame so many frames behind the latest slow one is slow even if nothing changed.
    min_gap: a frame less than so many frames behind the latest slow one is fast. What still differs then is slow after
    all, since frames are compared with the latest slow one; a flash shorter than the gap passes.
    hysteresis: while the picture keeps changing a new slow frame must differ by more: until some frame has come to
    rest (was at least `threshold` similar to the latest slow one, or was slow for another reason than a change), the
    threshold is lower by so much. Spares slow frames in pans and shaking pictures, not at cuts.
    cut: a frame less similar than this to the frame just before is slow, whatever min_gap and hysteresis say.
    """

    name = "adaptive"

    threshold: float
    max_gap: int | None = None
    min_gap: int = 1
    hysteresis: float = 0.0
    cut: float | None = None

    def __post_init__(self) -> None:
        check(self, "threshold", is_share(self.threshold), "a similarity from 0 to 1")
        check_count(self, "max_gap", "min_gap")
        check(self, "min_gap", self.max_gap is None or self.min_gap <= self.max_gap, f"max_gap={self.max_gap} at most")
        check(self, "hysteresis", is_share(self.hysteresis), "a difference of similarity from 0 to 1")
        cut = self.cut is None or (is_share(self.cut) and self.cut > 0)
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
    """Every frame is slow: what a video model without a fast pathway does."""

    name = "all_slow"

    def is_slow(self, seen: FrameContext) -> bool:
        return True


@dataclass(frozen=True)
class Uniform(Policy):
    """One slow frame in every `every`, from the first on, whatever the picture shows: a fixed share of slow frames."""

    name = "uniform"
    value = "every"

    every: int = 4

    def __post_init__(self) -> None:
        check_count(self, "every")

    def is_slow(self, seen: FrameContext) -> bool:
        return seen.gap >= self.every


@dataclass(frozen=True)
class Strided(Policy):
    """The pathways of SlowFast Networks (arXiv 1812.03982): slow is every `alpha`-th frame of the fast rate, from the
    first on; their alpha is 8 (4 in the variant 8x8 of the paper's R50).

    As types of frames this is `uniform` with the paper's name and default, no more. There the fast pathway also sees
    the slow frames, since the two are different networks over one clip; here a frame is read once. Where a frame
    should be read in both sizes, use two_stream.
    """

    name = "strided"
    value = "alpha"

    alpha: int = 8

    def __post_init__(self) -> None:
        check_count(self, "alpha")

    def is_slow(self, seen: FrameContext) -> bool:
        return seen.gap >= self.alpha
