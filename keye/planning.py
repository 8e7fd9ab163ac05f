"""From a clip to its plan: walk the frames, concede what the budget does not hold, and record the decisions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from keye.slowfast.clip_walk import walk
from keye.slowfast.concessions import concede
from keye.slowfast.frame_buffer import FrameBuffer
from keye.slowfast.measures.base import Measure
from keye.slowfast.plan import VideoPlan, span_of
from keye.slowfast.policies import Limits, Policy
from keye.video.clip import Clip


def plan_clip(
    clip: Clip,
    measure: Measure,
    policy: Policy,
    limits: Limits,
    settings: dict[str, Any],
    buffer: FrameBuffer | None,
    thinned: Callable[[Clip], Sequence[str]],
) -> tuple[VideoPlan, list[int]]:
    """Classify the clip's frames and build the plan.

    Args:
        clip: an open clip; where no frame was decoded, it afterwards keeps only the frames that the plan shows.
        measure, policy, limits: what decides about the frames, and their sizes and tokens.
        settings: of the encoder, which the plan records; "fps" is the sampling rate.
        buffer: gets the frames that may be shown; None keeps none.
        thinned: the warnings that fewer frames are used than were asked for, once the clip has been read.

    Returns:
        The plan, and which frame of the clip each of its entries shows.
    """
    walked = walk(clip, measure, policy, limits, buffer)
    indices, times = walked.indices, walked.times
    decided, allocation = concede(walked.decisions, limits, policy)
    plan = VideoPlan(
        source=clip.name,
        frame_types=torch.tensor(decided.types, dtype=torch.long),
        timestamps=torch.tensor([times[position] for position in decided.positions], dtype=torch.float32),
        frame_indices=torch.tensor([indices[position] for position in decided.positions], dtype=torch.long),
        similarity=torch.tensor(decided.scores, dtype=torch.float32),
        source_size=clip.size,
        slow_size=allocation.slow_size,
        fast_size=allocation.fast_size,
        max_tokens=limits.max_tokens if decided.max_tokens is None else decided.max_tokens,
        duration=clip.duration,
        settings=settings if decided.threshold is None else {**settings, "threshold": decided.threshold},
        warnings=(*clip.warnings, *thinned(clip), *decided.warnings),
        sizes=decided.sizes,
        levels=None if decided.levels is None else torch.tensor(decided.levels, dtype=torch.long),
        end=None if len({*decided.positions}) == len(times) else span_of(times, clip.duration, settings["fps"])[1],
    )
    if walked.decoded:
        return plan, decided.positions
    kept = {position: place for place, position in enumerate(sorted(set(decided.positions)))}
    clip.keep(list(kept))  # the others are never decoded
    return plan, [kept[position] for position in decided.positions]
