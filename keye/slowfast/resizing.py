"""Resizing frames and cutting them into patches, in as many threads as torch may use."""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from keye.slowfast.budget import SIDE
from keye.slowfast.threads import allowed_threads, over_threads


def resize(frames: torch.Tensor, size: tuple[int, int], mode: str = "bilinear") -> torch.Tensor:
    """Frames uint8 [T, 3, H, W] resized to `size` (height, width) with antialiasing, rounded to uint8.

    On the CPU frames are resized in parallel threads; torch's kernel resizes one frame after the other. On other
    devices torch has no such kernel for bytes; two matrix products give the same bytes.
    """
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    if frames.device.type != "cpu":
        return resize_by_products(frames, size, mode)
    planar = _reads_planes(frames, size)
    if not planar:
        # Flattening and unflattening gives a single frame, too, the strides by which torch recognises interleaving.
        pixels = frames.permute(0, 2, 3, 1).contiguous()
        frames = pixels.flatten(0, 1).unflatten(0, pixels.shape[:2]).permute(0, 3, 1, 2)
    if len(frames) < 2 or allowed_threads() < 2:
        return F.interpolate(frames, size=size, mode=mode, antialias=True, align_corners=False)
    resized = frames.new_empty(len(frames), 3, *size) if planar else frames.new_empty(len(frames), *size, 3)
    resized = resized if planar else resized.permute(0, 3, 1, 2)

    def resize_one(frame: torch.Tensor, target: torch.Tensor) -> None:
        copy(resize(frame[None], size, mode)[0], target)

    over_threads(resize_one, frames, resized)
    return resized


def resize_by_products(frames: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """`resize` as two products with matrices of weights, to the bit, on any device: first the columns, then the rows.

    The weights are integers, and a sum of them times bytes is exact in float64.
    """
    for axis in (1, 0):
        if frames.shape[axis - 2] != size[axis]:
            weights, precision = _weights(frames.shape[axis - 2], size[axis], mode)
            weights, values = weights.to(frames.device), frames.double()
            sums = values @ weights.T if axis else weights @ values
            frames = torch.floor((sums + 2 ** (precision - 1)) / 2**precision).clamp(0, 255).to(torch.uint8)
    return frames


@lru_cache(maxsize=64)
def _weights(before: int, after: int, mode: str) -> tuple[torch.Tensor, int]:
    """Weights float64 [after, before] of a resized axis, integers of 16 bits as in torch's kernel, and their precision.

    A weight is the integer over 2 ** precision.
    """
    kernel, reach = {"bilinear": (_triangle, 1.0), "bicubic": (_cubic, 2.0)}[mode]
    scale = before / after
    widening = max(scale, 1.0)
    weights = torch.zeros(after, before, dtype=torch.float64)
    for place in range(after):
        centre, support = scale * (place + 0.5), reach * widening
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), before)
        row = [kernel((at - centre + 0.5) / widening) for at in range(first, last)]
        weights[place, first:last] = torch.tensor(row, dtype=torch.float64) / sum(row)
    largest, precision = float(weights.max()), 0
    while precision < 22 and int(0.5 + largest * 2 ** (precision + 1)) < 2**15:
        precision += 1
    scaled = weights * 2**precision
    return torch.trunc(scaled + 0.5 * scaled.sign()), precision


def _triangle(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _cubic(x: float, a: float = -0.5) -> float:
    """The cubic convolution kernel with the parameter of antialiased resizing."""
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return a * (((x - 5) * x + 8) * x - 4) if x < 2 else 0.0


def _reads_planes(frames: torch.Tensor, size: tuple[int, int]) -> bool:
    """Whether the uint8 kernel takes frames as planes, with the same result as for interleaved colours.

    It is faster on interleaved colours, but interleaving takes longer than that saves, except for larger results.
    """
    return frames.is_contiguous() and size[0] * size[1] <= frames.shape[-2] * frames.shape[-1]


def copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """`target.copy_(source)` in this thread only; on the CPU torch would use all of its threads."""
    if target.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)


def patches(frames: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Frames [T, C, H, W] cut into patches [T, P, C, side, side] in raster order; H and W are multiples of `side`."""
    count, channels, height, width = frames.shape
    grid = frames.reshape(count, channels, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels, side, side)
