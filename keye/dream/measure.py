"""How well a dreamed walk agrees with the drawn place: PSNR, consistency of a revisited place, cuts.

The paper compares places by features of a ResNet-18 and counts cuts by PySceneDetect. Here the truth is known to the
pixel, and the camera moves a quarter of the view a frame, which a detector of colour changes calls a cut every time. So
places are compared by their pixels, and a cut is a contradiction between a frame and its predecessor where both show
the same part of the place.
"""

import math

import torch
from torch import Tensor

from keye.dream.scenes import CHUNK, SIZE, Path

CUT = 0.25
"""Root mean square difference, in the range 0 … 1 of pixels, of the shared part of two frames above which it is a cut.
Two independent views of drawn places differ by about 0.45."""


def psnr(dreamed: Tensor, truth: Tensor, where: Tensor | None = None) -> float:
    """PSNR in dB of pixels in −1 … 1, [..., 3, S, S]; `where`, bool [..., S, S], selects pixels.

    NaN if there are none.
    """
    errors = ((dreamed - truth) / 2).square().mean(-3)
    chosen = errors if where is None else errors[where]
    return -10 * math.log10(max(float(chosen.mean()), 1e-10)) if chosen.numel() else math.nan


def consistency(first: Tensor, later: Tensor) -> float:
    """Cosine of two views of one place [3, S, S], each less its mean colour: 1 = the same, 0 = unrelated."""
    one, other = (view - view.mean((1, 2), keepdim=True) for view in (first, later))
    norm = (one.norm() * other.norm()).clamp_min(1e-6)
    return float((one * other).sum() / norm)


def from_memory(path: Path, start: int, past: int = CHUNK) -> Tensor:
    """Pixels of a chunk that only a memory can show right: seen before, but not in the frames that it is made from.

    Args:
        start: index of the chunk's first frame. past: clean frames that the chunk is generated from.

    Returns:
        bool [4, S, S].
    """
    since = max(start - past, 0)
    found = []
    for frame in range(start, start + CHUNK):
        corner = path.corners[frame].tolist()
        known = _visible(path, corner, range(since, start))
        found.append(_visible(path, corner, range(since)) & ~known)
    return torch.stack(found)


def cuts(frames: Tensor, path: Path) -> int:
    """Frames that contradict their predecessor where both show the same part of the place, in frames [N, 3, S, S]."""
    count = 0
    for index in range(1, len(frames)):
        (top, left), (row, column) = path.corners[index - 1].tolist(), path.corners[index].tolist()
        down, right = row - top, column - left
        now = frames[index][:, max(0, -down) : SIZE - max(0, down), max(0, -right) : SIZE - max(0, right)]
        before = frames[index - 1][:, max(0, down) : SIZE - max(0, -down), max(0, right) : SIZE - max(0, -right)]
        count += float(((now - before) / 2).square().mean().sqrt()) > CUT
    return count


def _visible(path: Path, corner: list[int], frames: range) -> Tensor:
    """Which pixels of the view at a corner some of the frames show, bool [S, S]."""
    seen = torch.zeros(path.picture.shape[1:], dtype=torch.bool)
    for frame in frames:
        row, column = path.corners[frame].tolist()
        seen[row : row + SIZE, column : column + SIZE] = True
    return seen[corner[0] : corner[0] + SIZE, corner[1] : corner[1] + SIZE]
