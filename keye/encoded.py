"""Results of an encoder: patches for a model of this project, frames for any other, decisions of a stream."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

import torch

from keye.aggregation.plans import entry_frames
from keye.checks import suggestion
from keye.encoder_config import EncoderConfig
from keye.errors import KeyeError, VideoError
from keye.slowfast.budget import size_tokens
from keye.slowfast.pixels import Output, PixelFormat, as_bytes
from keye.slowfast.plan import VideoPlan
from keye.slowfast.policies import FAST, SLOW
from keye.slowfast.resizing import patches, resize
from keye.slowfast.threads import one_thread
from keye.video.images import load_image
from keye.visualize.figures import strip_frames
from keye.visualize.notebook import PLACES, one_line, plan_html

Size = tuple[int, int]


@dataclass(frozen=True, repr=False)
class EncodedVideo:
    """A video as the model reads it.

    pixel_values: [N, 3, p, p] patches, frame after frame in time order, each frame in raster order; p is half of the
    encoder's `token_side`, 14 by default. Type and range: see `format`, float32 in [-1, 1] by default.
    grid_thw: LongTensor [T, 3], a row (1, height / p, width / p) per entry of the plan, or per frame where the encoder
    has an aggregation. plan: the VideoPlan.
    features: [plan.tokens, hidden] where the encoder has a vision tower, else None.
    """

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    plan: VideoPlan
    features: torch.Tensor | None = None
    format: PixelFormat = PixelFormat()

    def to(self, *target: torch.dtype | torch.device | str, **output: Unpack[Output]) -> "EncodedVideo":
        """The same video with its pixels in another format.

        Args:
            target: a dtype, a device or both, as for a tensor's `to`: the same as by name.
            output: dtype, device, mean and std, see `PixelFormat`; each that is not given takes its default.

        Raises:
            KeyeError: an option is unknown, impossible or given twice.
        """
        for value in target:
            name = "dtype" if isinstance(value, torch.dtype) else "device"
            if name in output:
                raise KeyeError(f"{name} is given twice; give it once")
            output[name] = value
        wanted = PixelFormat.of(output)
        if wanted == self.format:
            return self
        pixels = wanted.convert(as_bytes(self.pixel_values, self.format.mean, self.format.std))
        return replace(self, pixel_values=pixels, format=wanted)

    def __repr__(self) -> str:
        kind = str(self.pixel_values.dtype).removeprefix("torch.")
        features = "" if self.features is None else f", features {list(self.features.shape)}"
        return f"EncodedVideo({one_line(self.plan)}, {len(self.pixel_values)} patches {kind}{features})"

    def _repr_html_(self) -> str:
        """The filmstrip as the model sees it and the plan's summary, for notebooks."""
        entries = strip_frames(self.plan, PLACES)
        return plan_html(self.plan, {entry: self.picture(entry).permute(1, 2, 0).cpu().numpy() for entry in entries})

    def pictures(self) -> list[torch.Tensor]:
        """The frames as the model sees them, uint8 [3, h, w] each."""
        return [self._encoded_picture(row) for row in range(len(self.grid_thw))]

    def picture(self, entry: int) -> torch.Tensor:
        """The frame of an entry of the plan as the model sees it, uint8 [3, h, w]."""
        return self._encoded_picture(entry_frames(self.plan)[entry])

    def _encoded_picture(self, row: int) -> torch.Tensor:
        counts, patch = self.grid_thw.prod(1), self.pixel_values.shape[-1]
        _, rows, columns = self.grid_thw[row].tolist()
        start = int(counts[:row].sum())
        grid = self.pixel_values[start : start + rows * columns].reshape(rows, columns, 3, patch, patch)
        picture = grid.permute(2, 0, 3, 1, 4).reshape(3, rows * patch, columns * patch)
        return as_bytes(picture, self.format.mean, self.format.std)


@dataclass(frozen=True, repr=False)
class ChosenFrames:
    """The frames that an encoder chose, uncut, for other models.

    slow: [S, 3, h, w] and fast: [F, 3, h, w], each in time order; lists of [3, h, w] where frames of one type differ in
    size. plan: the VideoPlan; its `frame_types` give the order of slow and fast frames, and its tokens are counted at
    the plan's own sizes, whatever size was requested.
    """

    slow: torch.Tensor | list[torch.Tensor]
    fast: torch.Tensor | list[torch.Tensor]
    plan: VideoPlan

    def in_order(self) -> list[torch.Tensor]:
        """All frames [3, h, w] in time order."""
        rows = {SLOW: iter(self.slow), FAST: iter(self.fast)}
        return [next(rows[kind]) for kind in self.plan.frame_types.tolist()]

    def __repr__(self) -> str:
        if isinstance(self.slow, list):
            return f"ChosenFrames({one_line(self.plan)}, {len(self.slow)} slow and {len(self.fast)} fast of many sizes)"
        kind = str(self.slow.dtype).removeprefix("torch.")
        sizes = f"slow {list(self.slow.shape)}, fast {list(self.fast.shape)} {kind}"
        return f"ChosenFrames({one_line(self.plan)}, {sizes})"


@dataclass(frozen=True)
class FrameDecision:
    """The decision of a stream about one frame.

    index: position in the stream, from 0. time: seconds. frame_type: 0 slow, 1 fast. similarity: in [0, 1], with the
    latest slow frame before this one; NaN for the first. size: (height, width) in pixels, where the budget does not
    limit it; under the policy ladder within the budget. beyond_budget: whether the stream has more frames than
    `most_frames`, so that a plan of all of them would leave some out and could decide otherwise. shown: False for a
    frame that the policy ladder leaves out; its size is (0, 0).
    """

    index: int
    time: float
    frame_type: int
    similarity: float
    size: tuple[int, int]
    beyond_budget: bool = False
    shown: bool = True


