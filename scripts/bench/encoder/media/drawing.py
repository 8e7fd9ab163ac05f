"""What drawn clips share: sizes, seeds and photographs of each split, true changes, and the means to draw a kind."""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

FPS = 10
SECONDS = 10
HEIGHT, WIDTH = 360, 640
TUNING_SEEDS, HELD_OUT_SEEDS = (0, 1), (2, 3, 4)
TUNING_PHOTOGRAPHS = ("astronaut", "coffee", "camera", "brick", "gravel")
HELD_OUT_PHOTOGRAPHS = ("chelsea", "rocket", "coins", "grass", "moon")
WORDS = "slow fast frame token visual detail change motion picture keye video clip stage patch long short".split()


@dataclass(frozen=True)
class Span:
    """From `start` to `end` seconds something of a `kind` happens; a cut starts and ends at once."""

    kind: str
    start: float
    end: float


@dataclass
class Scene:
    """A clip with its true changes (`events`) and the times when nothing but a nuisance is to be seen.

    start, end: the part that is used, in seconds. apart: it is reported separately and not included in all clips.
    """

    name: str
    path: Path
    events: list[Span] = field(default_factory=list)
    nuisances: list[Span] = field(default_factory=list)
    start: float = 0.0
    end: float = 1e9
    apart: bool = False


class Drawing:
    """What a kind of clip is drawn with: random numbers, photographs, event times, and the truth as it is drawn."""

    def __init__(self, kind: str, seed: int):
        self.random = np.random.default_rng([sum(kind.encode()), seed])
        self.photographs = TUNING_PHOTOGRAPHS if seed in TUNING_SEEDS else HELD_OUT_PHOTOGRAPHS
        self.events: list[Span] = []
        self.nuisances: list[Span] = []
        self.crf = int(self.random.choice([23, 26, 29]))

    def times(self, count: int, gap: float = 1.3, first: float = 1.2, last: float = SECONDS - 1.2) -> list[float]:
        """`count` ascending times on the grid of frames, at least `gap` apart."""
        slack = last - first - gap * (count - 1)
        picks = np.sort(self.random.uniform(0, slack, count)) + first + gap * np.arange(count)
        return [round(float(t) * FPS) / FPS for t in picks]

    def event(self, kind: str, start: float, end: float | None = None) -> None:
        self.events.append(Span(kind, start, start if end is None else end))

    def nuisance(self, kind: str, start: float = 0.0, end: float = SECONDS) -> None:
        self.nuisances.append(Span(kind, start, end))

    def photograph(self, name: str | None = None, wide: float = 1.0) -> np.ndarray:
        """A part of a photograph as float [HEIGHT, WIDTH * wide, 3], softly textured."""
        image = _photograph(name or str(self.random.choice(self.photographs)))
        width = round(WIDTH * wide)
        scale = self.random.uniform(0.7, 1) * min(image.height / HEIGHT, image.width / width)
        h, w = HEIGHT * scale, width * scale
        top, left = self.random.uniform(0, image.height - h), self.random.uniform(0, image.width - w)
        part = image.resize((width, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
        if self.random.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(part).astype(np.float32)

    def photographs_in_turn(self, count: int, wide: float = 1.0) -> list[np.ndarray]:
        names = list(self.random.permutation(self.photographs))
        return [self.photograph(names[i % len(names)], wide) for i in range(count)]


@functools.cache
def _photograph(name: str) -> Image.Image:
    from skimage import data

    return Image.fromarray(getattr(data, name)()).convert("RGB")


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)
