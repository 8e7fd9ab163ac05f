"""Frames kept until their sizes are known: the budget is shared out only once every frame has its type.

Small clips are kept whole and resized once. Of larger ones a frame is kept at twice the pixels that it can still be
needed at: the most a slow frame can get is what it gets if all frames still to come are fast, and this bound falls with
every slow frame. So what is kept is bounded by the token budget (in uint8, up to five times its pixels), however long
the clip.
"""

import math
from collections.abc import Sequence

import torch

from keye.slowfast.policies import SLOW, Limits, Policy
from keye.slowfast.resizing import copy, resize

SLAB = 48 << 20  # bytes; glibc maps what is above 32 MiB by itself, and unmaps it when it is freed
WHOLE = 256 << 20  # bytes of uint8 frames that are kept as they are
# Pixels of a kept frame over the most it can be needed at. A second resize to nearly the same size blurs by up to
# 1.1 of 255 in the mean (at 1.2 times the pixels); from twice the pixels it is 0.6, where 1 is the promise.
SPARE = 2.0
Size = tuple[int, int]


class FrameBuffer:
    """Keeps the sampled frames of one clip of which at most `expected` come.

    A policy that sees the whole clip before it decides leaves the types open when a frame comes; then only clips that
    can be kept whole are kept, and `frames` stays empty for the others: read them again.
    """

    def __init__(self, limits: Limits, expected: int, policy: Policy):
        self._limits, self._expected, self._policy = limits, expected, policy
        height, width = limits.size
        self._whole = 3 * height * width * expected <= WHOLE
        self._slow = 0
        self._bounds: tuple[Size, Size] = (limits.size, limits.size)
        self._slab, self._used = torch.empty(0, dtype=torch.uint8), 0
        self.frames: list[torch.Tensor] = []

    def add(self, pixels: torch.Tensor, types: Sequence[int]) -> None:
        """Keep the next frames [T, 3, H, W] uint8 of the given types (0 slow, 1 fast; empty if not known yet)."""
        if self._whole:
            self.frames += [self._stored(frame) for frame in pixels]
        elif self._policy.online:
            for frame, kind in zip(pixels, types, strict=True):
                if kind == SLOW:
                    self._slow += 1
                    rest = max(self._expected - self._slow, 0)
                    slow_bound, fast_bound = self._limits.bounds(self._slow, self._slow + rest)
                    self._bounds = (self._spared(slow_bound), self._spared(fast_bound))
                self.frames.append(self._stored(resize(frame[None], self._bounds[kind], "bicubic")[0]))

    def serve(self, positions: Sequence[int], sizes: Sequence[Size]) -> bool:
        """Whether frame `positions[i]` was kept large enough for `sizes[i]`, for all i."""
        if not self.frames:
            return False
        kept = [tuple(frame.shape[1:]) for frame in self.frames]
        return all(
            kept[position] == self._limits.size or (kept[position][0] >= size[0] and kept[position][1] >= size[1])
            for position, size in zip(positions, sizes, strict=True)
        )

    def release(self, position: int) -> torch.Tensor:
        """Frame `position`, which is kept no longer."""
        frame, self.frames[position] = self.frames[position], torch.empty(0)
        return frame

    def _stored(self, frame: torch.Tensor) -> torch.Tensor:
        """A copy of the frame in a slab of memory that goes back to the system when all its frames are released.

        Frames by themselves lie among whatever else is allocated, and the allocator keeps what they leave.
        """
        size = frame.numel()
        if self._used + size > len(self._slab) or self._slab.device != frame.device:
            self._slab, self._used = frame.new_empty(max(SLAB, size)), 0
        place = self._slab[self._used : self._used + size].view(*frame.shape[1:], 3)  # channels last, as resizing wants
        self._used += size
        copy(frame.permute(1, 2, 0), place)
        return place.permute(2, 0, 1)

    def _spared(self, size: Size) -> Size:
        """`SPARE` times the pixels of `size`, or the clip's own size where that is smaller."""
        height, width = (math.ceil(side * math.sqrt(SPARE)) for side in size)
        own = self._limits.size
        return (height, width) if height * width < own[0] * own[1] else own
