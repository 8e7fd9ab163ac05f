"""What the pictures of a plan say about the states of a film: log-likelihoods, from pixels with noise.

A picture shows known things at known places: lamps with one of two levels, dials with one of eight directions, cards
with one of some texts, discs at one of six places of their rings, and tags of some colours. What they look like in a
picture of the plan's size follows from the resampling of the frame, which is linear. Unknown is the background beside
them, which mixes with them in small pictures; it is a common grey level with a spread. Noise is added to the sums over
pixels from which likelihoods are computed, with the covariance that independent noise of every pixel has there.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from keye.world.scene import COLOURS, card, shape_mask
from keye.world.slowfastbench.film import DARK, PANEL, TAGS, THINGS, Film, Painter, _draw_dial, _draw_lamp
from keye.world.slowfastbench.schedules import RING

Box = tuple[int, int, int, int]
"""Pixels [top, bottom, left, right]."""
Size = tuple[int, int]
Picture = np.ndarray | torch.Tensor
"""uint8 [h, w, 3] as an array or [3, h, w] as a tensor."""

BACKGROUND, COMMON, SPREAD = 70.0, 40.0, 25.0
"""Grey levels of backgrounds: mean, standard deviation of the level of one background, and of its pixels."""
ROUNDING = 2.0
"""Standard deviation in grey levels of what the likelihoods leave out: rounding, and limits to 0 and 255."""
TAGGED = 16
"""Pictures, the largest ones, from which the tags are read."""
LEAST = 0.02
"""Rows and columns of a picture belong to a window if the frame's part has at least this weight there."""
INK, PAPER = (20, 20, 20), (235, 235, 230)


@dataclass(frozen=True)
class Layout:
    """Where things are in a film and how they look, without their states, tags and texts.

    Attributes:
        changes: "lamp", "dial", "disc" or "card".
        size: (height, width) of the film in pixels.
        cells: half seconds.
        strength: grey levels by which a lit lamp, a hand or the disc are brighter than a dark lamp.
        side: pixels along a thing.
        places: boxes by their left and top sides, an order that is unrelated to the schedule; rings for discs.
        strips: boxes of the tags, in the order of `places`.
        panel: top and bottom of the panel of the tags.
    """

    changes: str
    size: Size
    cells: int
    strength: int
    side: int
    places: tuple[Box, ...]
    strips: tuple[Box, ...]
    panel: tuple[int, int]


def layout_of(film: Film, places: int) -> Layout:
    """The layout of a film with a number of places; its states, tags and texts are not read."""
    blank = replace(film, states=np.zeros((places, 1), int), tags=(), texts=())
    return _layout(_Keyed(tuple(value for name, value in vars(blank).items() if name != "states") + (places,), blank))


@dataclass(frozen=True)
class _Keyed:
    """A film that is hashed and compared by a key."""

    key: tuple[object, ...]
    film: Film

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and self.key == other.key


