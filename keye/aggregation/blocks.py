"""Blocks: which tokens a model reads of a video whose frames were encoded once, and the pooling that makes them.

A block is the pooled grid of one frame. Blocks are an int64 tensor [K, 5] or [K, 7] in the order in which the model
reads them:

    frames   encoded frames of the video, in the video's first block; 0 in its other blocks
    source   position of the block's frame among the encoded frames of its video
    rows     rows of the pooled grid
    columns  columns of the pooled grid
    kind     MEAN, MAX, or k of 2 or more: the maximum over runs of k tokens of the row-major list
    type     of the frame as this block shows it, 0 slow or 1 fast     } read by a motion pathway (`keye.motion`);
    time     of the frame in milliseconds, −1 where it is not known    } not there in [K, 5]

Blocks of several videos are joined by `join_blocks`: the column `frames` says where each video begins.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from keye.errors import KeyeError

MEAN, MAX = 0, 1
COLUMNS, TIMED_COLUMNS = 5, 7
UNKNOWN_TIME = -1


def make_blocks(frames: int, entries: Sequence[tuple[int, int, int, int]]) -> Tensor:
    """Blocks `[K, 5]` of one video of `frames` encoded frames.

    Args:
        frames: number of encoded frames.
        entries: (source, rows, columns, kind) of each block.

    Raises:
        KeyeError: there is no block, or a block names a frame that does not exist.
    """
    if not entries:
        raise KeyeError("a video without blocks has no tokens; give one block or more")
    if outside := [source for source, *_ in entries if not 0 <= source < frames]:
        raise KeyeError(f"a block reads frame {outside[0]} of a video of {frames} frames; give 0 to {frames - 1}")
    rows = [(0 if place else frames, *entry) for place, entry in enumerate(entries)]
    return torch.tensor(rows, dtype=torch.long)


def timed_blocks(blocks: Tensor, types: Sequence[int], seconds: Sequence[float]) -> Tensor:
    """Blocks `[K, 5]` with the type (0 slow, 1 fast) and the time of each block's frame, `[K, 7]`."""
    times = [round(1000 * value) for value in seconds]
    return torch.cat((blocks, torch.tensor([list(types), times], dtype=torch.long).T), dim=1)


def has_times(blocks: Tensor) -> bool:
    """Whether the blocks say the type and time of every frame."""
    return blocks.shape[1] == TIMED_COLUMNS and not bool((blocks[:, 6] == UNKNOWN_TIME).any())


def join_blocks(parts: Sequence[Tensor]) -> Tensor:
    """The blocks of several videos, with seven columns if any part has; times that a part lacks are unknown."""
    columns = max(part.shape[1] for part in parts)
    unknown = torch.tensor([[0, UNKNOWN_TIME]])
    return torch.cat([
        part if part.shape[1] == columns else torch.cat((part, unknown.to(part).expand(len(part), -1)), dim=1)
        for part in parts
    ])  # fmt: skip


def block_tokens(blocks: Tensor) -> Tensor:
    """Tokens of each block, LongTensor `[K]`."""
    return blocks[:, 2] * blocks[:, 3]


def block_sources(blocks: Tensor) -> Tensor:
    """The frame of each block among the encoded frames of all videos, LongTensor `[K]`."""
    first = blocks[:, 0].cumsum(0)
    video = (blocks[:, 0] > 0).cumsum(0) - 1
    starts = blocks[blocks[:, 0] > 0, 0]
    return blocks[:, 1] + first - starts[video]


def whole_frames(grids: Tensor) -> Tensor:
    """Blocks `[F, 5]` that read each of the encoded frames with `grids` `[F, 2]` once, as it is."""
    blocks = grids.new_zeros(len(grids), COLUMNS)
    blocks[:1, 0] = len(grids)
    blocks[:, 1] = torch.arange(len(grids), device=grids.device)
    blocks[:, 2:4] = grids
    return blocks


