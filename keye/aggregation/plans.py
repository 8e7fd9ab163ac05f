"""Aggregation of a `VideoPlan`: which frames are encoded, at which size, and the blocks of its entries.

A plan names its aggregation in its settings, so that it is in effect wherever the plan is. Without one each entry is
encoded at its own size, and all functions say so.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from keye.aggregation.blocks import MAX, MEAN, aggregate, make_blocks, whole_frames
from keye.aggregation.settings import FeatureAggregation
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


def entry_frames(plan: VideoPlan) -> list[int]:
    """The encoded frame of each entry: a row of the video's `grid_thw`."""
    if aggregation_of(plan) is None:
        return list(range(len(plan)))
    return plan.frame_indices.unique(return_inverse=True)[1].tolist()


def frame_entries(plan: VideoPlan) -> list[int]:
    """The first entry of each encoded frame."""
    frames = entry_frames(plan)
    return [frames.index(frame) for frame in range(max(frames) + 1)]


def encoded_sizes(plan: VideoPlan) -> list[Size]:
    """(height, width) in pixels of each encoded frame."""
    found = aggregation_of(plan)
    if found is None:
        return plan.frame_sizes
    # The largest side of any entry, because a fast frame may have more rows than a slow one of another aspect.
    height, width = (found.oversample * max(sides) for sides in zip(*plan.frame_sizes, strict=True))
    return [(height, width)] * len(plan.frame_indices.unique())


def plan_blocks(plan: VideoPlan) -> Tensor | None:
    """The blocks `[K, 5]` of a plan's entries in the order of the stream; None for a plan without aggregation."""
    found = aggregation_of(plan)
    if found is None:
        return None
    frames, sizes, kind = entry_frames(plan), plan.frame_sizes, MAX if found.pool == "max" else MEAN
    entries = [
        (frames[entry], sizes[entry][0] // plan.side, sizes[entry][1] // plan.side, kind)
        for entry in reading_order(plan)
    ]
    return make_blocks(max(frames) + 1, entries)


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
    return torch.cat(parts)


def plan_features(features: Tensor, grid_thw: Tensor, plan: VideoPlan) -> Tensor:
    """Tokens `[N, D]` of the encoded frames of a plan → `[plan.tokens, D]` in the order of the stream."""
    blocks = plan_blocks(plan)
    return features if blocks is None else aggregate(features, grid_thw[:, 1:] // 2, blocks)
