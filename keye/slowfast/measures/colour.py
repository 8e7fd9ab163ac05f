"""Colour conversions: OpenCV's HSV to the bit, with or without OpenCV, and CIELAB."""

import importlib
from functools import cache
from types import ModuleType

import torch


def rgb_to_hsv(pixels: torch.Tensor) -> torch.Tensor:
    """Hue (0–179), saturation and value (0–255) as uint8 [..., 3] of RGB uint8 [..., 3]: OpenCV's COLOR_RGB2HSV.

    OpenCV is used on the CPU where it is installed, since it is several times faster; otherwise tables give the same
    bytes.
    """
    opencv = _opencv() if pixels.device.type == "cpu" else None
    if opencv is None:
        return hsv_from_tables(pixels)
    # As one row: OpenCV would process several rows in threads of its own, whose number the caller does not control.
    return torch.from_numpy(opencv.cvtColor(pixels.reshape(1, -1, 3).numpy(), opencv.COLOR_RGB2HSV)).view(pixels.shape)


def hsv_from_tables(pixels: torch.Tensor) -> torch.Tensor:
    """`rgb_to_hsv` without OpenCV, on any device.

    Red, green and blue are sorted into largest, middle and smallest in uint8. Saturation depends on the largest and its
    distance from the smallest, hue on the order of the three and two distances, so that each takes one look-up. 100,000
    pixels at a time fit a CPU's cache with all intermediate results.
    """
    step = 100_000 if pixels.device.type == "cpu" else max(1, pixels.numel())
    parts = [_hsv_of_planes(*part.t().contiguous()) for part in pixels.reshape(-1, 3).split(step)]
    return torch.cat(parts).view(pixels.shape)


def _hsv_of_planes(red: torch.Tensor, green: torch.Tensor, blue: torch.Tensor) -> torch.Tensor:
    hue_table, saturation_table = _hsv_tables(red.device)
    larger, smaller = torch.maximum(red, green), torch.minimum(red, green)
    value = torch.maximum(larger, blue)
    middle = torch.maximum(torch.minimum(larger, blue, out=larger), smaller, out=larger)
    smallest = torch.minimum(smaller, blue, out=smaller)
    middle -= smallest
    spread = torch.sub(value, smallest, out=smallest).int()
    order = (red < green).view(torch.uint8)
    order.add_((green < blue).view(torch.uint8), alpha=2).add_((blue <= red).view(torch.uint8), alpha=4)
    index = value.int().add_(spread, alpha=256)
    saturation = saturation_table.index_select(0, index)
    index.copy_(middle).add_(spread, alpha=256).add_(order.int(), alpha=256 * 256)
    return torch.stack([hue_table.index_select(0, index), saturation, value], dim=-1)


@cache
def _opencv() -> ModuleType | None:
    try:
        return importlib.import_module("cv2")
    except ImportError:
        return None


@cache
def _hsv_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Hue by 65536 * order + 256 * spread + (middle - smallest), saturation by 256 * spread + value: both uint8.

    OpenCV computes in fixed point of 12 bits with rounded reciprocals. `order` has three bits: red < green,
    green < blue, blue <= red. Hue is a multiple of a sixth of the circle, plus or minus the middle's part of a sixth.
    """
    steps = torch.arange(256)
    divisors = steps.clamp(min=1).double()
    spread, other = torch.meshgrid(steps, steps, indexing="ij")  # other: the value, or the middle - smallest
    saturation = (spread * (255 * 4096 / divisors).round().long() + 2048) >> 12
    # Sixths of the circle and the sign of the middle's part, by order; the orders 0 and 7 cannot occur.
    sixths = torch.tensor([0, 2, 4, 4, 0, 2, 0, 0])[:, None, None]
    signs = torch.tensor([0, 1, 1, -1, 1, -1, -1, 0])[:, None, None]
    hue = ((sixths * spread + signs * other) * (30 * 4096 / divisors).round().long()[:, None] + 2048) >> 12
    hue = torch.where(hue < 0, hue + 180, hue)
    return hue.flatten().to(device, torch.uint8), saturation.flatten().to(device, torch.uint8)


# Linear sRGB to CIE XYZ (IEC 61966-2-1), each row divided by its sum: the white of the D65 light becomes (1, 1, 1).
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))


def rgb_to_lab(rgb: torch.Tensor) -> torch.Tensor:
    """CIELAB float32 [3, ...] (lightness 0–100, a and b about -128–127) of uint8 sRGB [3, ...] under D65."""
    values = torch.arange(256, device=rgb.device, dtype=torch.float64) / 255
    linear = torch.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92).float()
    light = linear.index_select(0, rgb.flatten().int()).view(3, -1)
    matrix = torch.tensor(_XYZ, device=rgb.device)
    xyz = (matrix / matrix.sum(1, keepdim=True)) @ light
    root = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-6) ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = root
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)]).view(rgb.shape)
