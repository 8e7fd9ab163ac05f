"""The encoder's setting `aggregation`: frames are encoded once, and slow and fast tokens are pooled features."""

from dataclasses import dataclass, fields
from typing import Literal, Self

from keye.errors import KeyeError

_VALUES = {"pool": ("mean", "max", "none"), "layout": ("time", "slow_then_fast")}
_MOST = 8


@dataclass(frozen=True)
class FeatureAggregation:
    """How an encoder aggregates features; as text "mean", "max:oversample=2" or "mean:layout=slow_then_fast".

    The plan decides types, sizes and tokens of frames as without aggregation. Every frame is then encoded once, at the
    size of slow frames, and the tokens of an entry of the plan are pooled from its frame's. With the pool "none" each
    entry is encoded at its own size, as without aggregation, and its tokens are read as they are; the model also gets
    the type and time of each frame, which a motion pathway needs (`keye.motion`).

    Raises:
        KeyeError: a value is impossible.
    """

    pool: Literal["mean", "max", "none"] = "mean"
    """Mean or maximum over the cells of the pooled grid, or no pooling."""

    oversample: int = 1
    """Frames are encoded at this multiple of the height and width of slow frames; slow tokens are then pooled too."""

    layout: Literal["time", "slow_then_fast"] = "time"
    """The order in the token stream: by time, or all slow entries and then all fast ones."""

    def __post_init__(self) -> None:
        for name, known in _VALUES.items():
            if getattr(self, name) not in known:
                raise KeyeError(f"aggregation: {name} is {getattr(self, name)!r}; use {' or '.join(known)}")
        if self.pool == "none" and (self.oversample, self.layout) != (1, "time"):
            raise KeyeError("aggregation: without pooling there is no oversample and no layout; remove them, or pool")
        if not 1 <= self.oversample <= _MOST:
            raise KeyeError(f"aggregation: oversample is {self.oversample}; give a whole number from 1 to {_MOST}")

    @classmethod
    def of(cls, spec: str) -> Self:
        """The aggregation of a text.

        Raises:
            KeyeError: it is not text, or an option or value is unknown.
        """
        if not isinstance(spec, str):
            raise KeyeError(f"aggregation is {spec!r:.60}; give text such as 'mean' or 'max:oversample=2', or nothing")
        pool, colon, text = spec.strip().partition(":")
        options: dict[str, str | int] = {"pool": pool.strip()}
        known = [field.name for field in fields(cls) if field.name != "pool"]
        for part in text.split(",") if colon else ():
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if key not in known or not equals or key in options:
                raise KeyeError(
                    f"aggregation {spec!r}: {part.strip()!r} is not an option that can be set here; "
                    f"use {', '.join(f'{name}=' for name in known)}, each once"
                )
            if key == "oversample" and not value.isdecimal():
                raise KeyeError(f"aggregation {spec!r}: oversample is {value!r}; give a whole number")
            options[key] = int(value) if key == "oversample" else value
        return cls(**options)

    @property
    def spec(self) -> str:
        """The text of this aggregation; options where they differ from their default."""
        shown = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if field.name != "pool" and getattr(self, field.name) != field.default
        ]
        return self.pool + (":" + ",".join(shown) if shown else "")
