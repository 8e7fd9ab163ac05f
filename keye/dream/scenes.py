"""Drawn places that a camera walks through: an action moves it, it leaves a place and returns, and the truth is known.

A map has cells of 8 × 8 pixels, each with a background colour and a shape of another colour. The camera sees a window
of 16 × 16 pixels. One action (right, left, up, down) lasts a chunk of 4 frames and moves the window by 4 pixels a
frame, so after one chunk nothing of the former view is visible.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ACTIONS = ("right", "left", "up", "down")
NO_ACTION = len(ACTIONS)
"""The index of no condition: that of a frame that no known action led to."""
MOVES = ((0, 1), (0, -1), (-1, 0), (1, 0))  # (rows, columns)
SIZE, STEP, CELL, CHUNK = 16, 4, 8, 4
COLOURS = np.array(
    [
        (0.85, 0.15, 0.15), (0.15, 0.70, 0.20), (0.20, 0.30, 0.90), (0.95, 0.85, 0.20),
        (0.60, 0.20, 0.75), (0.95, 0.95, 0.95), (0.10, 0.75, 0.80), (0.12, 0.12, 0.12),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Path:
    """A walk over a map.

    Attributes:
        picture: the map, float32 [3, H, W] in −1 … 1.
        actions: index in `ACTIONS` of each chunk.
        corners: (top, left) of the window in every frame, the start first: int64 [1 + 4 · chunks, 2].
        outward: number of chunks before the camera turns back.
    """

    picture: Tensor
    actions: tuple[int, ...]
    corners: Tensor
    outward: int

    @property
    def frames(self) -> Tensor:
        """What the camera sees, float32 [1 + 4 · chunks, 3, 16, 16] in −1 … 1."""
        views = [self.picture[:, top : top + SIZE, left : left + SIZE] for top, left in self.corners.tolist()]
        return torch.stack(views)


def draw_map(rng: np.random.Generator, rows: int, columns: int) -> Tensor:
    """A map of rows × columns cells, float32 [3, 8 · rows, 8 · columns] in −1 … 1; cells are drawn independently."""
    picture = np.empty((3, rows * CELL, columns * CELL), np.float32)
    for row in range(rows):
        for column in range(columns):
            ground, ink = rng.choice(len(COLOURS), 2, replace=False)
            mask = shape_mask(int(rng.integers(0, 5)))
            cell = np.where(mask, COLOURS[ink][:, None, None], COLOURS[ground][:, None, None])
            picture[:, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = cell
    return torch.from_numpy(picture * 2 - 1)


def shape_mask(kind: int) -> np.ndarray:
    """A shape of a cell, bool [8, 8]: nothing, square, disc, cross or bar."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    return (
        np.zeros((CELL, CELL), bool),
        np.maximum(abs(y), abs(x)) < 2.6,
        y**2 + x**2 < 8,
        np.minimum(abs(y), abs(x)) < 1,
        abs(y) < 1.6,
    )[kind]


def walk(actions: tuple[int, ...], rng: np.random.Generator, outward: int | None = None) -> Path:
    """The walk of these actions over a map drawn large enough for it."""
    moves = [MOVES[action] for action in actions for _ in range(CHUNK)]
    corners = np.vstack([(0, 0), np.cumsum(np.array(moves) * STEP, axis=0)])
    corners = corners - corners.min(axis=0)
    corners = corners + STEP * rng.integers(0, 2, 2)  # the grid of cells starts anywhere in steps of the camera
    rows, columns = (int(value) // CELL + 1 for value in corners.max(axis=0) + SIZE)
    picture = draw_map(rng, rows, columns)
    return Path(picture, tuple(actions), torch.from_numpy(corners), len(actions) if outward is None else outward)


def opposite(action: int) -> int:
    """The action that undoes another; none undoes none."""
    return action if action == NO_ACTION else action ^ 1


def any_walk(rng: np.random.Generator, chunks: int) -> Path:
    """A walk of random actions, which may turn back at any time."""
    return walk(tuple(int(action) for action in rng.integers(0, len(ACTIONS), chunks)), rng)


def returning_walk(rng: np.random.Generator, chunks: int = 2) -> Path:
    """Leaves the start for some chunks and returns the same way; no chunk of the way out undoes an earlier one."""
    horizontal, vertical = int(rng.integers(0, 2)), int(rng.integers(2, 4))
    out = tuple(horizontal if rng.random() < 0.5 else vertical for _ in range(chunks))
    return walk((*out, *(opposite(action) for action in reversed(out))), rng, chunks)


def circling_walk(rng: np.random.Generator) -> Path:
    """Leaves the start and returns to it from another side: two chunks out, two back, around a square."""
    first, second = int(rng.integers(0, 2)), int(rng.integers(2, 4))
    if rng.random() < 0.5:
        first, second = second, first
    return walk((first, second, opposite(first), opposite(second)), rng, 3)