def needed_blocks(blocks: Tensor, needed: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Some of the blocks, over the frames that they read.

    Args:
        blocks: `[K, 5]`, of all videos.
        needed: bool `[K]`, which blocks.
        frames: number of encoded frames of all videos, F.

    Returns:
        bool `[F]`, the frames that these blocks read, and the blocks `[n, 5]` over those frames alone, as one video.

    Raises:
        KeyeError: the blocks are of another number of frames.
    """
    if int(blocks[:, 0].sum()) != frames:
        raise KeyeError(
            f"the blocks describe {int(blocks[:, 0].sum())} encoded frames and {frames} are given: "
            "prepare blocks and pixels with one call of the processor"
        )
    sources = block_sources(blocks)[needed]
    encoded = torch.zeros(frames, dtype=torch.bool, device=blocks.device).index_fill_(0, sources, True)
    kept = blocks[needed].clone()
    kept[:, 0] = 0
    kept[:1, 0] = encoded.sum()
    kept[:, 1] = encoded.cumsum(0)[sources] - 1
    return encoded, kept


def aggregate(features: Tensor, grids: Tensor, blocks: Tensor) -> Tensor:
    """The tokens of all blocks from the tokens of all encoded frames.

    Means are summed in float32, also of bfloat16 features. A grid that does not divide the frame's has bins
    [⌊i·H/h⌋, ⌈(i+1)·H/h⌉), so that each token of the frame is in at least one bin. A grid of the frame's own size
    leaves its tokens as they are, to the bit.

    Args:
        features: `[N, D]`, tokens of the frames in raster order, frame after frame.
        grids: LongTensor `[F, 2]`, rows and columns of tokens of each frame; their areas sum to N.
        blocks: `[K, 5]`, see the module's docstring.

    Returns:
        `[V, D]`, block after block in raster order, in the dtype of `features`.

    Raises:
        KeyeError: blocks, grids and features are of different videos.
    """
    _check(features, grids, blocks)
    frames, sources = features.split(grids.prod(1).tolist()), block_sources(blocks).tolist()
    sizes, shapes = grids.tolist(), blocks[:, 2:5].tolist()
    if sources == list(range(len(sizes))) and shapes == [[*size, MEAN] for size in sizes]:
        return features  # each frame as it is
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, (source, shape) in enumerate(zip(sources, shapes, strict=True)):
        groups.setdefault((*sizes[source], *shape), []).append(place)
    parts: list[Tensor] = [features[:0]] * len(shapes)
    for (height, width, rows, columns, kind), places in groups.items():
        stacked = torch.stack([frames[sources[place]] for place in places])
        for place, part in zip(places, pool(stacked.unflatten(1, (height, width)), rows, columns, kind), strict=True):
            parts[place] = part
    return torch.cat(parts)


def pool(frames: Tensor, rows: int, columns: int, kind: int) -> Tensor:
    """Frames `[T, H, W, D]` → `[T, rows · columns, D]` by one kind of pooling.

    Raises:
        KeyeError: the grid is larger than the frame, or has another number of tokens than runs of `kind` give.
    """
    count, height, width, _ = frames.shape
    if kind > MAX:
        tokens = frames.flatten(1, 2)
        runs = max(1, height * width // kind)
        if rows * columns != runs:
            raise KeyeError(
                f"runs of {kind} of {height}x{width} tokens are {runs} tokens, not {rows}x{columns}; give their number"
            )
        return tokens[:, : runs * kind].unflatten(1, (runs, -1)).amax(2)
    if rows > height or columns > width:
        raise KeyeError(f"{height}x{width} tokens cannot be pooled to {rows}x{columns}; give a grid that is no larger")
    if (rows, columns) == (height, width):
        return frames.flatten(1, 2)
    maps = frames.permute(0, 3, 1, 2)
    if kind == MAX:
        return F.adaptive_max_pool2d(maps, (rows, columns)).flatten(2).transpose(1, 2)
    return F.adaptive_avg_pool2d(maps.float(), (rows, columns)).to(frames.dtype).flatten(2).transpose(1, 2)


def _check(features: Tensor, grids: Tensor, blocks: Tensor) -> None:
    if blocks.ndim != 2 or blocks.shape[1] not in (COLUMNS, TIMED_COLUMNS) or not len(blocks):
        raise KeyeError(
            f"blocks have the shape {list(blocks.shape)}; give [K, {COLUMNS}] or [K, {TIMED_COLUMNS}] with one or more"
        )
    described, given = int(blocks[:, 0].sum()), len(grids)
    if described != given or int(blocks[0, 0]) < 1:
        raise KeyeError(
            f"the blocks describe {described} encoded frames and {given} are given: "
            "prepare blocks and pixels with one call of the processor"
        )
    if int(grids.prod(1).sum()) != len(features):
        raise KeyeError(f"the grids have {int(grids.prod(1).sum())} tokens and the features {len(features)}; give both")
