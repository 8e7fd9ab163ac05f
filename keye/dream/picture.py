"""A picture of a walk: its map, the true views, and the views that each kind of memory dreams."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from keye.dream.scenes import ACTIONS, CHUNK, SIZE
from keye.dream.scenes import Path as Walk
from keye.errors import writing


def draw_walk(walk: Walk, dreamed: Mapping[str, Tensor], out: str | Path, title: str = "") -> None:
    """Draw a map with the camera's way, and a row of views for the truth and for each dream.

    Of every chunk its second and its last view are shown. Generated views have a red frame.

    Args:
        dreamed: name → frames float [N, 3, S, S] in −1 … 1, as many as the walk's. out: a PNG or PDF file.

    Raises:
        KeyeError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = {"truth": walk.frames, **dreamed}
    shown = [0, *(1 + chunk * CHUNK + at for chunk in range(len(walk.actions)) for at in (1, CHUNK - 1))]
    figure = Figure(figsize=(1.0 * len(shown) + 3.6, 1.06 * len(rows) + 0.7), layout="constrained")
    grid = figure.add_gridspec(len(rows), len(shown) + 3)
    place = figure.add_subplot(grid[:, :3])
    place.imshow(_pixels(walk.picture))
    centres = walk.corners.numpy() + SIZE / 2 - 0.5
    place.plot(centres[:, 1], centres[:, 0], "-", color="white", linewidth=3)
    place.plot(centres[:, 1], centres[:, 0], "o-", color="red", markersize=3, linewidth=1)
    top, left = walk.corners[0].tolist()
    place.add_patch(Rectangle((left - 0.5, top - 0.5), SIZE, SIZE, fill=False, edgecolor="red", linewidth=2))
    place.set_title("the place and the camera's way", fontsize=8)
    place.axis("off")
    for row, (name, frames) in enumerate(rows.items()):
        for column, index in enumerate(shown):
            view = figure.add_subplot(grid[row, column + 3])
            view.imshow(_pixels(frames[index]))
            view.set_xticks([])
            view.set_yticks([])
            generated = row > 0 and index > walk.outward * CHUNK
            view.spines[:].set(color="red" if generated else "black", linewidth=2 if generated else 0.5)
            if row == 0:
                action = ACTIONS[walk.actions[(index - 1) // CHUNK]] if index else "start"
                view.set_title(action, fontsize=8)
            if column == 0:
                view.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    if title:
        figure.suptitle(title, fontsize=9)
    with writing(out, "the picture"):
        figure.savefig(out, dpi=110)


def _pixels(picture: Tensor) -> np.ndarray:
    """[3, H, W] in −1 … 1 → float32 [H, W, 3] in 0 … 1."""
    return (picture.float().permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).cpu().numpy()
