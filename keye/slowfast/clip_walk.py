"""Classification of a clip's frames: by the packets of a file where the measure reads them, else by the pixels."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, TypeGuard

import torch

from keye.slowfast.frame_buffer import FrameBuffer
from keye.slowfast.frame_classifier import FrameClassifier
from keye.slowfast.measures.base import Measure, PacketMeasure
from keye.slowfast.policies import Decisions, Limits, Policy
from keye.slowfast.threads import one_thread

if TYPE_CHECKING:
    from keye.video.clip import Clip, Frame

BATCH_BYTES = 64 << 20  # full-size frames that are scored and resized together


@dataclass(frozen=True)
class Walk:
    """The decisions about a clip.

    indices, times: position and seconds of each sampled frame. decoded: whether the frames were decoded for it.
    """

    decisions: Decisions
    indices: list[int]
    times: list[float]
    decoded: bool = True


def reads_packets(measure: Measure) -> TypeGuard[PacketMeasure]:
    """Whether a measure compares the packets of a file where it can."""
    return hasattr(measure, "read")


def pixel_rule(measure: Measure, policy: Policy) -> tuple[Measure, Policy]:
    """The measure and the policy for frames without packets, with the threshold of that measure."""
    if not reads_packets(measure):
        return measure, policy
    pixels = measure.pixels
    return pixels, replace(policy, threshold=pixels.threshold) if hasattr(policy, "threshold") else policy


def walk(clip: "Clip", measure: Measure, policy: Policy, limits: Limits, buffer: FrameBuffer | None) -> Walk:
    """Classify the sampled frames of a clip and keep those that were decoded in `buffer`."""
    reason = None
    if reads_packets(measure):
        found = clip.packets()
        reason = "no packets say when each is displayed" if found is None else measure.lacks(found[0])
        reason = f"the policy {policy.name} measures detail" if policy.walks else reason
        if reason is None:
            facts, frames = found
            classifier = FrameClassifier(measure, policy, limits)
            classifier.step_features(measure.read(facts, frames))
            return Walk(classifier.finish(), frames.tolist(), facts.times[frames].tolist(), decoded=False)
    compared, policy = pixel_rule(measure, policy)
    done = _walk_pixels(clip, FrameClassifier(compared, policy, limits, frames=clip.expected), buffer)
    if reason is not None:
        text = (
            f"measure {measure.name} cannot compare the frames of {clip.name} ({reason});"
            f" {compared.name} with threshold {compared.threshold:g} is used"
        )
        done = replace(done, decisions=replace(done.decisions, warnings=[*done.decisions.warnings, text]))
    return done


def _walk_pixels(clip: "Clip", classifier: FrameClassifier, buffer: FrameBuffer | None) -> Walk:
    indices: list[int] = []
    times: list[float] = []
    with nullcontext() if hasattr(classifier.measure, "attach") else one_thread():  # a tower takes all threads
        for batch in _batches(clip):
            pixels = torch.stack([frame.pixels for frame in batch])
            indices += [frame.index for frame in batch]
            times += [frame.time for frame in batch]
            batch.clear()  # one copy of the frames is enough while they are compared
            types, _ = classifier.step(pixels)
            if buffer is not None:
                buffer.add(pixels, types)
            del pixels  # before the next ones are decoded
        return Walk(classifier.finish(), indices, times)


def _batches(clip: "Clip") -> Iterator[list["Frame"]]:
    """The clip's frames in batches of at most 8 and at most `BATCH_BYTES`, or of one."""
    size = max(1, min(8, BATCH_BYTES // (3 * clip.size[0] * clip.size[1])))
    frames = iter(clip)
    while batch := list(islice(frames, size)):
        yield batch
