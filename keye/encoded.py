"""What comes out of an encoder: patches for a model of this project, or whole frames for any other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

import torch

from keye.slowfast.budget import size_tokens
from keye.slowfast.pixels import Output, PixelFormat, as_bytes
from keye.slowfast.plan import VideoPlan
from keye.slowfast.policies import FAST, SLOW
from keye.slowfast.resizing import patches, resize
from keye.visualize.figures import strip_frames
from keye.visualize.notebook import PLACES, one_line, plan_html


@dataclass(frozen=True, repr=False)
class EncodedVideo:
    """A video as the model reads it.

    pixel_values: [N, 3, 14, 14], frame after frame in time order, raster patch order in each; float32 in [-1, 1] unless
    another `format` was asked for.
    grid_thw: LongTensor [T, 3], a row (1, height / 14, width / 14) per frame. plan: the VideoPlan.
    (14 is half of the encoder's `token_side`.)
    features: [plan.tokens, hidden] when the encoder holds a vision tower, else None.
    """

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    plan: VideoPlan
    features: torch.Tensor | None = None
    format: PixelFormat = PixelFormat()

    def to(self, **output: Unpack[Output]) -> "EncodedVideo":
        """The same video with its pixels in another format (see `PixelFormat`); what is not named is the default."""
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
        """What a notebook shows: the filmstrip as the model sees it, and the plan's summary."""
        entries = strip_frames(self.plan, PLACES)
        return plan_html(self.plan, {entry: self.picture(entry).permute(1, 2, 0).cpu().numpy() for entry in entries})

    def pictures(self) -> list[torch.Tensor]:
        """The frames as the model sees them, uint8 [3, h, w] each."""
        return [self.picture(entry) for entry in range(len(self.grid_thw))]

    def picture(self, entry: int) -> torch.Tensor:
        """One frame as the model sees it, uint8 [3, h, w]."""
        counts, patch = self.grid_thw.prod(1), self.pixel_values.shape[-1]
        _, rows, columns = self.grid_thw[entry].tolist()
        start = int(counts[:entry].sum())
        grid = self.pixel_values[start : start + rows * columns].reshape(rows, columns, 3, patch, patch)
        picture = grid.permute(2, 0, 3, 1, 4).reshape(3, rows * patch, columns * patch)
        return as_bytes(picture, self.format.mean, self.format.std)


@dataclass(frozen=True, repr=False)
class ChosenFrames:
    """The frames that an encoder chose, whole, for models that cut or resize them themselves.

    slow: [S, 3, h, w] and fast: [F, 3, h, w], each in time order. plan: the VideoPlan, whose `frame_types` say which is
    which; its tokens count the plan's own sizes, whatever size was asked for.
    """

    slow: torch.Tensor
    fast: torch.Tensor
    plan: VideoPlan

    def in_order(self) -> list[torch.Tensor]:
        """Every frame [3, h, w] in time order."""
        rows = {SLOW: iter(self.slow), FAST: iter(self.fast)}
        return [next(rows[kind]) for kind in self.plan.frame_types.tolist()]

    def __repr__(self) -> str:
        kind = str(self.slow.dtype).removeprefix("torch.")
        sizes = f"slow {list(self.slow.shape)}, fast {list(self.fast.shape)} {kind}"
        return f"ChosenFrames({one_line(self.plan)}, {sizes})"


class Sampling(TypedDict, total=False):
    """What may be said about reading one source, see `open_clip`: which part of it, how many frames, whose clock."""

    timestamps: Sequence[float] | torch.Tensor | None
    source_fps: float | None
    start: float | None
    end: float | None
    num_frames: int | None


class Options(Sampling, Output, total=False):
    """What may be said about one call: how the source is read, and how its pixels come out."""


def split_options(options: Options) -> tuple[Output, Sampling]:
    """(how pixels come out, how the source is read) of the options of a call."""
    output: Output = {name: options[name] for name in Output.__annotations__ if name in options}
    return output, {name: value for name, value in options.items() if name not in output}


def encode_patches(
    frames: Iterable[torch.Tensor], sizes: Sequence[tuple[int, int]], side: int, pixel_format: PixelFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames uint8 [3, h, w] at their sizes (height, width) as (pixel_values [N, 3, p, p], grid_thw [T, 3])."""
    patch = side // 2
    pixel_values = pixel_format.empty(4 * sum(size_tokens(size, side) for size in sizes), 3, patch, patch)
    start = 0
    for frame, size in zip(frames, sizes, strict=True):
        cut = patches(resize(frame[None], size, "bicubic"), patch)[0]
        end = start + len(cut)
        pixel_format.fill(pixel_values[start:end], cut)
        start = end
    return pixel_values, torch.tensor([(1, height // patch, width // patch) for height, width in sizes])
