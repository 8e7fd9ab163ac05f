"""The policies that judge frame by frame, and what every policy is made of.

A policy is a frozen dataclass: its fields are its options, `spec` is the text that `get_policy` turns back into it.
One of your own derives from `Policy` and gives `spec` and `is_slow`.
"""

from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from keye.errors import KeyeError
from keye.slowfast.budget import SIDE, Allocation, allocate, bounds, most_frames

if TYPE_CHECKING:
    from keye.slowfast.wholeclip import Gathered

SLOW, FAST = 0, 1


class Seen(NamedTuple):
    """What a policy knows of the frame it judges.

    index: its place among the sampled frames, 1 or more (the first frame is always slow). similarity: in [0, 1], with
    the latest slow frame. gap: how many frames ago that was, 1 or more. calm: the highest similarity on the way from
    that frame (its own, when it became slow, included) to this one, not included; 1 after the first frame.
    previous: similarity with the frame just before; NaN unless the policy's `looks_back` is true.
    """

    index: int
    similarity: float
    gap: int
    calm: float
    previous: float


@dataclass(frozen=True)
class Limits:
    """What the sizes of a clip's frames are bound by; see `keye.slowfast.budget.allocate`.

    size: (height, width) of the clip in pixels. ratio: tokens of a fast frame as a share of a slow one's.
    min_tokens, max_tokens_per_frame: of one frame. max_tokens: of the whole video. side: pixels along a token.
    """

    size: tuple[int, int]
    ratio: float
    min_tokens: int
    max_tokens_per_frame: int
    max_tokens: int
    side: int = SIDE

    def allocate(
        self, slow: int, fast: int, *, fast_tokens: int | None = None, max_tokens: int | None = None
    ) -> Allocation:
        """The sizes of `slow` and `fast` frames; max_tokens: a budget other than the video's own."""
        return allocate(
            *self.size,
            slow,
            fast,
            ratio=self.ratio,
            min_tokens=self.min_tokens,
            max_tokens_per_frame=self.max_tokens_per_frame,
            max_tokens=self.max_tokens if max_tokens is None else max_tokens,
            side=self.side,
            fast_tokens=fast_tokens,
        )

    def bounds(self, slow: int, frames: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Sizes that no slow and no fast frame exceeds if `slow` or more of `frames` frames are slow."""
        return bounds(
            *self.size,
            slow,
            frames,
            ratio=self.ratio,
            min_tokens=self.min_tokens,
            max_tokens_per_frame=self.max_tokens_per_frame,
            max_tokens=self.max_tokens,
            side=self.side,
        )


@dataclass(frozen=True)
class Decisions:
    """What a policy decided about a clip, entry by entry in the order in which the model reads them.

    types: SLOW or FAST. scores: similarity with the latest slow entry before, NaN for the first. positions: which
    sampled frame an entry shows; they never decrease. warnings: sentences on what is not as asked. threshold: the one
    that adaptive_budget found. max_tokens: the budget to allocate with, where the policy sets one below the video's.
    """

    types: list[int]
    scores: list[float]
    positions: list[int]
    warnings: list[str] = field(default_factory=list)
    threshold: float | None = None
    max_tokens: int | None = None


class Policy:
    """Decides who is slow. Derive from it.

    online: it judges frame by frame (`is_slow`); else it sees the whole clip at once (`decide`).
    looks_back: it wants `Seen.previous`, one more comparison per frame. fast_tokens: a fixed size of fast frames.
    """

    name: ClassVar[str]
    value: ClassVar[str | None] = None  # the option that a bare value in the spec stands for
    online: ClassVar[bool] = True
    looks_back: ClassVar[bool] = False
    fast_tokens: ClassVar[int | None] = None

    @property
    def spec(self) -> str:
        """Name and options as text: the bare value always, of the others those that are not at their default."""
        if self.value is not None:
            return f"{self.name}:{getattr(self, self.value)}"
        shown = [
            f"{option.name}={getattr(self, option.name)}"
            for option in fields(self)
            if option.default is not MISSING and getattr(self, option.name) != option.default
        ]
        return self.name + (":" + ",".join(shown) if shown else "")

    def is_slow(self, seen: Seen) -> bool:
        """Judge one frame after the first."""
        raise NotImplementedError

    def decide(self, clip: "Gathered", limits: Limits) -> Decisions:
        """Judge a whole clip of one frame or more; only called where `online` is false."""
        raise NotImplementedError

    def most_frames(self, max_tokens: int, min_tokens: int) -> int:
        """How many sampled frames a budget of `max_tokens` can hold; at least 1 where it holds one of `min_tokens`."""
        return most_frames(max_tokens, min_tokens)


class Course:
    """Where a walk along a clip stands: what `Seen` says beyond the scores."""

    def __init__(self) -> None:
        self.index, self.gap, self.calm = 1, 0, 1.0

    def judge(self, policy: Policy, similarity: float, previous: float) -> bool:
        """Ask the policy about the next frame and go on behind it."""
        self.gap += 1
        slow = policy.is_slow(Seen(self.index, similarity, self.gap, self.calm, previous))
        self.index += 1
        if slow:
            self.gap, self.calm = 0, similarity
        else:
            self.calm = max(self.calm, similarity)
        return slow


def check(policy: Policy, option: str, right: bool, wanted: str) -> None:
    """Refuse a value of an option, naming what is wanted instead."""
    if not right:
        given = getattr(policy, option)
        raise KeyeError(f"policy {policy.name}: {option} is {given}; give {wanted}")


def check_count(policy: Policy, *options: str) -> None:
    """Refuse anything but whole numbers of 1 or more; None stays what it is."""
    for option in options:
        value = getattr(policy, option)
        count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        check(policy, option, value is None or count, "a whole number of 1 or more")


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


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
        check(self, "threshold", _is_share(self.threshold), "a similarity from 0 to 1")
        check_count(self, "max_gap", "min_gap")
        check(self, "min_gap", self.max_gap is None or self.min_gap <= self.max_gap, f"max_gap={self.max_gap} at most")
        check(self, "hysteresis", _is_share(self.hysteresis), "a difference of similarity from 0 to 1")
        cut = self.cut is None or (_is_share(self.cut) and self.cut > 0)
        check(self, "cut", cut, "a similarity above 0 and at most 1")

    @property
    def looks_back(self) -> bool:
        return self.cut is not None

    def is_slow(self, seen: Seen) -> bool:
        if self.cut is not None and seen.previous < self.cut:
            return True
        if self.max_gap is not None and seen.gap >= self.max_gap:
            return True
        if seen.gap < self.min_gap:
            return False
        changing = seen.calm < self.threshold
        return seen.similarity < self.threshold - (self.hysteresis if changing else 0.0)


@dataclass(frozen=True)
class AllSlow(Policy):
    """Every frame is slow: what a video model without a fast pathway does."""

    name = "all_slow"

    def is_slow(self, seen: Seen) -> bool:
        return True


@dataclass(frozen=True)
class Uniform(Policy):
    """One slow frame in every `every`, from the first on, whatever the picture shows: a fixed share of slow frames."""

    name = "uniform"
    value = "every"

    every: int = 4

    def __post_init__(self) -> None:
        check_count(self, "every")

    def is_slow(self, seen: Seen) -> bool:
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

    def is_slow(self, seen: Seen) -> bool:
        return seen.gap >= self.alpha
