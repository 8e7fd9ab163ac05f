"""Frames kept until their sizes are known, which is once every frame has its type.

Frames of small clips are kept at full size and resized once. A frame of a larger clip is kept at twice the pixels of an
upper bound of its final size: the size of a slow frame if all later frames are fast, which falls with every slow frame.
When the bound has fallen to half, all kept frames are reduced to it. Memory is therefore bounded by the token budget,
whatever the clip's length: frames that exceed `MOST_KEPT` times its pixels in uint8 are not kept.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from keye.slowfast.concessions import concession_bounds
from keye.slowfast.policies import SLOW, Limits, Policy
from keye.slowfast.resizing import copy, resize

SLAB = 48 << 20  # bytes; glibc maps blocks above 32 MiB on their own, and unmaps them when they are freed
FULL_SIZE_BYTES = 256 << 20  # clips of at most this many bytes (uint8) are kept at full size
# Pixels of a kept frame over those of its largest possible size. A second resize to nearly the same size changes pixels
# by up to 1.1 of 255 on average (at 1.2 times the pixels), from twice the pixels by 0.6; the guarantee is 1.
SPARE = 2.0
MOST_KEPT = 5  # times the pixels of the budget; a clip that needs more is read again
Size = tuple[int, int]


class FrameBuffer:
    """Keeps the sampled frames of one clip, at most `expected` of them.

    Under a policy that needs all frames to decide, types are unknown when frames arrive. Clips that cannot be kept at
    full size are then not kept at all, and `entries` reads them again.
    """

    def __init__(self, limits: Limits, expected: int, policy: Policy):
        self._limits, self._expected, self._policy = limits, expected, policy
        height, width = limits.size
        self._full_size = 3 * height * width * expected <= FULL_SIZE_BYTES
        self._slow = 0
        self._bounds: tuple[Size, Size] = (limits.size, limits.size)
        self._reduced_to = limits.size  # the bound of slow frames when all frames were last reduced to it
        self._bytes, self._most_bytes = 0, MOST_KEPT * 3 * limits.max_tokens * limits.side**2
        self._slab, self._used = torch.empty(0, dtype=torch.uint8), 0
        self._types: list[int] = []
        self.frames: list[torch.Tensor] = []

    def add(self, pixels: torch.Tensor, types: Sequence[int]) -> None:
        """Keep the next frames uint8 [T, 3, H, W] with their types (0 slow, 1 fast; empty if not known yet)."""
        if self._full_size:
            self.frames += [self._stored(frame) for frame in pixels]
        elif self._policy.online and (not self._limits.multiple or self._bytes <= self._most_bytes):
            for frame, kind in zip(pixels, types, strict=True):
                if kind == SLOW:
                    self._slow += 1
                    self._bounds = tuple(self._spared(bound) for bound in self._bounds_of(self._slow))
                self.frames.append(self._stored(resize(frame[None], self._bounds[kind], "bicubic")[0]))
                self._types.append(kind)
                self._bytes += self.frames[-1].numel()
            if self._limits.multiple:
                self._limit()

    def _bounds_of(self, slow: int) -> tuple[Size, Size]:
        if self._limits.multiple:
            return concession_bounds(self._limits, slow)
        return self._limits.bounds(slow, max(self._expected, slow))

    def _limit(self) -> None:
        if 2 * math.prod(self._bounds[SLOW]) <= math.prod(self._reduced_to):
            self._reduce()
        if self._bytes > self._most_bytes:
            self.frames, self._slab = [], self._slab[:0].clone()

    def _reduce(self) -> None:
        """Reduce all frames to the present bounds, in new slabs, so that the memory of the old ones returns."""
        self._reduced_to, self._slab, self._used = self._bounds[SLOW], self._slab[:0].clone(), 0
        for place, kind in enumerate(self._types):
            frame = self.frames[place]
            smaller = math.prod(frame.shape[1:]) > math.prod(self._bounds[kind])
            size = self._bounds[kind] if smaller else tuple(frame.shape[1:])
            self.frames[place] = self._stored(resize(frame[None], size, "bicubic")[0])
        self._bytes = sum(frame.numel() for frame in self.frames)

    def entries(
        self, positions: Sequence[int], sizes: Sequence[Size], frames: Iterable[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """The frame uint8 [3, H, W] of each entry of a plan, no smaller than the entry's size.

        Each kept frame is released once it has been yielded for the last time.

        Args:
            positions: which sampled frame each entry shows, in ascending order.
            sizes: (height, width) of each entry.
            frames: a second pass over the sampled frames, iterated only where a kept frame is too small.
        """
        if self.has(positions, sizes):
            for position, following in zip(positions, [*positions[1:], -1], strict=True):
                yield self.frames[position] if following == position else self._release(position)
            return
        entry = 0
        for position, frame in enumerate(frames):
            while entry < len(positions) and positions[entry] == position:
                yield frame
                entry += 1

    def has(self, positions: Sequence[int], sizes: Sequence[Size]) -> bool:
        """Whether frame `positions[i]` is kept at `sizes[i]` or larger, for all i."""
        if not self.frames:
            return False
        kept = [tuple(frame.shape[1:]) for frame in self.frames]
        return all(
            kept[position] == self._limits.size or (kept[position][0] >= size[0] and kept[position][1] >= size[1])
            for position, size in zip(positions, sizes, strict=True)
        )

    def _release(self, position: int) -> torch.Tensor:
        frame, self.frames[position] = self.frames[position], torch.empty(0)
        return frame

    def _stored(self, frame: torch.Tensor) -> torch.Tensor:
        """A copy of the frame in a slab of memory that returns to the system when all its frames are released.

        Frames allocated one by one share pages with other allocations, so the allocator would keep their memory.
        """
        size = frame.numel()
        if self._used + size > len(self._slab) or self._slab.device != frame.device:
            self._slab, self._used = frame.new_empty(max(SLAB, size)), 0
        place = self._slab[self._used : self._used + size].view(*frame.shape[1:], 3)  # channels last: fast to resize
        self._used += size
        copy(frame.permute(1, 2, 0), place)
        return place.permute(2, 0, 1)

    def _spared(self, size: Size) -> Size:
        """A size of `SPARE` times the pixels of `size`, or the clip's own size where that is smaller."""
        height, width = (math.ceil(side * math.sqrt(SPARE)) for side in size)
        own = self._limits.size
        return (height, width) if height * width < own[0] * own[1] else own