@functools.lru_cache(maxsize=16)
def _layout(keyed: _Keyed) -> Layout:
    film, painter = keyed.film, Painter(keyed.film)
    (height, width), side, places = film.size, painter.pixels, len(film.states)
    top, bottom = (round(share * height) for share in TAGS)
    panel = (height - bottom, height - top) if painter.below else (top, bottom)
    margin = max(1, (bottom - top) // 6)
    strips = []
    for column in range(places):
        middle, half = (column + 0.5) * width / places, 0.3 * width / places
        strips.append((panel[0] + margin, panel[1] - margin, round(middle - half), round(middle + half)))
    if film.changes == "card":
        across = min(width, 2 * side + side // 2)
        boxes = [(painter.row, painter.row + side, painter.column, painter.column + across)]
    elif film.changes == "disc":
        boxes = _rings(painter)
    else:
        found = sorted(painter.box(place) for place in range(places))
        boxes = [(top, bottom, left, right) for left, top, right, bottom in found]
    return Layout(film.changes, film.size, film.cells, film.strength, side, tuple(boxes), tuple(strips), panel)


def _rings(painter: Painter) -> list[Box]:
    """The boxes of the rings on which discs go round."""
    (height, width), side, places = painter.film.size, painter.pixels, len(painter.film.states)
    top, bottom = (round(share * height) for share in THINGS)
    radius, middle = (bottom - top - side) // 2, (top + bottom) // 2
    above = (height - middle if painter.below else middle) - side // 2 - radius
    lefts = [round((column + 0.5) * width / places) - side // 2 - radius for column in range(places)]
    return [(above, above + 2 * radius + side, left, left + 2 * radius + side) for left in lefts]


def state_likelihoods(
    layout: Layout, times: Sequence[float], pictures: Sequence[Picture], sd: float, seed: int, texts: tuple[str, ...]
) -> np.ndarray:
    """Log-likelihoods of the states of every place in every half second: float64 [cells, places, states].

    They are 0 in a half second without a picture, and relative to state 0, or to the absence of a card.

    Args:
        times: seconds of the pictures.
        sd: standard deviation of the noise of a pixel in grey levels.
        seed: of the noise, which also depends on the time of a picture.
        texts: of cards, one for each state.
    """
    states = {"lamp": 2, "dial": 8, "card": len(texts), "disc": RING}[layout.changes]
    found = np.zeros((layout.cells, len(layout.places), states))
    cells = [min(layout.cells - 1, max(0, int(2 * time + 1e-3))) for time in times]
    for cell, values in zip(cells, _observed(layout, times, pictures, sd, seed, "states", texts), strict=True):
        found[cell] += values
    return found if layout.changes == "card" else found - found[:, :, :1]


def tag_likelihoods(
    layout: Layout, times: Sequence[float], pictures: Sequence[Picture], colours: tuple[str, ...], sd: float, seed: int
) -> np.ndarray:
    """Log-likelihoods of the colours of every tag, and of no tag in the last column: float64 [places, colours + 1]."""
    largest = sorted(range(len(pictures)), key=lambda place: -math.prod(_size(pictures[place])))[:TAGGED]
    some = [times[place] for place in largest], [pictures[place] for place in largest]
    found = np.zeros((len(layout.strips), len(colours) + 1))
    return found + sum(_observed(layout, *some, sd, seed, "tags", colours))


def _observed(
    layout: Layout, times: Sequence[float], pictures: Sequence[Picture], sd: float, seed: int,
    kind: Literal["states", "tags"], names: tuple[str, ...],
) -> Iterable[np.ndarray]:  # fmt: skip
    """Log-likelihoods [places, states] of each picture."""
    seen: dict[int, np.ndarray] = {}  # a still background has few different pictures
    for time, picture in zip(times, pictures, strict=True):
        sights = _sights(layout, _size(picture), sd, kind, names)
        if id(picture) not in seen:
            seen[id(picture)] = np.stack([sight.look(picture) for sight in sights])
        rng = np.random.default_rng((seed, round(1000 * time), kind == "tags"))
        noise = rng.standard_normal(seen[id(picture)].shape)
        yield seen[id(picture)] + [sight.noise @ row for sight, row in zip(sights, noise, strict=True)]


def _size(picture: Picture) -> Size:
    return tuple(picture.shape[1:]) if isinstance(picture, torch.Tensor) else picture.shape[:2]


@dataclass(frozen=True)
class _Sight:
    """Log-likelihoods of the alternatives at one place, from the N values of a window.

    The values are Gaussian with a mean for each alternative. Their covariance is diagonal but for the background's
    level, which all of them share as far as the background shows.

    Attributes:
        rows, columns: the window.
        grey: whether channels are averaged.
        base: [N], mean over the alternatives.
        weights, constant: [K, N] and [K]; log-likelihoods but for what all alternatives share.
        noise: [K, K], a root of the covariance of the noise.
        absent: the alternative that nothing is there, to which the log-likelihoods are relative; or None.
    """

    rows: slice
    columns: slice
    grey: bool
    base: np.ndarray
    weights: np.ndarray
    constant: np.ndarray
    noise: np.ndarray
    absent: "_Absent | None"

    def look(self, picture: Picture) -> np.ndarray:
        """The log-likelihoods [K] without noise."""
        if isinstance(picture, torch.Tensor):
            window = picture[:, self.rows, self.columns].permute(1, 2, 0).numpy()
        else:
            window = picture[self.rows, self.columns]
        values = (window.mean(2, dtype=np.float32) if self.grey else window.astype(np.float32)).ravel()
        found = (self.weights @ (values - self.base)).astype(np.float64) + self.constant
        return found if self.absent is None else found + self.absent.compare(values, values - self.base)


@dataclass(frozen=True)
class _Absent:
    """A window that shows the background alone, compared with one that shows a thing.

    Attributes:
        precision: [N], one over the variance of each value of the thing.
        shared: [N], of which the square is the correction for the common level of the background.
        plain: variance of a value of the background.
        constant: of the difference.
    """

    precision: np.ndarray
    shared: np.ndarray
    plain: float
    constant: float

    def compare(self, values: np.ndarray, rest: np.ndarray) -> float:
        """Log-likelihood of the thing, which leaves `rest` of the values unexplained, less that of the background."""
        thing = self.precision @ rest**2 - (self.shared @ rest) ** 2
        return float(((values - BACKGROUND) ** 2).sum() / self.plain - thing) / 2 + self.constant


@functools.lru_cache(maxsize=256)
def _sights(layout: Layout, size: Size, sd: float, kind: str, names: tuple[str, ...]) -> tuple[_Sight, ...]:
    if kind == "tags":
        return tuple(_tag_sight(layout, size, sd, strip, names) for strip in layout.strips)
    return tuple(_thing_sight(layout, size, sd, box, names) for box in layout.places)


def _thing_sight(layout: Layout, size: Size, sd: float, box: Box, texts: tuple[str, ...]) -> _Sight:
    covered, looks = _looks(layout, (box[1] - box[0], box[3] - box[2]), texts)
    rows, down = _resampling(layout.size[0], size[0], box[0], box[1])
    columns, across = _resampling(layout.size[1], size[1], box[2], box[3])
    beside = 1 - (down @ covered @ across.T).ravel()
    means = np.stack([(down @ look @ across.T).ravel() + BACKGROUND * beside for look in looks])
    noise = sd**2 / 3  # of the mean of three channels
    return _sight(rows, columns, True, means, beside, noise, absent=layout.changes == "card")


def _looks(layout: Layout, sides: Size, texts: tuple[str, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """What of a place hides the background, and the grey levels that every state adds there; of a disc, to it."""
    side = sides[0]
    if layout.changes == "card":
        return np.ones(sides), [card(sides, text, INK, PAPER).mean(2) for text in texts]
    if layout.changes == "disc":
        return np.zeros(sides), [_on_ring(layout, side, state) for state in range(RING)]
    paint, states = (_draw_lamp, 2) if layout.changes == "lamp" else (_draw_dial, 8)
    covered, looks = shape_mask("disc", side).astype(float), []
    for state in range(states):
        spot = np.zeros((side, side))
        paint(spot, state, layout.strength)
        looks.append(spot)
    return covered, looks


def _on_ring(layout: Layout, whole: int, state: int) -> np.ndarray:
    """What a disc adds to the mean background of the box of its ring, `whole` pixels wide."""
    side = layout.side
    radius, angle, spot = (whole - side) // 2, 2 * math.pi * state / RING, np.zeros((whole, whole))
    top, left = radius - round(radius * math.cos(angle)), radius + round(radius * math.sin(angle))
    spot[top : top + side, left : left + side][shape_mask("disc", side)] = DARK + layout.strength - BACKGROUND
    return spot


def _tag_sight(layout: Layout, size: Size, sd: float, strip: Box, colours: tuple[str, ...]) -> _Sight:
    rows, down = _resampling(layout.size[0], size[0], strip[0], strip[1])
    columns, across = _resampling(layout.size[1], size[1], strip[2], strip[3])
    panel = _resampling(layout.size[0], size[0], *layout.panel, rows)[1].sum(1)
    tag = np.outer(down.sum(1), across.sum(1)).ravel()
    behind = np.repeat(panel, across.shape[0])
    means = []
    for name in (*colours, None):
        colour = np.array((PANEL,) * 3 if name is None else COLOURS[name], float)
        level = tag[:, None] * colour + (behind - tag)[:, None] * PANEL + (1 - behind)[:, None] * BACKGROUND
        means.append(level.ravel())
    return _sight(rows, columns, False, np.stack(means), np.repeat(1 - behind, 3), sd**2)


def _sight(
    rows: slice, columns: slice, grey: bool, means: np.ndarray, beside: np.ndarray, noise: float, absent: bool = False
) -> _Sight:
    """The sight of alternatives with means [K, N]; `beside` [N]: the share of the background in each value.

    noise: variance of the noise of a value.
    """
    base = means.mean(0)
    precision = 1 / (noise + ROUNDING**2 + (SPREAD * beside) ** 2)
    # The inverse of a diagonal matrix plus a product of vectors (Sherman and Morrison).
    level = 1 / COMMON**2 + precision @ beside**2
    shared = precision * beside / math.sqrt(level)
    weights = (means - base) * precision
    weights -= np.outer((means - base) @ shared, shared)
    values, vectors = np.linalg.eigh(noise * weights @ weights.T)
    other = None
    if absent:
        plain = noise + COMMON**2 + SPREAD**2
        constant = (np.log(precision * plain).sum() - math.log(level * COMMON**2)) / 2
        other = _Absent(precision.astype(np.float32), shared.astype(np.float32), plain, float(constant))
    return _Sight(
        rows, columns, grey, base.astype(np.float32), weights.astype(np.float32),
        -(weights * (means - base)).sum(1) / 2, vectors * np.sqrt(values.clip(min=0)), other,
    )  # fmt: skip


def _resampling(pixels: int, out: int, first: int, last: int, rows: slice | None = None) -> tuple[slice, np.ndarray]:
    """The rows of a picture that show the rows `first` to `last` of a frame, and the weights [rows, last - first].

    Args:
        pixels, out: rows of the frame and of the picture.
        rows: of the picture, if they are known.
    """
    weights = _weights(pixels, out, first, last)
    if rows is None:
        shown = np.flatnonzero(np.abs(weights).sum(1) > LEAST)
        rows = slice(int(shown[0]), int(shown[-1]) + 1)
    return rows, weights[rows]


@functools.lru_cache(maxsize=512)
def _weights(pixels: int, out: int, first: int, last: int) -> np.ndarray:
    """The weights of the frame's rows in the picture's, as the encoder resamples: float32 [out, last - first]."""
    unit = torch.zeros(1, 1, pixels, last - first)
    unit[0, 0, first:last] = torch.eye(last - first)
    return F.interpolate(unit, (out, last - first), mode="bicubic", antialias=True, align_corners=False)[0, 0].numpy()
