"""The parts of a SlowFastWorld frame: backgrounds, coloured shapes, cards, noise. Arrays are [H, W, 3] uint8 RGB."""

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (235, 30, 30),
    "green": (30, 200, 50),
    "blue": (40, 70, 250),
    "yellow": (250, 225, 30),
    "purple": (175, 40, 215),
    "white": (250, 250, 250),
}
SHAPES = ("disc", "square", "triangle", "cross")
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "camera", "coins", "brick", "grass", "gravel", "moon")
"""Photographs in the scikit-image wheel: no download is needed."""
CELL = 0.5
"""Seconds. Events begin and end on this grid. `duration * 2` evenly spaced frames, first and last included, fall into
every cell exactly once (see `Setting.frames`): a sampler of 2 frames per second misses no event."""


@dataclass(frozen=True)
class Setting:
    """Settings of clips and stills; ValueError for a value out of range.

    Attributes:
        size: (height, width) in pixels, both even and at least 28.
        duration: seconds, at least 3 and a multiple of `CELL`.
        fps: frames per second, even.
        difficulty: 0 (easy) to 1 (hard).
    """

    size: tuple[int, int] = (112, 112)
    duration: float = 8.0
    fps: int = 4
    difficulty: float = 0.3

    def __post_init__(self) -> None:
        if min(self.size) < 28 or self.size[0] % 2 or self.size[1] % 2:
            raise ValueError(f"size {self.size} must be two even numbers of at least 28 pixels (height, width)")
        if self.fps < 2 or self.fps % 2:
            raise ValueError(f"fps {self.fps} must be even and at least 2, so that half seconds are whole frames")
        if self.duration < 3 or self.duration % CELL:
            raise ValueError(f"duration {self.duration} must be at least 3 seconds and a multiple of {CELL}")
        if not 0 <= self.difficulty <= 1:
            raise ValueError(f"difficulty {self.difficulty} must be between 0 and 1")

    @property
    def cells(self) -> int:
        """Half-second cells in the clip."""
        return round(self.duration / CELL)

    @property
    def frames(self) -> int:
        """Frames in the clip. With m = fps/2 frames a cell, sample k of `linspace(0, frames - 1, cells)` is
        m·k + k(m-1)/(cells-1), which rounds to a frame of cell k."""
        return round(self.duration * self.fps)

    def cell(self, frame: int) -> int:
        """The half-second cell of frame number `frame`."""
        return frame * 2 // self.fps


@functools.cache
def photograph(name: str) -> np.ndarray:
    """A photograph of scikit-image, at most 384 pixels wide and 256 high, [H, W, 3] uint8."""
    from skimage import data

    image = Image.fromarray(getattr(data, name)()).convert("RGB")
    image.thumbnail((384, 256))
    return np.asarray(image)


@functools.lru_cache(maxsize=256)
def shape_mask(shape: str, size: int) -> np.ndarray:
    """[size, size] bool: the pixels of a shape in its box."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    if shape == "disc":
        return x * x + y * y <= 1
    if shape == "square":
        return np.ones((size, size), bool)
    if shape == "triangle":
        return np.abs(x) <= (y + 1) / 2
    if shape == "cross":
        return (np.abs(x) <= 0.36) | (np.abs(y) <= 0.36)
    raise ValueError(f"shape {shape!r} is unknown; choose among {', '.join(SHAPES)}")


def paint(frame: np.ndarray, shape: str, colour: tuple[int, int, int], top: int, left: int, size: int) -> None:
    """Paint a shape into `frame` in place, clipped to the frame."""
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + size, frame.shape[0]), min(left + size, frame.shape[1])
    if y0 < y1 and x0 < x1:
        mask = shape_mask(shape, size)[y0 - top : y1 - top, x0 - left : x1 - left]
        frame[y0:y1, x0:x1][mask] = colour


@functools.lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def card(size: tuple[int, int], text: str, ink: tuple[int, int, int], paper: tuple[int, int, int]) -> np.ndarray:
    """A card [h, w, 3] with `text` in the largest size that fits."""
    height, width = size
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)
    # The box is proportional to the font size, so one measurement at 100 gives the size that fills 84 % of the card.
    left, top, right, bottom = draw.textbbox((0, 0), text, font=_font(100), stroke_width=3)
    font = _font(max(8, int(84 * min(width / (right - left), height / (bottom - top)))))
    stroke = max(1, height // 40)
    draw.text((width / 2, height / 2), text, fill=ink, font=font, anchor="mm", stroke_width=stroke)
    return np.asarray(image)


class Backdrop:
    """The background: a plain colour, a gradient or a photograph with noise. The camera may pan over it.

    Harder backdrops are brighter, noisier, more often photographs, and more often pan. `frame(i)` is a new array.
    """

    def __init__(self, rng: np.random.Generator, setting: Setting, pan: bool = False) -> None:
        height, width = setting.size
        hard = setting.difficulty
        self.kind = str(rng.choice(["plain", "gradient", "photograph"], p=[0.5 - 0.4 * hard, 0.3, 0.2 + 0.4 * hard]))
        self.travel = int(width * rng.uniform(0.2, 0.5)) if pan and rng.random() < hard else 0
        self.backwards = bool(rng.random() < 0.5)
        self.last = max(setting.frames - 1, 1)
        self.width = width
        self.name = self.kind
        wide = width + self.travel
        if self.kind == "photograph":
            self.name = str(rng.choice(PHOTOGRAPHS))
            canvas = _crop(photograph(self.name), rng, (height, wide)) * (0.3 + 0.4 * hard) + 10
        else:
            one, two = rng.uniform(10, 60 + 60 * hard, (2, 3))
            ramp = np.linspace(0, 1, wide)[None, :, None] if self.kind == "gradient" else np.zeros((1, wide, 1))
            canvas = np.broadcast_to(one * (1 - ramp) + two * ramp, (height, wide, 3))
        self.canvas = canvas.clip(0, 255).astype(np.uint8)
        amplitude = int(2 + 10 * hard)
        self.noise = rng.integers(0, amplitude + 1, (height + 16, width + 16, 1), dtype=np.uint8)
        self.shifts = rng.integers(0, 16, (setting.frames, 2))

    def frame(self, index: int) -> np.ndarray:
        """The backdrop at frame `index`, [H, W, 3] uint8, with camera position and noise."""
        step = round(self.travel * index / self.last)
        left = self.travel - step if self.backwards else step
        return self.grained(self.canvas[:, left : left + self.width], index)

    def grained(self, picture: np.ndarray, index: int) -> np.ndarray:
        """`picture` [H, W, 3] uint8 with the noise of frame `index`; values are first limited to 243."""
        dy, dx = self.shifts[index]
        grain = self.noise[dy : dy + picture.shape[0], dx : dx + picture.shape[1]]
        return np.minimum(picture, 243) + grain


def _crop(image: np.ndarray, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A random part of `image`, at least half of the largest crop, scaled to `size` (height, width)."""
    scale = rng.uniform(0.5, 1) * min(image.shape[0] / size[0], image.shape[1] / size[1])
    height, width = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
    top, left = rng.integers(0, image.shape[0] - height + 1), rng.integers(0, image.shape[1] - width + 1)
    part = Image.fromarray(image[top : top + height, left : left + width])
    return np.asarray(part.resize((size[1], size[0]), Image.Resampling.BILINEAR)).astype(np.float32)
