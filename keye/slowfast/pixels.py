"""Conversion between pixel bytes and normalised floats.

Pixels are uint8 from decoding to the vision tower. A `PixelFormat` describes any other form that a model needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from keye.errors import KeyeError

HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation of SigLIP and Keye-VL: bytes become [-1, 1]."""


class Output(TypedDict, total=False):
    """Options for the format of output pixels; see `PixelFormat`."""

    dtype: torch.dtype | None
    device: torch.device | str | None
    mean: float | Sequence[float] | None
    std: float | Sequence[float] | None


def normalised(pixels: Tensor, mean: Sequence[float] = HALF, std: Sequence[float] = HALF) -> Tensor:
    """Bytes uint8 [..., 3, h, w] as float32 (value / 255 - mean) / std; floats are returned unchanged.

    With the default mean and std, any shape is accepted and the result is in [-1, 1].
    """
    if pixels.dtype != torch.uint8:
        return pixels
    return _normalise_(pixels.float(), mean, std)


def as_bytes(pixels: Tensor, mean: Sequence[float] = HALF, std: Sequence[float] = HALF) -> Tensor:
    """Normalised floats [..., 3, h, w] as the nearest uint8; bytes are returned unchanged."""
    if pixels.dtype == torch.uint8:
        return pixels
    if tuple(mean) == tuple(std) == HALF:
        return ((pixels.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
    mean, std = (_channels(values, pixels.device) for values in (mean, std))
    return ((pixels.float() * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)


def exact_bytes(pixels: Tensor) -> Tensor:
    """Floats in [-1, 1] as uint8 where that is lossless up to float32 rounding; unchanged otherwise."""
    if pixels.dtype == torch.uint8:
        return pixels
    codes = as_bytes(pixels)
    return codes if torch.allclose(normalised(codes), pixels.float(), atol=1e-6) else pixels


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate pixels [N, ...]; bytes where all parts are bytes, without a copy where there is one part."""
    if len(parts) == 1:
        return parts[0]
    same = len({part.dtype for part in parts}) == 1
    return torch.cat(list(parts) if same else [normalised(part) for part in parts])


def _normalise_(floats: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise float32 values from 0 to 255 in place."""
    if tuple(mean) == tuple(std) == HALF:
        return floats.div_(127.5).sub_(1)
    mean, std = (_channels(values, floats.device) for values in (mean, std))
    return floats.div_(255).sub_(mean).div_(std)


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


@dataclass(frozen=True)
class PixelFormat:
    """Type, device and normalisation of output pixels.

    dtype: torch.uint8 for bytes, or float32, float16 or bfloat16 for (value / 255 - mean) / std, computed in float32.
    device: None leaves pixels in host memory. mean, std: of values from 0 to 1, one number per channel.

    Raises:
        KeyeError: a value is impossible, or bytes have a mean or std.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device | str | None = None
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF

    @classmethod
    def of(cls, output: Output, dtype: torch.dtype = torch.float32) -> "PixelFormat":
        """The format of `output`, whose options may be None; dtype: the default type.

        Raises:
            KeyeError: an option is unknown or impossible.
        """
        given = {name: value for name, value in output.items() if value is not None}
        unknown = set(given) - set(Output.__annotations__)
        if unknown:
            raise KeyeError(f"unknown option {', '.join(sorted(unknown))}; use {', '.join(Output.__annotations__)}")
        for name in ("mean", "std"):
            if name in given:
                given[name] = _three(name, given[name])
        return cls(**{"dtype": dtype, **given})

    def __post_init__(self) -> None:
        if self.dtype not in (torch.uint8, torch.float32, torch.float16, torch.bfloat16):
            raise KeyeError(f"dtype is {self.dtype}; give torch.uint8, float32, float16 or bfloat16")
        if self.dtype == torch.uint8 and (self.mean, self.std) != (HALF, HALF):
            raise KeyeError("bytes are not normalised; give mean and std with a float dtype, or leave them out")
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch is built without it
                reason = str(error).splitlines()[0]
                raise KeyeError(f"device {self.device} cannot be used ({reason:.120}); give another") from error
        if not all(value > 0 for value in self.std):
            raise KeyeError(f"std is {self.std}; give numbers above 0")

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor of this format."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def convert(self, pixels: Tensor) -> Tensor:
        """Bytes [..., 3, h, w] in this format; they are moved to the device as bytes."""
        pixels = pixels.to(self.device or pixels.device)
        return pixels if self.dtype == torch.uint8 else normalised(pixels, self.mean, self.std).to(self.dtype)

    def fill(self, target: Tensor, pixels: Tensor) -> None:
        """Write bytes into `target` of the same shape; float32 is normalised in place, without a copy."""
        if self.dtype == torch.float32:
            _normalise_(target.copy_(pixels), self.mean, self.std)
        else:
            target.copy_(self.convert(pixels))


def _three(name: str, value: float | Sequence[float]) -> tuple[float, float, float]:
    try:
        values = (value,) * 3 if isinstance(value, int | float) else tuple(float(one) for one in value)
    except (TypeError, ValueError):
        values = ()
    if len(values) != 3 or not all(abs(one) < 1e6 for one in values):
        raise KeyeError(f"{name} is {value!r}; give one number, or one for each of the three channels")
    return values
