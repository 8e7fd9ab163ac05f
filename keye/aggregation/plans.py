"""Aggregation of a `VideoPlan`: which frames are encoded, at which size, and the blocks of its entries.

A plan names its aggregation in its settings, so that it is in effect wherever the plan is. Without one each entry is
encoded at its own size, and all functions say so.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from keye.aggregation.blocks import MAX, MEAN, aggregate, join_blocks, make_blocks, timed_blocks, whole_frames
from keye.aggregation.settings import FeatureAggregation
from keye.motion.timing import clips_of
from keye.slowfast.plan import VideoPlan
from keye.slowfast.policies import SLOW

Size = tuple[int, int]


def aggregation_of(plan: VideoPlan) -> FeatureAggregation | None:
    """The aggregation of a plan; None for pixels: each entry is encoded at its own size."""
    spec = plan.settings.get("aggregation")
    return None if spec is None else FeatureAggregation.of(spec)


def reading_order(plan: VideoPlan) -> list[int]:
    """The entries of a plan in the order of the token stream."""
    found = aggregation_of(plan)
    entries = list(range(len(plan)))
    if found is None or found.layout == "time":
        return entries
    types = plan.frame_types.tolist()
    return sorted(entries, key=lambda entry: types[entry] != SLOW)  # stable: in time order within a pathway


def pools(plan: VideoPlan) -> bool:
    """Whether the tokens of entries are pooled from frames that are encoded once."""
    found = aggregation_of(plan)
    return found is not None and found.pool != "none"


def entry_frames(plan: VideoPlan) -> list[int]:
    """The encoded frame of each entry: a row of the video's `grid_thw`."""
    if not pools(plan):
        return list(range(len(plan)))
    return plan.frame_indices.unique(return_inverse=True)[1].tolist()


def frame_entries(plan: VideoPlan) -> list[int]:
    """The first entry of each encoded frame."""
    frames = entry_frames(plan)
    return [frames.index(frame) for frame in range(max(frames) + 1)]


def encoded_sizes(plan: VideoPlan) -> list[Size]:
    """(height, width) in pixels of each encoded frame."""
    found = aggregation_of(plan)
    if found is None or not pools(plan):
        return plan.frame_sizes
    # The largest side of any entry, because a fast frame may have more rows than a slow one of another aspect.
    height, width = (found.oversample * max(sides) for sides in zip(*plan.frame_sizes, strict=True))
    return [(height, width)] * len(plan.frame_indices.unique())


def plan_blocks(plan: VideoPlan) -> Tensor | None:
    """The blocks `[K, 7]` of a plan's entries in the order of the stream; None for a plan without aggregation."""
    found = aggregation_of(plan)
    if found is None:
        return None
    frames, sizes, kind = entry_frames(plan), plan.frame_sizes, MAX if found.pool == "max" else MEAN
    order = reading_order(plan)
    entries = [(frames[entry], sizes[entry][0] // plan.side, sizes[entry][1] // plan.side, kind) for entry in order]
    types, seconds = plan.frame_types.tolist(), plan.timestamps.tolist()
    blocks = make_blocks(max(frames) + 1, entries)
    return timed_blocks(blocks, [types[entry] for entry in order], [seconds[entry] for entry in order])


def joined_blocks(plans: Sequence[VideoPlan]) -> Tensor | None:
    """The blocks of several videos in order; None if no plan has an aggregation.

    Where only some have one, the frames of the others are read as they are.
    """
    if all(aggregation_of(plan) is None for plan in plans):
        return None
    parts = []
    for plan in plans:
        blocks = plan_blocks(plan)
        grids = torch.tensor(encoded_sizes(plan)) // plan.side
        parts.append(whole_frames(grids) if blocks is None else blocks)
    return join_blocks(parts)


class ClipTower:
    """A tower with a motion pathway: a function of pixels, grids and `clips` of `keye.motion.timing`."""

    def __init__(self, encode: Callable[..., Tensor]) -> None:
        self.encode = encode

    def __call__(self, pixel_values: Tensor, grid_thw: Tensor, clips: Tensor) -> Tensor:
        """See `KeyeModel.encode_vision`."""
        return self.encode(pixel_values, grid_thw, clips=clips)


def plan_features(tower: Callable[..., Tensor], pixel_values: Tensor, grid_thw: Tensor, plan: VideoPlan) -> Tensor:
    """The tokens of an encoded video, `[plan.tokens, D]` in the order of the stream.

    Args:
        tower: patches and grids → tokens `[N, D]` of the encoded frames; a `ClipTower` also gets their clip and times.
        pixel_values, grid_thw: the encoded frames.
        plan: the plan.

    Raises:
        KeyeError: a `ClipTower` and a plan without aggregation, which says no times.
    """
    blocks = plan_blocks(plan)
    clips = (clips_of(0, len(grid_thw), blocks),) if isinstance(tower, ClipTower) else ()
    features = tower(pixel_values, grid_thw, *clips)
    return features if blocks is None else aggregate(features, grid_thw[:, 1:] // 2, blocks)
