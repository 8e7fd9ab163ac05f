"""Encode the media of one chat, and shrink them until the chat fits into a context of `max_length` tokens.

No frame is cropped: a video that is too long is encoded again with a smaller budget, which makes its frames smaller
and, at their smallest size, fewer. Where the encoder leaves out similar frames, it still compares more than it shows.
Videos shrink first, in proportion to their tokens; images shrink when each video has one frame left; then there is an
error. No video is decoded more than twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from keye.aggregation.plans import reading_order
from keye.encoder import EncodedVideo, Sampling, SlowFastEncoder
from keye.errors import KeyeError
from keye.processor.messages import Visual
from keye.processor.options import MIN_TOKENS, still_limits, video_encoder
from keye.processor.stream import Stream
from keye.slowfast.pixels import HALF, PixelFormat, exact_bytes
from keye.slowfast.plan import VideoPlan
from keye.video.images import load_image


@dataclass
class Media:
    """The encoded images and videos of a chat.

    stills: (pixel_values `[N, 3, 14, 14]`, grid_thw `[1, 3]`) of each image. videos: encoded, with plans. Pixels are
    uint8, or floats of a video given as encoded that uint8 cannot represent. warnings: messages about images that were
    made smaller; those about videos are in the plans. thinned: visual tokens removed to fit `max_length`.
    """

    stills: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    videos: list[EncodedVideo] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    thinned: int = 0

    @property
    def still_tokens(self) -> list[int]:
        return [int(grid.prod()) // 4 for _, grid in self.stills]

    def groups(self, stream: Stream) -> list[list[int]]:
        """The stream ids of each video."""
        return [plan_ids(stream, video.plan) for video in self.videos]


def plan_ids(stream: Stream, plan: VideoPlan) -> list[int]:
    """The stream ids of a video with this plan."""
    columns = (plan.frame_types.tolist(), plan.tokens_per_frame.tolist(), plan.timestamps.tolist())
    order = reading_order(plan)
    return stream.video(*([column[entry] for entry in order] for column in columns))


@dataclass
class _Still:
    source: Any
    limits: dict[str, int]
    encoder: SlowFastEncoder

    @property
    def least(self) -> int:
        """The smallest number of tokens."""
        return self.limits.get("min_tokens", MIN_TOKENS)

    def encode(self, most: int | None = None) -> tuple[Tensor, Tensor]:
        limits = self.limits if most is None else {"min_tokens": min(self.least, most), "max_tokens": most}
        return self.encoder.image(self.source, dtype=torch.uint8, **limits)


@dataclass
class _Clip:
    """A video, its encoder, and the encoded result."""

    source: Any
    encoder: SlowFastEncoder
    sampling: Sampling
    stream: Stream

    def __post_init__(self) -> None:
        ready = isinstance(self.source, EncodedVideo)
        self.video: EncodedVideo = _in_bytes(self.source) if ready else self._encode(self.encoder)
        self.wanted = len(plan_ids(self.stream, self.video.plan))
        # The most tokens of a frame in addition to its pads: frame token, time, and the two around a fast frame.
        self.overhead = 3 + self.stream.time_tokens(max(self.video.plan.duration, *self.video.plan.span))
        self.least = self.wanted if ready else min(self.wanted, self._needed(1))

    def _encode(self, encoder: SlowFastEncoder) -> EncodedVideo:
        return encoder(self.source, dtype=torch.uint8, **self.sampling)

    def _needed(self, frames: int) -> int:
        """The fewest stream tokens of this number of sampled frames, for any frame types."""
        slow, entries = self._entries(frames)
        policy, least = self.encoder.policy, self.encoder.min_tokens_per_frame
        pads = entries * least if policy.fast_tokens is None else slow * least + (entries - slow) * policy.fast_tokens
        return max(pads, least) + entries * self.overhead

    def _entries(self, frames: int) -> tuple[int, int]:
        """(slow entries if the policy fixes them, all entries) of this number of frames; two_stream has some twice."""
        policy = self.encoder.policy
        if policy.fast_tokens is None:
            return 0, frames
        slow = min(frames, getattr(policy, "slow", frames))
        return slow, frames + slow

    def shrink(self, room: int, max_length: int) -> EncodedVideo:
        """The video with at most `room` (`least` or more) stream tokens, decoded again if it is longer."""
        if self.wanted <= room:
            return self.video
        before = self.video.plan
        shown = len(before.frame_indices.unique())
        if self.encoder.leaves_out:  # more frames are compared than are shown
            video = self._within(room, shown if before.end is None else None)
        else:
            frames = next((n for n in range(shown, 0, -1) if self._fits(n, room)), 1)
            budget = min(self.encoder.max_tokens, room - self._entries(frames)[1] * self.overhead)
            video = self._encode(self.encoder.with_settings(max_tokens=budget, max_frames=frames))
        plan = video.plan
        note = (
            f"{plan.source} is reduced from {before.tokens} to {plan.tokens} tokens and from {shown} to"
            f" {len(plan.frame_indices.unique())} frames, so that the chat fits max_length={max_length}"
        )
        return replace(video, plan=replace(plan, warnings=(*plan.warnings, note)))

    def _within(self, room: int, sampled: int | None) -> EncodedVideo:
        """The video with the largest budget whose frames fit `room`; sampled: the number of frames, if all are shown.

        Its text is counted for frames of `min_tokens_per_frame`. Where slow frames are smaller, and therefore more, it
        is counted for the smallest ones, and the video is decoded once more.
        """
        budget = self._budget(room, sampled, self.encoder.min_tokens_per_frame)
        video = self._encode(self.encoder.with_settings(max_tokens=budget))
        if len(plan_ids(self.stream, video.plan)) <= room:
            return video
        budget = self._budget(room, None, self.encoder.smallest_slow_tokens)
        return self._encode(self.encoder.with_settings(max_tokens=budget))

    def _budget(self, room: int, sampled: int | None, least: int) -> int:
        """The largest budget whose frames fit `room`, where it holds one frame for each `least` tokens of it.

        sampled: the number of frames, where all are shown.
        """
        frames = room // (least + self.overhead)
        budget = min(room - frames * self.overhead, frames * least + least - 1)
        if sampled is not None:
            budget = max(budget, room - sampled * self.overhead)
        return min(self.encoder.max_tokens, budget)

    def _fits(self, frames: int, room: int) -> bool:
        budget = min(self.encoder.max_tokens, room - self._entries(frames)[1] * self.overhead)
        enough = self.encoder.policy.most_frames(budget, self.encoder.min_tokens_per_frame) >= frames
        return enough and self._needed(frames) <= room


def _in_bytes(video: EncodedVideo) -> EncodedVideo:
    """An encoded video with uint8 pixels; floats that uint8 cannot represent stay."""
    if (video.format.mean, video.format.std) != (HALF, HALF):
        return video.to(dtype=torch.uint8)
    pixels = exact_bytes(video.pixel_values)
    return replace(video, pixel_values=pixels, format=PixelFormat(pixels.dtype))


def encode_media(
    visuals: Sequence[Visual],
    encoder: SlowFastEncoder,
    image: dict[str, int],
    stream: Stream,
    text_tokens: int,
    max_length: int | None = None,
) -> Media:
    """Encode images and videos in the order of a chat; with `max_length` they fit together with the text.

    Args:
        visuals: the images and videos.
        encoder: for videos; messages may change its settings for one video.
        image: the arguments of `SlowFastEncoder.image`.
        stream: counts the tokens of a video.
        text_tokens: tokens of the chat without its media.
        max_length: the most tokens of the chat; None for no limit.

    Raises:
        KeyeError: the media do not fit at their smallest sizes.
        VideoError: an image or video that cannot be read.
    """
    limited = max_length is not None
    stills = []
    for visual in (v for v in visuals if v.kind == "image"):
        source = load_image(visual.source, encoder.urls) if limited else visual.source
        stills.append(_Still(source, still_limits(encoder, image, visual.options), encoder))
    media = Media([still.encode() for still in stills])
    clips = [
        _Clip(_rereadable(v.source) if limited else v.source, *video_encoder(encoder, v.options), stream)
        for v in visuals
        if v.kind == "video"
    ]
    media.videos = [clip.video for clip in clips]
    if limited and text_tokens + sum(media.still_tokens) + sum(clip.wanted for clip in clips) > max_length:
        _fit(media, stills, clips, text_tokens, max_length)
    return media


def _fit(media: Media, stills: list[_Still], clips: list[_Clip], text_tokens: int, max_length: int) -> None:
    wanted = media.still_tokens
    least_stills = [min(still.least, tokens) for still, tokens in zip(stills, wanted, strict=True)]
    least_clips = [clip.least for clip in clips]
    least = text_tokens + sum(least_stills) + sum(least_clips)
    if least > max_length:
        what = [f"{text_tokens} of text"]
        what += [f"{sum(least_stills)} or more of {_count(len(stills), 'image')}"] if stills else []
        what += [f"{sum(least_clips)} or more of {_count(len(clips), 'video')}"] if clips else []
        raise KeyeError(
            f"the chat needs at least {least} tokens ({', '.join(what)}) and max_length is {max_length};"
            " raise max_length, shorten the text or remove an image or video"
        )
    room = max_length - text_tokens - sum(least_clips)
    if sum(wanted) > room:
        for place, share in enumerate(_shares(wanted, least_stills, room)):
            if share < wanted[place]:
                media.stills[place] = stills[place].encode(most=share)
                media.warnings.append(
                    f"image {place + 1} is made smaller, from {wanted[place]} to {media.still_tokens[place]} tokens, so"
                    f" that the chat fits max_length={max_length}"
                )
    room = max_length - text_tokens - sum(media.still_tokens)
    shares = _shares([clip.wanted for clip in clips], least_clips, room)
    media.videos = [clip.shrink(share, max_length) for clip, share in zip(clips, shares, strict=True)]
    media.thinned = sum(wanted) - sum(media.still_tokens)
    before = sum(clip.video.plan.tokens for clip in clips)
    media.thinned += before - sum(video.plan.tokens for video in media.videos)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _shares(wanted: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Integers in proportion to `wanted`, each at least its `least`, with a sum of at most `room`."""
    shares, bound = list(least), set()
    while len(bound) < len(shares):
        free = [place for place in range(len(shares)) if place not in bound]
        left, total = room - sum(least[place] for place in bound), sum(wanted[place] for place in free)
        short = [place for place in free if left * wanted[place] // total < least[place]]
        if not short:
            for place in free:
                shares[place] = min(left * wanted[place] // total, wanted[place])
            break
        bound.update(short)
    return shares


def _rereadable(source: Any) -> Any:
    """A video that can be decoded twice: a pipe or a generator is read into memory."""
    if hasattr(source, "read"):
        seekable = getattr(source, "seekable", None)
        return source if seekable is not None and seekable() else source.read()
    return list(source) if isinstance(source, Iterator) else source
