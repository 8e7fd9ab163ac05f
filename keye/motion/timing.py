"""Which frames a filter in time reads: the neighbours in a clip, and the steps of a lateral connection.

A batch holds the frames of many clips one after another. `clips` is an int64 tensor [F, 3] with a row per frame: number
of the clip (−1 for a still), type (0 slow, 1 fast), time in milliseconds. No filter reads across clips.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from keye.aggregation.blocks import block_sources, has_times
from keye.errors import KeyeError

STILL = -1
SLOW = 0


class Steps(NamedTuple):
    """What a lateral connection reads for the M slow frames of a batch, for each of its k steps.

    slow: LongTensor `[M]`, the slow frames. frames: LongTensor `[E]`, the frames of all steps one after another, slow
    frame by slow frame. lengths: LongTensor `[M · k]`, how many of them belong to each step; 0 where there is none.
    """

    slow: Tensor
    frames: Tensor
    lengths: Tensor


def still_frames(count: int) -> Tensor:
    """`clips` of stills only, `[count, 3]`."""
    return torch.tensor([[STILL, SLOW, 0]]).repeat(count, 1)


def clips_of(stills: int, frames: int, blocks: Tensor | None) -> Tensor:
    """`clips` `[stills + frames, 3]` on the CPU, of a batch with stills first and the frames of videos after them.

    Args:
        stills: number of stills.
        frames: number of encoded frames of all videos.
        blocks: `[K, 7]` of `keye.aggregation.blocks`, which say where videos begin and what time a frame has.

    Raises:
        KeyeError: the blocks have no times, or a clip shows one time twice.
    """
    if not frames:
        return still_frames(stills)
    if blocks is None or not has_times(blocks):
        raise KeyeError(
            "the model has a motion pathway, which needs the type and time of each frame; set processor.encoder."
            "aggregation (an encoder's aggregation) to 'none', or to 'mean' or 'max' to pool features as well"
        )
    blocks = blocks.cpu()
    sources = block_sources(blocks)
    found = torch.full((frames, 3), 1)
    found[:, 0] = torch.repeat_interleave(blocks[blocks[:, 0] > 0, 0])
    found[:, 1].scatter_reduce_(0, sources, blocks[:, 5], "amin")
    found[sources, 2] = blocks[:, 6]
    after = (found[1:, 2] <= found[:-1, 2]) & (found[1:, 0] == found[:-1, 0])
    if after.any():
        raise KeyeError(
            "a motion pathway needs frames in the order of time, each once, and a plan shows one time twice; use a "
            "policy other than two_stream, or aggregation 'mean', which encodes a frame once"
        )
    return torch.cat((still_frames(stills), found))


def neighbours(clips: Tensor, kernel: int) -> Tensor:
    """LongTensor `[F, kernel]`: the frames around each frame in its clip, itself in the middle; F where there is none.

    A still is its own clip.
    """
    count = len(clips)
    place = torch.arange(count)[:, None] + torch.arange(kernel) - kernel // 2
    own = torch.where(clips[:, 0] == STILL, -2 - torch.arange(count), clips[:, 0])
    inside = (place >= 0) & (place < count)
    same = own[place.clamp(0, max(0, count - 1))] == own[:, None]
    return torch.where(inside & same, place, count)


def lateral_steps(clips: Tensor, alpha: int, kernel: int) -> Steps:
    """The steps of a lateral connection: time from a slow frame to the one before and after it, divided by `alpha`.

    A step is the frames whose time is nearest to it. On a plan of evenly spaced frames with every alpha-th one slow a
    step is one frame, and the connection is the convolution with stride alpha of the paper. After the last slow frame
    of a clip a step is as long as before it, or longer if more frames follow. With a kernel of `alpha` or more steps
    every frame up to the last slow one is read.

    Args:
        clips: `[F, 3]`, see the module's docstring.
        alpha: steps between two slow frames.
        kernel: steps that are read, odd.
    """
    slow, frames, lengths = [], [], []
    half = kernel // 2
    for first, stop in _spans(clips[:, 0].tolist()):
        times = clips[first:stop, 2].double()
        chosen = (clips[first:stop, 1] == SLOW).nonzero()[:, 0].tolist()
        lengths_here = _step_lengths(times.tolist(), chosen, alpha)
        for place, (before, after) in zip(chosen, lengths_here, strict=True):
            away = times - times[place]
            step = torch.where(away < 0, away / before, away / after).round().long()
            for tap in range(-half, half + 1):
                found = (step == tap).nonzero()[:, 0] + first
                frames.append(found)
                lengths.append(len(found))
            slow.append(first + place)
    joined = torch.cat(frames) if frames else torch.zeros(0, dtype=torch.long)
    return Steps(torch.tensor(slow, dtype=torch.long), joined, torch.tensor(lengths, dtype=torch.long))


def _spans(numbers: list[int]) -> list[tuple[int, int]]:
    """(first frame, frame after the last) of each clip, without stills."""
    found: list[tuple[int, int]] = []
    for place, number in enumerate(numbers):
        if number == STILL:
            continue
        if place and numbers[place - 1] == number:
            found[-1] = found[-1][0], place + 1
        else:
            found.append((place, place + 1))
    return found


def _step_lengths(times: list[float], slow: list[int], alpha: int) -> list[tuple[float, float]]:
    """Milliseconds of a step before and after each slow frame."""
    gaps = [times[b] - times[a] for a, b in zip(slow[:-1], slow[1:], strict=True)]
    follow = len(times) - 1 - slow[-1] if slow else 0
    # The time at which the next frame would come.
    tail = (times[-1] - times[slow[-1]]) * (follow + 1) / follow if follow else 0.0
    ends = [*gaps, max(tail, gaps[-1] if gaps else 0.0)]
    found = []
    for place in range(len(slow)):
        after = ends[place]
        before = gaps[place - 1] if place else after
        found.append((max(before, 1.0) / alpha, max(after, 1.0) / alpha))
    return found
