"""Colour conversions: OpenCV's HSV to the bit, from tables instead of arithmetic per pixel, and CIELAB."""

from functools import cache

import torch


def rgb_to_hsv(rgb: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Hue (0–179), saturation and value (0–255) as uint8 [3, ...] of red, green and blue uint8 [3, ...].

    To the bit what OpenCV's COLOR_RGB2HSV gives. The three are sorted into largest, middle and smallest in uint8; then
    saturation is a matter of the largest and its distance from the smallest, and hue of the order of the three and two
    distances, so that each is one look-up. Fastest on contiguous planes of some 100,000 pixels, which fit the cache
    of a processor with all that is in between. `out`: planes to fill, contiguous, not those of `rgb`.
    """
    red, green, blue = rgb
    hue, saturation, value = out = torch.empty_like(rgb, memory_format=torch.contiguous_format) if out is None else out
    hue_table, saturation_table = _hsv_tables(rgb.device)
    larger, smaller = torch.maximum(red, green), torch.minimum(red, green)
    torch.maximum(larger, blue, out=value)
    middle = torch.maximum(torch.minimum(larger, blue, out=larger), smaller, out=larger)
    smallest = torch.minimum(smaller, blue, out=smaller)
    middle -= smallest
    spread = torch.sub(value, smallest, out=smallest).int()
    order = (red < green).view(torch.uint8)
    order.add_((green < blue).view(torch.uint8), alpha=2).add_((blue <= red).view(torch.uint8), alpha=4)
    index = value.int().add_(spread, alpha=256)
    torch.index_select(saturation_table, 0, index.view(-1), out=saturation.view(-1))
    index.copy_(middle).add_(spread, alpha=256).add_(order.int(), alpha=256 * 256)
    torch.index_select(hue_table, 0, index.view(-1), out=hue.view(-1))
    return out


@cache
def _hsv_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Hue by 65536 * order + 256 * spread + (middle - smallest), saturation by 256 * spread + value: both uint8.

    OpenCV computes in fixed point of 12 bits, with rounded reciprocals. `order` has three bits: red < green,
    green < blue, blue <= red; hue is a multiple of a sixth of the circle, plus or minus the middle's part of it.
    """
    steps = torch.arange(256)
    shares = steps.clamp(min=1).double()
    spread, other = torch.meshgrid(steps, steps, indexing="ij")  # other: the value, or the middle - smallest
    saturation = (spread * (255 * 4096 / shares).round().long() + 2048) >> 12
    # Sixths of the circle and the sign of the middle's part, by order; the orders 0 and 7 cannot occur.
    sixths = torch.tensor([0, 2, 4, 4, 0, 2, 0, 0])[:, None, None]
    signs = torch.tensor([0, 1, 1, -1, 1, -1, -1, 0])[:, None, None]
    hue = ((sixths * spread + signs * other) * (30 * 4096 / shares).round().long()[:, None] + 2048) >> 12
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
