"""The settings of a `SlowFastEncoder` as plain values, checked in one place."""

from dataclasses import dataclass, fields

from keye.checks import rate, share, whole
from keye.errors import KeyeError
from keye.slowfast.budget import SIDE
from keye.slowfast.measures import Measure, get_measure
from keye.slowfast.policies import Policy, get_policy


@dataclass(frozen=True)
class EncoderConfig:
    """Every number and name that decides what an encoder does with a video; `SlowFastEncoder` takes the same arguments.

    Whole numbers become int and the others float. Raises KeyeError for a value that is impossible, by its name.
    """

    threshold: float | None = None
    """A frame less similar than this to the latest slow frame is slow, in [0, 1]; None takes the measure's own."""

    measure: str = "change"
    """How frames are compared: one of `known_measures()` or one that you registered."""

    policy: str = "adaptive"
    """Who is slow: name and options, see `get_policy`."""

    fast_ratio: float = 0.3
    """Tokens of a fast frame as a share of a slow one's, in (0, 1]."""

    max_tokens: int = 65_536
    """Budget of the whole video in tokens, never exceeded."""

    min_tokens_per_frame: int = 48
    """No frame gets fewer tokens."""

    max_tokens_per_frame: int = 768
    """No frame gets more tokens."""

    fps: float = 2.0
    """Frames sampled per second."""

    max_frames: int | None = None
    """At most so many frames, spread evenly; None takes all that the budget can hold."""

    token_side: int = SIDE
    """Pixels along one side of a token, two patches: 28 for Keye-VL and Qwen2.5-VL, 32 for Qwen3-VL."""

    def __post_init__(self) -> None:
        checked = {
            "threshold": None if self.threshold is None else share("threshold", self.threshold),
            "fast_ratio": share("fast_ratio", self.fast_ratio, zero=False),
            "fps": rate("fps", self.fps),
            "max_frames": None if self.max_frames is None else whole("max_frames", self.max_frames),
        }
        for name in ("max_tokens", "min_tokens_per_frame", "max_tokens_per_frame", "token_side"):
            checked[name] = whole(name, getattr(self, name))
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.min_tokens_per_frame > self.max_tokens_per_frame:
            raise KeyeError(
                f"min_tokens_per_frame={self.min_tokens_per_frame} and max_tokens_per_frame={self.max_tokens_per_frame}"
                " leave no size for a frame; give 1 <= min <= max"
            )
        if self.max_tokens < self.min_tokens_per_frame:
            raise KeyeError(
                f"max_tokens={self.max_tokens} does not hold one frame of min_tokens_per_frame="
                f"{self.min_tokens_per_frame}; raise the one or lower the other"
            )
        if self.token_side % 2:
            raise KeyeError(f"token_side is {self.token_side}; a token is two patches wide: give an even number")

    def to_dict(self) -> dict:
        """Plain values by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def as_measure(given: str | Measure) -> Measure:
    """The measure that `given` names or is; KeyeError says what is missing of an object that is none."""
    if isinstance(given, str):
        return get_measure(given)
    if isinstance(given, type):
        raise KeyeError(f"measure is the class {given.__name__}; give an instance of it: {given.__name__}(…)")
    for name in ("prepare", "compare"):
        if not callable(getattr(given, name, None)):
            raise KeyeError(
                f"measure is {_shown(given)}, which has no method {name}; give a name or an object with the methods of"
                " keye.slowfast.measures.Measure"
            )
    if not isinstance(getattr(given, "name", None), str):
        raise KeyeError(f"the measure {type(given).__name__} has no name; give its class an attribute `name`")
    share(f"threshold of the measure {given.name!r}", getattr(given, "threshold", None))
    return given


def as_policy(given: str | Policy, threshold: float | None, measure: Measure) -> tuple[Policy, float]:
    """The policy that `given` names or is, and the threshold that it decides by.

    That is `threshold`, else a policy object's own, else the measure's. Raises KeyeError where `threshold` and the
    policy's own differ, and for what is no policy.
    """
    if isinstance(given, str):
        own = measure.threshold if threshold is None else threshold
        return get_policy(given, own), own
    if isinstance(given, type) and issubclass(given, Policy):
        raise KeyeError(f"policy is the class {given.__name__}; give an instance of it: {given.__name__}(…)")
    if not isinstance(given, Policy):
        raise KeyeError(f"policy is {_shown(given)}; give a name, or an object of a class derived from Policy")
    own = getattr(given, "threshold", None)
    if own is None:
        return given, measure.threshold if threshold is None else threshold
    if threshold is not None and threshold != own:
        raise KeyeError(f"threshold is {threshold} and the policy's own threshold {own}; give one of the two")
    return given, share("threshold of the policy", own)


def _shown(given: object) -> str:
    return f"{given!r}"[:80]
