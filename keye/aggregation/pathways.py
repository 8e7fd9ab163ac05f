"""The two pathways of SlowFast-LLaVA over encoded frames: which frames are slow, and how tokens are pooled."""

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from keye.aggregation.blocks import MAX, MEAN, aggregate, block_tokens, make_blocks
from keye.checks import integer
from keye.errors import KeyeError

Layout = Literal["slow_then_fast", "time"]
LAYOUTS = ("slow_then_fast", "time")
_LIST_FACTOR = (1, 2)


def slow_indices(frames: int, slow: int = 10) -> list[int]:
    """The slow frames of `frames` frames: `slow` + 1 evenly spaced values from 0 to `frames`, truncated, without the
    last (arXiv 2407.15841, released code).

    With fewer frames than `slow`, some frames appear more than once.
    """
    integer("frames", frames)
    integer("slow", slow)
    return [place * frames // slow for place in range(slow)]


def sample_frames(total: int, frames: int = 50) -> list[int]:
    """The frames that the release reads of a video of `total` frames: the middle of each of `frames` equal segments.

    A segment is (total − 1) / `frames` long and its ends are rounded. With fewer than `frames` frames, some frames
    appear more than once.
    """
    integer("total", total)
    integer("frames", frames)
    length = (total - 1) / frames
    return [(round(length * place) + round(length * (place + 1))) // 2 for place in range(frames)]


@dataclass(frozen=True)
class Pooling:
    """How the grid of a frame's tokens is pooled, either by a factor or to a size.

    Raises:
        KeyeError: both of factor and size are given or neither, or a value is impossible.
    """

    kind: Literal["mean", "max", "list"] = "mean"
    """"mean" and "max" over the cells of a grid; "list": the maximum over runs of the row-major list (the release)."""

    factor: tuple[int, int] | None = None
    """(rows, columns) that one token replaces; an odd row or column remains as one token."""

    size: tuple[int, int] | None = None
    """(rows, columns) of the pooled grid, at most those of the frame."""

    def __post_init__(self) -> None:
        if self.kind not in ("mean", "max", "list"):
            raise KeyeError(f"pooling is {self.kind!r}; use mean, max or list")
        if (self.factor is None) == (self.size is None):
            raise KeyeError("pooling needs a factor or a size; give one of factor=(1, 2) and size=(4, 4)")
        given = self.size if self.factor is None else self.factor
        if not isinstance(given, list | tuple) or len(given) != 2:
            raise KeyeError(f"pooling has {given!r}; give two whole numbers, (rows, columns)")
        for value in given:
            integer("factor" if self.factor else "size", value)
        if self.kind == "list" and (self.factor is None or math.prod(self.factor) < 2):
            raise KeyeError("pooling of kind list needs a factor of two tokens or more; give factor=(1, 2)")

    def entry(self, height: int, width: int) -> tuple[int, int, int]:
        """(rows, columns, kind) of the block of a frame of `height` x `width` tokens."""
        if self.kind == "list":
            run = math.prod(self.factor)
            total = max(1, height * width // run)
            whole = self.factor[0] == 1 and width % run == 0
            return (height, width // run, run) if whole else (1, total, run)
        if self.factor is not None:
            rows, columns = -(-height // self.factor[0]), -(-width // self.factor[1])
        else:
            rows, columns = min(self.size[0], height), min(self.size[1], width)
        return rows, columns, MAX if self.kind == "max" else MEAN


@dataclass(frozen=True)
class SlowFastAggregation:
    """Slow tokens of a few frames and fast tokens of every frame, pooled from features that are computed once.

    Calling it pools features; `blocks` tells in advance which tokens there will be.

    Raises:
        KeyeError: a value is impossible.
    """

    slow: int = 10
    """Slow frames, spread as `slow_indices` says; 0 for none."""

    slow_pool: Pooling | None = Pooling("max", factor=(1, 2))
    """Pooling of slow frames; None keeps all their tokens."""

    fast_pool: Pooling | None = Pooling("mean", size=(4, 4))
    """Pooling of fast frames, which are all frames; None for no fast pathway."""

    layout: Layout = "slow_then_fast"
    """All slow tokens and then all fast ones, or frame after frame, a frame's slow tokens first."""

    max_tokens: int | None = None
    """Most tokens of a video. Where it binds, fast grids become smaller, then slow frames fewer, then slow grids
    smaller, and at last fast frames fewer."""

    def __post_init__(self) -> None:
        integer("slow", self.slow, 0)
        if self.layout not in LAYOUTS:
            raise KeyeError(f"layout is {self.layout!r}; use one of {', '.join(LAYOUTS)}")
        for name in ("slow_pool", "fast_pool"):
            if not isinstance(getattr(self, name), Pooling | None):
                raise KeyeError(
                    f'{name} is {getattr(self, name)!r:.60}; give a Pooling such as Pooling("mean", size=(4, 4))'
                )
        if self.slow == 0 and self.fast_pool is None:
            raise KeyeError("slow is 0 and there is no fast pathway; give slow frames or a fast_pool")
        if self.max_tokens is not None:
            integer("max_tokens", self.max_tokens)

    @classmethod
    def released(cls, **changes: object) -> Self:
        """The release of SlowFast-LLaVA: 3,680 tokens of 50 frames of 24 x 24 tokens.

        10 slow frames, of which the maximum over pairs of the row-major list is taken, and 4 x 4 tokens of every frame.
        """
        return cls(**{"slow_pool": Pooling("list", factor=_LIST_FACTOR), **changes})

    @classmethod
    def trained(cls, **changes: object) -> Self:
        """SlowFast-LLaVA-1.5 (arXiv 2503.18943) as others describe it: 32 slow frames pooled 2 x 2, fast ones 4 x 4.

        128 frames of 24 x 24 tokens give 9,216 tokens; the paper says about 9,000. The exact grid is not published.
        """
        pools = {"slow_pool": Pooling("mean", factor=(2, 2)), "fast_pool": Pooling("mean", factor=(4, 4))}
        return cls(**{"slow": 32, **pools, **changes})

    def __call__(self, features: Tensor) -> Tensor:
        """Features `[T, H, W, D]` of all frames → `[V, D]`, the tokens that the model reads; differentiable."""
        if features.ndim != 4:
            raise KeyeError(f"features have the shape {list(features.shape)}; give [frames, rows, columns, channels]")
        frames, height, width, _ = features.shape
        grids = torch.tensor([[height, width]]).expand(frames, 2)
        return aggregate(features.flatten(0, 2), grids, self.blocks(frames, height, width))

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens of a video of `frames` frames of `height` x `width` tokens; never above `max_tokens`."""
        return int(block_tokens(self.blocks(frames, height, width)).sum())

    def blocks(self, frames: int, height: int, width: int) -> Tensor:
        """Blocks `[K, 5]` (`keye.aggregation.blocks`) of `frames` frames of `height` x `width` tokens."""
        fitted, kept = self._fitted(integer("frames", frames), integer("height", height), integer("width", width))
        entries = []
        if fitted.slow:
            entry = (height, width, MEAN) if fitted.slow_pool is None else fitted.slow_pool.entry(height, width)
            entries += [(source, *entry) for source in slow_indices(frames, fitted.slow)]
        if fitted.fast_pool is not None:
            entries += [(source, *fitted.fast_pool.entry(height, width)) for source in kept]
        if fitted.layout == "time":  # a stable sort: a frame's slow tokens stay before its fast ones
            entries.sort(key=lambda entry: entry[0])
        return make_blocks(frames, entries)

    def _fitted(self, frames: int, height: int, width: int) -> tuple[Self, list[int]]:
        """This aggregation with what fits `max_tokens`, and the fast frames that remain."""
        every = list(range(frames))
        if self.max_tokens is None:
            return self, every
        for trial in self._concessions(height, width):
            if trial._count(frames, height, width) <= self.max_tokens:
                return trial, every
        # One token of every frame is too much: as many frames as there is room for, spread evenly.
        return trial, [place * frames // self.max_tokens for place in range(self.max_tokens)]

    def _concessions(self, height: int, width: int) -> list[Self]:
        """This aggregation and ever smaller ones; the last has one slow token, or one token of each fast frame."""
        trials = [self]
        while (one := trials[-1]._smaller("fast_pool", height, width)) is not None:
            trials.append(one)
        least = 1 if self.slow else 0
        trials += [replace(trials[-1], slow=slow) for slow in range(self.slow - 1, least - 1, -1)]
        while trials[-1].slow and (one := trials[-1]._smaller("slow_pool", height, width)) is not None:
            trials.append(one)
        if self.slow and self.fast_pool is not None:
            trials.append(replace(trials[-1], slow=0))
        return trials

    def _smaller(self, name: str, height: int, width: int) -> Self | None:
        """The same with one row or column less in a pathway's grid; None where one token is left."""
        pooling = getattr(self, name)
        if pooling is None and name == "fast_pool":
            return None
        rows, columns, kind = (height, width, MEAN) if pooling is None else pooling.entry(height, width)
        if rows * columns == 1:
            return None
        if columns == 1 or (rows > 1 and rows * width >= columns * height):
            rows -= 1
        else:
            columns -= 1
        smaller = Pooling("mean" if kind == MEAN else "max", size=(min(rows, height), min(columns, width)))
        return replace(self, **{name: smaller})

    def _count(self, frames: int, height: int, width: int) -> int:
        slow = height * width
        if self.slow_pool is not None:
            slow = math.prod(self.slow_pool.entry(height, width)[:2])
        fast = 0 if self.fast_pool is None else math.prod(self.fast_pool.entry(height, width)[:2])
        return self.slow * slow + frames * fast
