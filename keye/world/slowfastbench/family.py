"""One row of the table of families, and the lengths and sizes of clips."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LENGTHS = (4, 8, 16, 32, 60, 240, 600, 3600)
"""Seconds of a clip."""
WEIGHTS = (4, 4, 4, 3, 3, 3, 2, 1)
"""How often each length occurs."""
HEIGHTS = {
    4: (144, 240, 360, 480, 720, 1080), 32: (144, 240, 360, 480, 720), 240: (144, 240, 360, 480), 3600: (144, 240)
}  # fmt: skip
"""Length in seconds → pixel heights of clips from this length on; frames are 16:9."""
MOTIONS = ("still", "still", "grain", "pan")
"""Half of the backgrounds are still. Hours of noise above 240p take hundreds of megabytes and are still as well."""


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        needs: what a plan must keep so that the question can be answered.
        changes: what changes: "lamp", "dial", "disc" or "card".
        schedule: when and for how long, as the state of every place in every half second.
        hold: half seconds that one event lasts, smallest and largest; times `schedules.scale` in clips over 10 minutes.
        side: size of the thing as a share of the frame's height, smallest and largest.
        strength: grey levels by which a lamp becomes brighter, smallest and largest.
        asks: phrasings; `{}` is the asked attribute.
        group: what differs between the clips of a group, whose answers are all different: "asks" (nothing: the same
            clip, another question), "tags" (the colours of the tags), "time" (the order of the same frames).
        members: questions of a group.
        places: tagged places.
        decoys: untagged places with an event of equal size.
        tags: whether places have tags.
        shortest, longest: seconds of a clip.
        lowest: smallest height in pixels.
        motions: motion of the background.
        cuts: largest number of scene cuts.
        real: whether the background is a real clip.
    """

    needs: str
    changes: str
    schedule: Callable[..., Any]
    hold: tuple[int, int]
    side: tuple[float, float]
    asks: tuple[str, ...]
    group: str = "asks"
    members: int = 4
    strength: tuple[int, int] = (120, 170)
    places: int = 4
    decoys: int = 0
    tags: bool = True
    shortest: int = 4
    longest: int = 3600
    lowest: int = 144
    motions: tuple[str, ...] = MOTIONS
    cuts: int = 0
    real: bool = False

    def lengths(self) -> list[int]:
        """The lengths of the family's clips in seconds, each as often as its weight."""
        pairs = zip(LENGTHS, WEIGHTS, strict=True)
        return [length for length, weight in pairs if self.shortest <= length <= self.longest for _ in range(weight)]

    def heights(self, length: int) -> list[int]:
        """The pixel heights of the family's clips of a length."""
        allowed = next(heights for least, heights in reversed(HEIGHTS.items()) if length >= least)
        return [height for height in allowed if height >= self.lowest] or [max(allowed[-1], self.lowest)]
