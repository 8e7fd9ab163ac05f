"""The settings of a `SlowFastEncoder`: declared, documented and checked in one place."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from keye.aggregation.settings import FeatureAggregation
from keye.checks import fraction, integer, multiple, rate, suggestion
from keye.errors import KeyeError
from keye.slowfast.budget import SIDE


@dataclass(frozen=True)
class EncoderConfig:
    """The settings of an encoder.

    The arguments of `SlowFastEncoder`, the options of `keye encode`, the keys of a video in a message and the keys of
    `processor.encoder` in a recipe are these fields. Integers are stored as int and other numbers as float.

    Raises:
        KeyeError: a value is impossible; the message names the field.
    """

    threshold: float | None = None
    """A frame less similar than this to the latest slow frame is slow, in [0, 1] (default: the measure's own)."""

    measure: str = "change"
    """How frames are compared: a name of `keye.slowfast.measures.known_measures()`, or one that you registered."""

    policy: str = "adaptive"
    """Which frames are slow: name and options of a policy, see `keye.slowfast.policies.get_policy`."""

    fast_ratio: float = 0.3
    """Tokens of a fast frame over those of a slow frame, in (0, 1]."""

    max_tokens: int = 65_536
    """Token budget of a video, never exceeded."""

    min_tokens_per_frame: int = 48
    """Fewest tokens of a frame, unless `slow_multiple` allows less."""

    max_tokens_per_frame: int = 768
    """Most tokens of a frame."""

    fps: float = 2.0
    """Frames sampled per second."""

    max_frames: int | None = None
    """Most frames of a video, spread evenly (default: as many as the budget can hold)."""

    slow_multiple: float = 4.0
    """Where the budget binds, a slow frame keeps this multiple of a fast frame's tokens; 0: no such rule (released)."""

    aggregation: str | None = None
    """Encode each frame once and pool its tokens, for slow and for fast ones: "mean" or "max" (default: resize frames).

    With options as in "mean:oversample=2,layout=slow_then_fast", see `keye.aggregation.settings`.
    """

    token_side: int = SIDE
    """Pixels along one side of a token, which is two patches: 28 for Keye-VL and Qwen2.5-VL, 32 for Qwen3-VL."""

    def __post_init__(self) -> None:
        checked = {
            "threshold": None if self.threshold is None else fraction("threshold", self.threshold),
            "fast_ratio": fraction("fast_ratio", self.fast_ratio, zero=False),
            "fps": rate("fps", self.fps),
            "max_frames": None if self.max_frames is None else integer("max_frames", self.max_frames),
            "slow_multiple": multiple("slow_multiple", self.slow_multiple),
            "aggregation": None if self.aggregation is None else FeatureAggregation.of(self.aggregation).spec,
        }
        for name in ("max_tokens", "min_tokens_per_frame", "max_tokens_per_frame", "token_side"):
            checked[name] = integer(name, getattr(self, name))
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.min_tokens_per_frame > self.max_tokens_per_frame:
            raise KeyeError(
                f"min_tokens_per_frame={self.min_tokens_per_frame} and max_tokens_per_frame={self.max_tokens_per_frame}"
                " allow no size of a frame; give 1 <= min <= max"
            )
        if self.max_tokens < self.min_tokens_per_frame:
            raise KeyeError(
                f"max_tokens={self.max_tokens} does not hold one frame of min_tokens_per_frame="
                f"{self.min_tokens_per_frame}; raise max_tokens or lower min_tokens_per_frame"
            )
        if self.token_side % 2:
            raise KeyeError(f"token_side is {self.token_side}, but a token is two patches wide; give an even number")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all settings."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def check_names(cls, given: Mapping[str, Any]) -> None:
        """Refuse unknown names.

        Raises:
            KeyeError: a name is not a setting; the message suggests a similar one, or lists all.
        """
        for name in given:
            if name not in cls.names():
                raise KeyeError(f"{name} is not a setting of the encoder; {suggestion(name, cls.names())}")

    @staticmethod
    def saved(values: Any) -> Any:
        """The settings of a file that another version may have written, so that they give the plans that they gave.

        Settings that were saved before `slow_multiple` existed do not have it; without the rule their plans are equal.
        What is not a mapping is returned unchanged.
        """
        return {"slow_multiple": 0.0, **values} if isinstance(values, Mapping) else values

    def to_dict(self) -> dict:
        """Plain values by name; without `aggregation` where there is none, so that settings and plans are as before."""
        values = {name: getattr(self, name) for name in self.names()}
        return values if self.aggregation is not None else {k: v for k, v in values.items() if k != "aggregation"}
