"""Resizing frames and cutting them into patches, in as many threads as torch may use."""

import numpy as np
import torch
import torch.nn.functional as F

from keye.slowfast.budget import SIDE
from keye.slowfast.threads import allowed_threads, over_threads


def resize(frames: torch.Tensor, size: tuple[int, int], mode: str = "bilinear") -> torch.Tensor:
    """Frames uint8 [T, 3, H, W] resized to `size` (height, width) with antialiasing, rounded to uint8.

    On the CPU frames are resized in parallel threads; torch's kernel resizes one frame after the other.
    """
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    on_cpu, planar = frames.device.type == "cpu", _reads_planes(frames, size)
    if not planar:
        # Flattening and unflattening gives a single frame, too, the strides by which torch recognises interleaving.
        pixels = frames.permute(0, 2, 3, 1).contiguous()
        frames = pixels.flatten(0, 1).unflatten(0, pixels.shape[:2]).permute(0, 3, 1, 2)
    if not on_cpu or len(frames) < 2 or allowed_threads() < 2:
        return F.interpolate(frames, size=size, mode=mode, antialias=True, align_corners=False)
    resized = frames.new_empty(len(frames), 3, *size) if planar else frames.new_empty(len(frames), *size, 3)
    resized = resized if planar else resized.permute(0, 3, 1, 2)

    def resize_one(frame: torch.Tensor, target: torch.Tensor) -> None:
        copy(resize(frame[None], size, mode)[0], target)

    over_threads(resize_one, frames, resized)
    return resized


def _reads_planes(frames: torch.Tensor, size: tuple[int, int]) -> bool:
    """Whether the uint8 kernel takes frames as planes, with the same result as for interleaved colours.

    It is faster on interleaved colours, but interleaving takes longer than that saves, except for larger results.
    """
    planes = frames.device.type == "cpu" and frames.is_contiguous()
    return planes and size[0] * size[1] <= frames.shape[-2] * frames.shape[-1]


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
