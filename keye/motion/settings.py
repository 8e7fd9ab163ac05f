"""Settings of SlowFast Networks (arXiv 1812.03982) and the published presets."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from keye.checks import integer
from keye.errors import ArgumentError

Lateral = Literal["none", "sum", "concat", "sample", "conv"]
LATERALS: tuple[Lateral, ...] = ("none", "sum", "concat", "sample", "conv")


@dataclass(frozen=True)
class SlowFastSettings:
    """The shape of a two-pathway network; table 1 of the paper is the default, 4 × 16 with a ResNet-50.

    Raises:
        ArgumentError: the values do not fit together.
    """

    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Residual blocks of res2 to res5."""

    frames: int = 4
    """T, frames of the Slow pathway."""

    alpha: int = 8
    """The Fast pathway has alpha × T frames."""

    beta: int = 8
    """The Fast pathway has 1/beta of the channels."""

    lateral: Lateral = "conv"
    """What the Slow pathway gets of the Fast one after the stem and res2 to res4: nothing; the alpha frames of each
    slow frame as channels, added or concatenated; every alpha-th frame; or a convolution with stride alpha in time."""

    lateral_kernel: int = 5
    """Frames that the convolution of a lateral connection sees."""

    temporal: int | None = None
    """Blocks of res4 with a temporal kernel of 3 in both pathways; the others have 1. None = all."""

    nonlocal_blocks: tuple[int, ...] = ()
    """Blocks of res4, counted from 0, that a non-local block follows in the Slow pathway."""

    width: int = 64
    """Channels of the Slow pathway's stem."""

    classes: int = 400
    """Outputs of the head."""

    dropout: float = 0.5
    """Of the head."""

    slow: bool = True
    """Whether there is a Slow pathway; False = Fast only."""

    fast: bool = True
    """Whether there is a Fast pathway; False = Slow only."""

    def __post_init__(self) -> None:
        if self.lateral not in LATERALS:
            raise ArgumentError(f"lateral is {self.lateral!r}; use one of {', '.join(LATERALS)}")
        if len(self.blocks) != 4:
            raise ArgumentError(f"blocks are {self.blocks}; give four numbers, for res2 to res5")
        if outside := [place for place in self.nonlocal_blocks if not 0 <= place < self.blocks[2]]:
            raise ArgumentError(
                f"nonlocal_blocks names block {outside[0]} of res4, which has {self.blocks[2]}; count from 0"
            )
        if not (self.slow or self.fast):
            raise ArgumentError("a network needs the Slow or the Fast pathway: set slow or fast to True")
        if self.lateral == "sum" and self.alpha != self.beta:
            raise ArgumentError(
                f"lateral 'sum' needs as many channels in both pathways: alpha {self.alpha} must equal beta {self.beta}"
            )
        if self.lateral_kernel % 2 == 0:
            raise ArgumentError(f"lateral_kernel {self.lateral_kernel} must be odd, so that it has a middle frame")
        if min(self.frames, self.alpha, self.beta, self.classes, *self.blocks) < 1 or self.width < self.beta:
            raise ArgumentError("frames, alpha, beta, classes and blocks must be at least 1, width at least beta")

    @property
    def joined(self) -> bool:
        """Whether lateral connections exist."""
        return self.slow and self.fast and self.lateral != "none"

    @property
    def raw(self) -> int:
        """Frames of the Fast pathway."""
        return self.frames * self.alpha


_R101 = {"blocks": (3, 4, 23, 3), "alpha": 4, "frames": 8}

PRESETS = {
    "r50_4x16": SlowFastSettings(),
    "r50_8x8": SlowFastSettings(frames=8, alpha=4, lateral_kernel=7),
    "r101_8x8": SlowFastSettings(**_R101),
    "r101_8x8_50_50": SlowFastSettings(**_R101, temporal=6),
    "r101_16x8_50_50": SlowFastSettings(**_R101 | {"frames": 16}, temporal=6),
    "r101_16x8_50_50_nl": SlowFastSettings(**_R101 | {"frames": 16}, temporal=6, nonlocal_blocks=(6, 13, 20)),
    "tiny": SlowFastSettings(blocks=(1, 1, 1, 1), alpha=4, beta=4, width=16, classes=4, dropout=0.0),
}
"""Name → settings: backbone, then frames × stride of the Slow pathway in a clip of frames × stride raw frames.

`50_50` has temporal kernels in the first 6 blocks of res4 only, as the paper's ResNet-101 of 106 and 213 GFLOPs;
`nl` has non-local blocks. `tiny` is for tests.
"""


@dataclass(frozen=True)
class MotionSettings:
    """The motion pathway of a vision tower (`vision_config.motion`), see `keye.motion.pathway`.

    Raises:
        ArgumentError: a value is impossible.
    """

    size: int = 112
    """Height and width in pixels of the frames that the pathway reads."""

    width: int = 8
    """Channels of the stem; a stage ends with 4, 8, 16, … times as many."""

    blocks: tuple[int, ...] = (3, 4, 6)
    """Residual blocks of res2 and the following stages."""

    alpha: int = 4
    """Steps into which the time between two slow frames is divided."""

    lateral_kernel: int = 5
    """Steps that a lateral connection sees, with the slow frame in the middle."""

    def __post_init__(self) -> None:
        for name in ("size", "width", "alpha", "lateral_kernel"):
            integer(f"motion: {name}", getattr(self, name), error=ArgumentError)
        if not isinstance(self.blocks, list | tuple):
            raise ArgumentError(f"motion: blocks is {self.blocks!r}; give a list such as [3, 4, 6]")
        for count in self.blocks:
            integer("motion: an entry of blocks", count, error=ArgumentError)
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.lateral_kernel % 2 == 0:
            raise ArgumentError(f"motion: lateral_kernel {self.lateral_kernel} must be odd, so that it has a middle")
        if not self.blocks:
            raise ArgumentError("motion: blocks is empty; give a list such as [3, 4, 6]")
        if self.size < 4 << len(self.blocks):
            raise ArgumentError(
                f"motion: frames of {self.size} pixels are too small for {len(self.blocks)} stages; "
                f"give size {4 << len(self.blocks)} or more"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "MotionSettings":
        """The settings of a mapping such as `vision_config.motion`; ArgumentError names an unknown key."""
        known = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or set(values) - set(known):
            raise ArgumentError(f"motion is {values!r:.80}; give a table with some of the keys {', '.join(known)}")
        return cls(**values)
