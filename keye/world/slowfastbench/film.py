"""The frames of a clip: a background, tags that never change, and things whose states change every half second."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keye.world.scene import CELL, COLOURS, Backdrop, Setting, card, shape_mask
from keye.world.slowfastbench.schedules import RING

PANEL, DARK = 26, 70
"""Grey levels of the panels and of a lamp that is off."""
TAGS, THINGS = (0.03, 0.17), (0.42, 0.97)
"""Tops and bottoms of the strip of tags and of the area of the things, as shares of the height. A row of patches, which
is at most a fifth of the height, lies between them: no patch shows both, so no patch compares both."""

KEPT = 12
"""Frames of a still background that a painter keeps."""


@dataclass(frozen=True)
class Film:
    """What is drawn. Two films with equal fields have equal frames.

    Attributes:
        changes: "lamp", "dial", "disc" or "card".
        size: (height, width) in pixels, even.
        cells: half seconds.
        fps: frames per second, even.
        motion: of the background: "still", "grain" (noise), "pan" (the camera moves) or "real" (a real clip).
        seed: of the background and of the layout.
        states: int [P, cells].
        tags: colour of the tag of each place; None for a place without one; empty if no place has one.
        side: size of a thing as a share of the height.
        strength: grey levels by which a lamp becomes brighter.
        texts: of the cards.
        cuts: cells at which another background begins.
        mirrored: whether places are the mirror images of one another instead of columns.
        source: name of the real clip of the motion "real".
    """

    changes: str
    size: tuple[int, int]
    cells: int
    fps: int
    motion: str
    seed: tuple[int, ...]
    states: np.ndarray
    tags: tuple[str | None, ...]
    side: float
    strength: int
    texts: tuple[str, ...] = ()
    cuts: tuple[int, ...] = ()
    mirrored: bool = False
    source: str | None = None

    @property
    def frames(self) -> int:
        """Number of frames."""
        return self.cells * self.fps // 2

    def cell(self, frame: int) -> int:
        """The half second of a frame."""
        return frame * 2 // self.fps


class Painter:
    """Draws the frames of a film.

    Args:
        real: the pictures of a real clip, uint8 [N, H, W, 3] of the film's size; needed for the motion "real".
    """

    def __init__(self, film: Film, real: np.ndarray | None = None) -> None:
        self.film, self.real = film, real
        rng = np.random.default_rng(film.seed)
        height, width = film.size
        setting = Setting(film.size, film.cells * CELL, film.fps, 1.0 if film.motion == "pan" else 0.3)
        backdrops = 0 if film.motion == "real" else 1 + len(film.cuts)
        self.backdrops = [Backdrop(rng, setting, pan=film.motion == "pan") for _ in range(backdrops)]
        # Drawn backgrounds have no preferred direction, so that places and directions are exchangeable.
        down, across = (int(step) for step in rng.choice([-1, 1], 2))
        self.flips = (slice(None, None, 1 if film.motion == "real" else down), slice(None, None, across))
        self.below = bool(rng.integers(2))
        self.start = int(rng.integers(1 << 16))
        self.columns = rng.permutation(len(film.states)).tolist()
        self.pixels = max(8, 2 * round(film.side * height / 2))
        area = (round(THINGS[0] * height), round(THINGS[1] * height))
        self.pixels = min(self.pixels, area[1] - area[0], 2 * int(0.4 * width / max(4, len(film.states))))
        self.row = int(rng.integers(area[0], area[1] - self.pixels + 1))
        free = max(1, min(height // 2, width // 2) - self.pixels)
        self.offset = tuple(int(value) for value in rng.integers(free // 4, free, 2))
        self.column = int(rng.integers(0, width - self._card_width() + 1))
        self._cards = {text: self._card(text) for text in film.texts}
        self._drawn: dict[object, np.ndarray] = {}

    def frame(self, index: int) -> np.ndarray:
        """Frame `index`, uint8 [H, W, 3]; do not change it. Equal frames of a still background are the same array."""
        film = self.film
        cell = film.cell(index)
        scene = sum(cell >= cut for cut in film.cuts)
        states = tuple(film.states[:, cell].tolist())
        key = (scene, states) if film.motion == "still" else index
        if key not in self._drawn:
            if len(self._drawn) >= (KEPT if film.motion == "still" else 1):
                self._drawn.clear()
            self._drawn[key] = self._draw(index, scene, states)
        return self._drawn[key]

    def cell_frames(self) -> list[np.ndarray]:
        """The first frame of every half second."""
        return [self.frame(cell * self.film.fps // 2) for cell in range(self.film.cells)]

    def box(self, place: int) -> tuple[int, int, int, int]:
        """Pixels [left, top, right, bottom] of a place."""
        height, width = self.film.size
        column, side = self.columns[place], self.pixels
        if self.film.mirrored:
            down, across = self.offset
            top = height // 2 - side - down if column < 2 else height // 2 + down
            left = width // 2 - side - across if column % 2 else width // 2 + across
        else:
            top = height - self.row - side if self.below else self.row
            left = int((column + 0.5) * width / len(self.columns)) - side // 2
        return left, top, left + side, top + side

    def _draw(self, index: int, scene: int, states: Sequence[int]) -> np.ndarray:
        picture = self._background(index, scene)
        if any(self.film.tags):
            self._draw_tags(picture)
        if self.film.changes == "card":
            if states[0]:
                self._draw_card(picture, self.film.texts[states[0] - 1])
        elif self.film.changes == "disc":
            for place, state in enumerate(states):
                self._draw_disc(picture, self.columns[place], state)
        else:
            for place, state in enumerate(states):
                left, top, right, bottom = self.box(place)
                spot = picture[top:bottom, left:right]
                (_draw_lamp if self.film.changes == "lamp" else _draw_dial)(spot, state, self.film.strength)
        return picture

    def _background(self, index: int, scene: int) -> np.ndarray:
        if self.film.motion == "real":
            if self.real is None:
                raise ValueError("a film on a real clip needs its pictures")
            # The source runs forwards and backwards, so that a longer film has no jump.
            place = (self.start + index) % max(1, 2 * len(self.real) - 2)
            picture = self.real[min(place, 2 * len(self.real) - 2 - place)]
        else:
            picture = self.backdrops[scene].frame(0 if self.film.motion == "still" else index)
        return picture[self.flips].copy()

    def _draw_tags(self, picture: np.ndarray) -> None:
        height, width = self.film.size
        top, bottom = (round(share * height) for share in TAGS)
        rows = slice(height - bottom, height - top) if self.below else slice(top, bottom)
        picture[rows] = PANEL
        margin = max(1, (bottom - top) // 6)
        for place, name in enumerate(self.film.tags):
            if name is not None:
                middle = (self.columns[place] + 0.5) * width / len(self.columns)
                half = 0.3 * width / len(self.columns)
                strip = picture[rows][margin:-margin]
                strip[:, round(middle - half) : round(middle + half)] = COLOURS[name]

    def _card_width(self) -> int:
        return min(self.film.size[1], 2 * self.pixels + self.pixels // 2) if self.film.changes == "card" else 0

    def _card(self, text: str) -> np.ndarray:
        return card((self.pixels, self._card_width()), text, (20, 20, 20), (235, 235, 230))

    def _draw_card(self, picture: np.ndarray, text: str) -> None:
        drawn = self._cards[text]
        picture[self.row : self.row + len(drawn), self.column : self.column + drawn.shape[1]] = drawn

    def _draw_disc(self, picture: np.ndarray, column: int, state: int) -> None:
        height, width = self.film.size
        side, angle = self.pixels, 2 * math.pi * state / RING
        top, bottom = (round(share * height) for share in THINGS)
        radius = (bottom - top - side) // 2
        across, up = round(radius * math.sin(angle)), round(radius * math.cos(angle))
        middle = height - (top + bottom) // 2 if self.below else (top + bottom) // 2
        top, left = middle - up - side // 2, round((column + 0.5) * width / len(self.columns)) + across - side // 2
        picture[top : top + side, left : left + side][shape_mask("disc", side)] = DARK + self.film.strength


def _draw_lamp(spot: np.ndarray, state: int, strength: int) -> None:
    side = len(spot)
    spot[shape_mask("disc", side)] = PANEL
    edge = max(1, side // 8)
    spot[edge:-edge, edge:-edge][shape_mask("disc", side - 2 * edge)] = DARK + strength * state


def _draw_dial(spot: np.ndarray, state: int, strength: int) -> None:
    side = len(spot)
    spot[shape_mask("disc", side)] = PANEL
    y, x = (np.mgrid[:side, :side] + 0.5) / side * 2 - 1
    across, up = math.sin(math.pi * state / 4), math.cos(math.pi * state / 4)
    along, beside = x * across - y * up, x * up + y * across
    spot[(along >= -0.12) & (along <= 0.88) & (np.abs(beside) <= 0.16)] = DARK + strength