class Sampling(TypedDict, total=False):
    """Options for reading a source, see `open_clip`: which part of it, how many frames, which clock."""

    timestamps: Sequence[float] | torch.Tensor | None
    source_fps: float | None
    start: float | None
    end: float | None
    num_frames: int | None


class Options(Sampling, Output, total=False):
    """Options of a call: for reading the source, and for the pixel format."""


def check_options(given: Mapping[str, object], pixels: bool, more: Iterable[str] = ()) -> None:
    """Refuse options that a call does not have, before any work.

    Args:
        given: the options by name.
        pixels: whether the call makes pixels, so that it has the options of `Output`.
        more: the call's other arguments, for the suggestion.

    Raises:
        KeyeError: a name is unknown; the message says where a setting belongs, or suggests the nearest name.
    """
    known = (*Sampling.__annotations__, *(Output.__annotations__ if pixels else ()))
    for name in given:
        if name in known:
            continue
        if name in EncoderConfig.names():
            raise KeyeError(f"{name} is a setting of the encoder; use encoder.with_settings({name}=...)")
        if name in Output.__annotations__:
            raise KeyeError(f"{name} is an option of pixels, and a plan has none; call the encoder, or omit {name}")
        raise KeyeError(f"{name} is not an option; {suggestion(name, (*known, *more))}")


def refuse_one_path(given: object, message: str) -> None:
    """Raise VideoError with `message` for a path or bytes where a sequence is expected."""
    if isinstance(given, str | bytes | bytearray | os.PathLike):
        raise VideoError(message)


def split_options(options: Options) -> tuple[Output, Sampling]:
    """(options for the pixel format, options for reading the source) of the options of a call.

    Raises:
        KeyeError: an option is unknown.
    """
    check_options(options, pixels=True)
    output: Output = {name: options[name] for name in Output.__annotations__ if name in options}
    return output, {name: value for name, value in options.items() if name not in output}


def stream_frame(
    item: object, index: int, time: float, before: float | None, size: tuple[int, int] | None
) -> tuple[float, torch.Tensor]:
    """(seconds, frame uint8 [3, H, W]) of an item of a stream, which is a frame or a pair (seconds, frame).

    Args:
        index: position of the item.
        time: seconds of a frame without a time.
        before: seconds of the frame before, None for the first.
        size: (height, width) of the frames before, None for the first.

    Raises:
        VideoError: the item is neither, its time is not finite or not after the one before, or its size is another.
    """
    if isinstance(item, tuple):
        if len(item) != 2:
            raise VideoError(
                f"item {index} of the stream has {len(item)} values; give frames, or pairs (seconds, frame)"
            )
        time, item = item
    try:
        seconds = float(time)
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds) or (before is not None and seconds <= before):
        after = "" if before is None else f" above {before:g}, the time of the frame before"
        raise VideoError(f"the time of frame {index} is {time!r}; give finite seconds{after}")
    frame = load_image(item)
    height, width = frame.shape[1:]
    if size not in (None, (height, width)):
        raise VideoError(
            f"frame {index} is {width}x{height} pixels and the first {size[1]}x{size[0]}; give frames of one size"
        )
    return seconds, frame


def encode_patches(
    frames: Iterable[torch.Tensor], sizes: Sequence[tuple[int, int]], side: int, pixel_format: PixelFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize frames uint8 [3, h, w] to `sizes` and cut them into patches of p = side / 2 pixels.

    Returns:
        (pixel_values [N, 3, p, p] in `pixel_format`, grid_thw LongTensor [T, 3])
    """
    patch = side // 2
    pixel_values = pixel_format.empty(4 * sum(size_tokens(size, side) for size in sizes), 3, patch, patch)
    start = 0
    with one_thread():  # frames may be decoded at the same time
        for frame, size in zip(frames, sizes, strict=True):
            cut = patches(resize(frame[None], size, "bicubic"), patch)[0]
            end = start + len(cut)
            pixel_format.fill(pixel_values[start:end], cut)
            start = end
    return pixel_values, torch.tensor([(1, height // patch, width // patch) for height, width in sizes])


def chosen_frames(
    frames: Callable[[Sequence[Size]], Iterable[torch.Tensor]],
    plan: VideoPlan,
    sizes: tuple[Size | None, Size | None],
    pixel_format: PixelFormat,
) -> ChosenFrames:
    """The frames of a plan's entries.

    Args:
        frames: sizes → the frame uint8 [3, h, w] of each entry.
        plan: the plan.
        sizes: of slow and of fast frames; None for the plan's.
        pixel_format: of the result.
    """
    kinds = plan.frame_types.tolist()
    wanted = [sizes[kind] or own for kind, own in zip(kinds, plan.frame_sizes, strict=True)]
    outputs: list[torch.Tensor | list[torch.Tensor]] = []
    for kind, own in ((SLOW, plan.slow_size), (FAST, plan.fast_size)):
        of_kind = [size for size, found in zip(wanted, kinds, strict=True) if found == kind]
        if sizes[kind] is None and plan.levels is not None:
            outputs.append([pixel_format.empty(3, *size) for size in of_kind])
        else:
            outputs.append(pixel_format.empty(len(of_kind), 3, *(sizes[kind] or own)))
    rows = [iter(output) for output in outputs]
    with one_thread():  # frames may be decoded at the same time
        for kind, frame, size in zip(kinds, frames(wanted), wanted, strict=True):
            pixel_format.fill(next(rows[kind]), resize(frame[None], size, "bicubic")[0])
    return ChosenFrames(*outputs, plan)
