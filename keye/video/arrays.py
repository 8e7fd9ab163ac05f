"""Arrays of any kind as pictures uint8 [3, H, W]; ambiguous ones are refused with an error that says what to give.

Channels may be first or last: three are RGB, one is grey, four are RGB and opacity, blended with white. Integers must
be 0 to 255, floats 0 to 1 (as in torchvision and scikit-image).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from keye.errors import VideoError

Values = torch.Tensor | np.ndarray

_CHANNELS = (1, 3, 4)
_TO_BYTES = {
    "signed": "((values + 1) * 127.5).round().to(torch.uint8) if they are in [-1, 1]",
    "large": "values.round().to(torch.uint8) if they are in [0, 255]",
    "other": "uint8; undo their normalisation first",
}


class FrameArray(Sequence):
    """The frames of one array: [T, C, H, W] or [T, H, W, C] with 1, 3 or 4 channels, [T, H, W] or [1, T, …].

    times: seconds of each frame, None where the array has no clock. last: seconds that the last frame is displayed.
    """

    indices: list[int] | None = None

    def __init__(self, values: Values, times: Sequence[float] | None = None, last: float | None = None):
        self.values, self.times, self.last = _clip(values), times, last

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> torch.Tensor:
        return as_picture(self.values[index], f"frame {index}")


def is_clip(values: Values) -> bool:
    """Whether an array is a sequence of frames and not a single picture; [3, H, W] and [H, W, 3] are pictures."""
    return values.ndim > 3 or (values.ndim == 3 and not _is_picture(values.shape))


def as_picture(values: Values, name: str = "an image") -> torch.Tensor:
    """The picture uint8 [3, H, W] of values [C, H, W], [H, W, C] or [H, W] with 1, 3 or 4 channels.

    Raises:
        VideoError: shape, type or range of the values are not those of a picture.
    """
    shape = tuple(values.shape)
    axes = [axis for axis in (0, 2) if len(shape) == 3 and shape[axis] in _CHANNELS]
    if len(axes) == 2 and 3 in (shape[0], shape[2]):
        axes = [0 if shape[0] == 3 else 2]
    if 0 in shape or not (len(shape) == 2 or len(axes) == 1):
        raise VideoError(f"{name} must be uint8 [3, H, W], [H, W, 3] or [H, W], not {_kind(values)}; permute its axes")
    pixels = _as_bytes(values, name)
    if len(shape) == 2:
        return pixels.expand(3, *shape)
    pixels = pixels if axes == [0] else pixels.permute(2, 0, 1)
    if len(pixels) == 4:
        return _on_white(pixels)
    return pixels if len(pixels) == 3 else pixels.expand(3, *pixels.shape[1:])


def _is_picture(shape: Sequence[int]) -> bool:
    return shape[0] in (1, 3) or shape[2] in _CHANNELS


def _clip(values: Values) -> Values:
    """The frames of an array [T, …], each of which `as_picture` accepts."""
    shape = tuple(values.shape)
    forms = "frames must be uint8 [T, 3, H, W] or [T, H, W, 3] with T >= 1"
    if len(shape) == 5 and shape[0] == 1:
        return _clip(values[0])
    if len(shape) == 5:
        raise VideoError(f"{forms}, not {_kind(values)}; give one clip after another: values[0], values[1], …")
    if len(shape) == 4 and shape[0] in (1, 3) and not {shape[1], shape[3]} & set(_CHANNELS):
        raise VideoError(f"{forms}, not {_kind(values)}; put the frames first: values.permute(1, 0, 2, 3)")
    if len(shape) == 4:
        found = [shape[axis] for axis in (1, 3) if shape[axis] in _CHANNELS]
        clear = len(found) == 1 or 3 in found  # an axis of three is the colours, regardless of the other
    if 0 in shape or not 3 <= len(shape) <= 4 or (len(shape) == 4 and not clear):
        raise VideoError(f"{forms}, not {_kind(values)}; permute or convert them")
    if len(shape) == 3 and shape[0] == 4:
        raise VideoError(
            f"{_kind(values)} may be four grey frames or one picture with opacity; give values[:, None] for frames or"
            " values[None] for the picture"
        )
    return values


def _as_bytes(values: Values, name: str) -> torch.Tensor:
    """The values as uint8; NumPy arrays are copied, since their strides may be negative and their memory read-only."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "uif" or values.dtype == np.longdouble:
            raise VideoError(f"{name} has values of type {values.dtype}; give uint8 in [0, 255]")
        wide = values.dtype.kind in "ui" and values.dtype not in (np.uint8, np.uint16)
        values = torch.from_numpy(np.array(values, dtype=np.int64 if wide else values.dtype.newbyteorder("=")))
    values = values.detach()
    if values.dtype == torch.uint8:
        return values
    if values.dtype in (torch.bool, torch.uint16) or values.is_complex():
        more = {torch.bool: "values.to(torch.uint8) * 255", torch.uint16: "(values >> 8).to(uint8) if they use 16 bits"}
        wanted = more.get(values.dtype, "uint8 in [0, 255]")
        raise VideoError(f"{name} has values of type {_type(values)}; give {wanted}")
    floats = values.is_floating_point()
    values = values.float() if floats else values.long()
    least, most = (value.item() for value in torch.aminmax(values))
    if not floats:
        if least < 0 or most > 255:
            raise VideoError(f"{name} has integers from {least} to {most}; give uint8 in [0, 255]")
        return values.to(torch.uint8)
    if math.isnan(least):  # aminmax is NaN where one of the values is
        raise VideoError(f"{name} has values that are not numbers (NaN); find what computed them, or give uint8")
    if not (least >= 0 and most <= 1):
        kind = "signed" if -1 <= least < 0 and most <= 1 else "large" if least >= 0 and most <= 255 else "other"
        raise VideoError(
            f"{name} has floats from {least:.4g} to {most:.4g}, but floats must be 0 to 1; give {_TO_BYTES[kind]}"
        )
    return (values * 255).round_().to(torch.uint8)


def _on_white(pixels: torch.Tensor) -> torch.Tensor:
    """RGB and opacity uint8 [4, H, W] blended with white."""
    colours, opacity = pixels[:3].int(), pixels[3:].int()
    return ((colours * opacity + 255 * (255 - opacity) + 127) // 255).to(torch.uint8)


def _type(values: Values) -> str:
    return str(values.dtype).removeprefix("torch.")


def _kind(values: Values) -> str:
    return f"{_type(values)} {list(values.shape)}"
