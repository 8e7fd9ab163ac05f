"""Controls: what a model answers when it does not get all that it needs. Every table of answers uses this list.

Chance and the majority answer need no model; each report has them. The controls of `CONTROLS` ask the model again, with
something missing from the video. A question that a control answers tests something other than the video.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from keye.aggregation.plans import encoded_sizes, entry_frames
from keye.errors import KeyeError
from keye.evaluation.benchmark import Question
from keye.slowfast.budget import PATCH
from keye.slowfast.pixels import as_bytes, join
from keye.slowfast.policies import SLOW
from keye.slowfast.resizing import patches, resize

if TYPE_CHECKING:
    from keye.processor.sample import Sample

Control = Literal["none", "blind", "zeroed", "other", "one_frame", "shuffled"]

CONTROLS: dict[str, str] = {
    "blind": "text only: without images, videos and their tokens",
    "zeroed": "the same token stream, frame types and seconds, and every pixel zero",
    "other": "the same token stream with the pixels of another clip",
    "one_frame": "the same token stream; every frame shows the slow frame nearest to the middle",
    "shuffled": "the same token stream with the frames of each video in random order",
}
"""Control → what the model gets."""


def asked(control: Control, question: Question) -> bool:
    """Whether a control applies to a question: it needs images or videos, or videos."""
    kinds = question.media
    return control == "none" or bool(kinds) and (control not in ("one_frame", "shuffled") or "video" in kinds)


def partners(questions: Sequence[Question]) -> list[Question]:
    """For each question another one of the same family with other media, the next one in a cycle.

    Raises:
        KeyeError: all questions of a family with media have the same media.
    """
    similar: dict[tuple, list[Question]] = {}
    for question in questions:
        similar.setdefault((question.family, *question.media), []).append(question)
    places, found = dict.fromkeys(similar, 0), []
    for question in questions:
        key = (question.family, *question.media)
        group, place = similar[key], places[key]
        places[key] += 1
        later = (group[(place + step) % len(group)] for step in range(1, len(group)))
        partner = next((other for other in later if other.files != question.files), None)
        if partner is None:
            raise KeyeError(
                f"the control 'other' needs two clips of the family {question.family}; raise --limit, ask a manifest "
                "with more questions, or choose another control"
            )
        found.append(partner)
    return found


def zeroed(sample: "Sample") -> "Sample":
    """The same token stream, positions and grids with every pixel value 0, the middle of [-1, 1]."""
    return _refilled(sample, lambda kind, values, grid: torch.zeros(values.shape))


def other(sample: "Sample", source: "Sample") -> "Sample":
    """The same token stream with the pictures of `source`, spread evenly over the frames and resized to their sizes.

    Raises:
        KeyeError: `source` has no media of a kind that `sample` has.
    """

    def fill(kind: str, values: Tensor, grid: Tensor) -> Tensor:
        if getattr(source, kind) is None:
            raise KeyeError("the clip for the control 'other' has other media than the question")
        pictures = frames_of(getattr(source, kind), getattr(source, GRIDS[kind]))
        steps = max(1, len(grid) - 1)
        return cut([pictures[round(i * (len(pictures) - 1) / steps)] for i in range(len(grid))], grid)

    return _refilled(sample, fill)


def one_frame(sample: "Sample") -> "Sample":
    """The same token stream; every frame of a video shows its slow frame that is nearest to the middle."""
    order: list[int] = []
    for start, plan in _videos(sample):
        frames, types = entry_frames(plan), plan.frame_types.tolist()
        last = max(frames)
        slow = [frame for frame, kind in zip(frames, types, strict=True) if kind == SLOW] or frames
        order += [start + min(slow, key=lambda frame: abs(2 * frame - last))] * (last + 1)  # noqa: B023
    return _reordered(sample, order)


def shuffled(sample: "Sample", seed: int) -> "Sample":
    """The same token stream with the frames of each video in a random order, resized to the sizes of their places."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for start, plan in _videos(sample):
        order += [start + i for i in torch.randperm(len(encoded_sizes(plan)), generator=generator).tolist()]
    return _reordered(sample, order)


def apply(control: Control, sample: "Sample", question: Question, partner: "Sample | None" = None) -> "Sample":
    """`sample` under a control that changes pixels; "none" and "blind" leave it as it is.

    Args:
        partner: the sample of `partners`, for the control "other".
    """
    if control == "zeroed":
        return zeroed(sample)
    if control == "other":
        return other(sample, partner)
    if control == "one_frame":
        return one_frame(sample)
    if control == "shuffled":
        return shuffled(sample, zlib.crc32(question.id.encode()))
    return sample


GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}


def frames_of(values: Tensor, grid: Tensor) -> list[Tensor]:
    """The pictures uint8 [3, h, w] of patches [N, 3, p, p] with grids [F, 3]."""
    found = []
    for part, (_, rows, columns) in zip(values.split(grid.prod(1).tolist()), grid.tolist(), strict=True):
        side = part.shape[-1]
        picture = part.reshape(rows, columns, 3, side, side).permute(2, 0, 3, 1, 4)
        found.append(as_bytes(picture.reshape(3, rows * side, columns * side)))
    return found


def cut(pictures: Sequence[Tensor], grid: Tensor) -> Tensor:
    """Pictures uint8 [3, h, w] resized to grids [F, 3] and cut into patches [N, 3, p, p]."""
    sizes = [(rows * PATCH, columns * PATCH) for _, rows, columns in grid.tolist()]
    resized = (resize(picture[None], size, "bicubic") for picture, size in zip(pictures, sizes, strict=True))
    return join([patches(picture, PATCH)[0] for picture in resized])


def _videos(sample: "Sample") -> list[tuple[int, object]]:
    starts = [0]
    for plan in sample.plans:
        starts.append(starts[-1] + len(encoded_sizes(plan)))
    return list(zip(starts, sample.plans, strict=False))


def _reordered(sample: "Sample", order: Sequence[int]) -> "Sample":
    if sample.pixel_values_videos is None:
        return sample
    pictures = frames_of(sample.pixel_values_videos, sample.video_grid_thw)
    values = cut([pictures[i] for i in order], sample.video_grid_thw)
    return dataclasses.replace(sample, pixel_values_videos=values)


def _refilled(sample: "Sample", fill: Callable[[str, Tensor, Tensor], Tensor]) -> "Sample":
    changed = {
        kind: fill(kind, values, getattr(sample, grid))
        for kind, grid in GRIDS.items()
        if (values := getattr(sample, kind)) is not None
    }
    return dataclasses.replace(sample, **changed)
