"""Clips at 1080p in which text is replaced by other text: whole pages, filmed pages, and a panel on a photograph.

All pages of a clip have the same paper, ink, font and layout, and differ in their words only. A filmed page has sensor
noise, light that varies and a trembling camera, which must not count. Fonts and photographs are split like those of
scenes.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from scripts.bench.encoder.media.corpus import FOLDER
from scripts.bench.encoder.media.scenes import SECONDS, TUNING_SEEDS, Drawing, Scene, rendered

FPS = 5
HEIGHT, WIDTH = 1080, 1920
PAGE_SEEDS = {"tuning": (0, 1, 8, 9), "held-out": (2, 3, 4, 5, 6, 7)}
FONTS = {"tuning": (None, "DejaVuSans.ttf"), "held-out": ("DejaVuSerif.ttf", "DejaVuSansMono.ttf", "STIXGeneral.ttf")}
PAPERS = ((250, 250, 245), (20, 25, 45), (235, 240, 250), (40, 40, 40), (244, 236, 216))
LETTERS = tuple("eeeeettaaooiinnsshhrrddlluccmmwwffggyyppbbvk")


class PageDrawing(Drawing):
    """A drawing at 1080p with one layout of text."""

    def __init__(self, kind: str, seed: int):
        super().__init__(kind, seed)
        self.split = "tuning" if seed in PAGE_SEEDS["tuning"] else "held-out"
        if self.split == "tuning" and seed not in TUNING_SEEDS:
            self.photographs = Drawing(kind, TUNING_SEEDS[0]).photographs
        self.size = int(self.random.integers(18, 36))
        self.font = self._font()
        self.paper = PAPERS[self.random.integers(len(PAPERS))]
        self.ink = (25, 25, 30) if self.paper[0] > 128 else (235, 235, 230)

    def _font(self) -> ImageFont.FreeTypeFont:
        name = FONTS[self.split][self.random.integers(len(FONTS[self.split]))]
        if name is None:
            return ImageFont.load_default(size=self.size)
        return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), self.size)

    def page(self, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
        """A page of drawn words as float32 [height, width, 3]: lines of equal pitch, ragged at the right."""
        image = Image.new("RGB", (width, height), self.paper)
        canvas = ImageDraw.Draw(image)
        margin, pitch = width // 16, round(1.45 * self.size)
        for top in range(margin, height - margin - self.size, pitch):
            line = self.word()
            while canvas.textlength(f"{line} {(word := self.word())}", font=self.font) < width - 2 * margin:
                line = f"{line} {word}"
            canvas.text((margin, top), line, fill=self.ink, font=self.font)
        return np.asarray(image).astype(np.float32)

    def word(self) -> str:
        """A word of 1 to 10 letters."""
        return "".join(self.random.choice(LETTERS, int(self.random.integers(1, 11))))

    def turns(self) -> list[float]:
        """The times of the replacements, on the grid of frames."""
        times = [round(time * FPS) / FPS for time in self.times(4, gap=1.8)]
        for time in times:
            self.event("page", time)
        return times


Frames = Iterator[np.ndarray]


def _pages(draw: PageDrawing) -> Frames:
    """A page fills the picture and is replaced by the next."""
    times = draw.turns()
    pages = [draw.page() for _ in range(len(times) + 1)]
    for t in _clock():
        yield pages[sum(t >= time for time in times)]


def _filmed(draw: PageDrawing) -> Frames:
    """The same, filmed: noise, light that swells, and a camera that trembles by up to 2 pixels."""
    draw.nuisance("noise")
    draw.crf = 23
    sigma, swell = draw.random.uniform(3, 9), draw.random.uniform(0.02, 0.12)
    grain = draw.random.normal(0, sigma, (2 * HEIGHT, 2 * WIDTH, 1)).astype(np.float32)
    for number, picture in enumerate(_pages(draw)):
        top, left = (int(draw.random.integers(side)) for side in (HEIGHT, WIDTH))
        shaken = ndimage.shift(picture, (*draw.random.uniform(-2, 2, 2), 0), order=1, mode="nearest")
        light = 1 + swell * np.sin(0.9 * number)
        yield shaken * light + grain[top : top + HEIGHT, left : left + WIDTH]


def _panel(draw: PageDrawing) -> Frames:
    """A panel of text, 8 to 35 % of a photograph, whose text is replaced."""
    times = draw.turns()
    view = np.asarray(Image.fromarray(draw.photograph().astype(np.uint8)).resize((WIDTH, HEIGHT))).astype(np.float32)
    share, shape = draw.random.uniform(0.08, 0.35), draw.random.uniform(0.8, 1.6)
    height = min(HEIGHT - 40, round(np.sqrt(share * HEIGHT * WIDTH / shape)))
    width = min(WIDTH - 40, round(share * HEIGHT * WIDTH / height))
    top, left = int(draw.random.integers(HEIGHT - height)), int(draw.random.integers(WIDTH - width))
    panels = [draw.page(height, width) for _ in range(len(times) + 1)]
    for t in _clock():
        picture = view.copy()
        picture[top : top + height, left : left + width] = panels[sum(t >= time for time in times)]
        yield picture


def _clock() -> list[float]:
    return [i / FPS for i in range(SECONDS * FPS)]


PAGE_KINDS: dict[str, Callable[[PageDrawing], Frames]] = {
    "pages": _pages,
    "filmed pages": _filmed,
    "panel of text": _panel,
}


def page_scene(kind: str, seed: int) -> Scene:
    """The clip of a kind and seed, rendered into .cache/bench/pages unless it is there already."""
    path = FOLDER / f"pages/{kind.replace(' ', '-')}-{seed}.mp4"
    clip = rendered(path, lambda: PageDrawing(kind, seed), PAGE_KINDS[kind], FPS)
    return replace(clip, name=f"{kind}-{seed}", apart=True)
