"""Colour conversions in exact integer arithmetic."""

import torch


def _division_table(numerator: int) -> torch.Tensor:
    """round(numerator * 4096 / i) for i in 0 … 255, with 0 at 0: fixed-point reciprocals."""
    steps = torch.arange(256, dtype=torch.float64).clamp(min=1)
    table = (numerator * 4096 / steps).round().int()
    table[0] = 0
    return table


def rgb_to_hsv(frames: torch.Tensor) -> torch.Tensor:
    """RGB [T, 3, H, W] uint8 to HSV uint8 with OpenCV's integer arithmetic: hue 0–179, saturation and value 0–255."""
    red, green, blue = frames.int().unbind(-3)
    value = frames.amax(-3).int()
    spread = value - frames.amin(-3).int()
    saturation_of = _division_table(255).to(frames.device)
    hue_of = _division_table(30).to(frames.device)  # 180 degrees over six sectors
    saturation = (spread * saturation_of[value] + 2048) >> 12
    sector = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (sector * hue_of[spread] + 2048) >> 12
    hue = torch.where(hue < 0, hue + 180, hue)
    return torch.stack([hue, saturation, value], dim=-3).to(torch.uint8)
