"""Clips of a disc that tell pathways apart: at the rate of the Slow pathway, spin and flicker look the same.

The Slow pathway reads frames 0, 5, 10 and 15 of 16 (`keye.motion.frames.slow_places`). A half that turns by k/5 of a
circle per frame, and a disc whose brightness has k/5 of a period per frame, are equal in all of them for every k.
"""

import math

import torch
from torch import Tensor

FAMILIES = ("spin", "flicker", "dots")
# Turns in five frames; periods in five frames; dots on the disc.
VALUES = {"spin": (1, -1), "flicker": (0, 1, 2), "dots": (1, 2, 3, 4)}
CLASSES = sum(len(values) for values in VALUES.values())
FRAMES, SIDE, PERIOD = 16, 32, 5
NOISE = 8.0


def classes_of(family: str) -> slice:
    """The outputs of a classifier that belong to a family."""
    begin = sum(len(VALUES[name]) for name in FAMILIES[: FAMILIES.index(family)])
    return slice(begin, begin + len(VALUES[family]))


def draw(family: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """uint8 clips `[count, 16, 3, 32, 32]` of one family, and their classes `[count]` from 0 within the family.

    Centre, radius, colours, phase and noise are drawn; nothing but the class differs between classes.
    """
    draw = torch.Generator().manual_seed(seed * len(FAMILIES) + FAMILIES.index(family))

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=draw)

    labels = torch.randint(len(VALUES[family]), (count,), generator=draw)
    value = torch.tensor(VALUES[family])[labels]
    axis = torch.arange(SIDE) - (SIDE - 1) / 2
    across = axis.view(1, 1, -1) - uniform(-3, 3, 1, 1)
    down = axis.view(1, -1, 1) - uniform(-3, 3, 1, 1)
    radius = uniform(9, 12, 1, 1)
    disc = (radius - (across**2 + down**2).sqrt()).add(0.5).clamp(0, 1)
    background, colour, ink = uniform(40, 90, 3), uniform(110, 170, 3), uniform(200, 250, 3)
    phase = uniform(0, 2 * math.pi, 1) + 2 * math.pi / PERIOD * torch.arange(FRAMES) * value[:, None]
    mark = disc.new_zeros(count, FRAMES, SIDE, SIDE)
    light = torch.ones(count, FRAMES)
    if family == "spin":
        along = across[:, None] * phase.cos()[..., None, None] + down[:, None] * phase.sin()[..., None, None]
        mark = disc[:, None] * (along + 0.5).clamp(0, 1)
    elif family == "flicker":
        light = 1 + 0.35 * phase.cos()
    else:
        places = torch.rand(count, 4, generator=draw).argsort(1)  # four of eight places on a ring: dots never touch
        angle = (uniform(0, 2 * math.pi, 1) + math.pi / 2 * places)[..., None, None]
        far = 0.6 * radius[:, None]
        dots = 2.2 - ((across[:, None] - far * angle.cos()) ** 2 + (down[:, None] - far * angle.sin()) ** 2).sqrt()
        shown = torch.arange(4) < value[:, None]
        mark = (dots.clamp(0, 1) * shown[..., None, None]).amax(1)[:, None].expand(-1, FRAMES, -1, -1)

    def rgb(values: Tensor) -> Tensor:
        return values[:, None, :, None, None]

    disc, mark = disc[:, None, None], mark[:, :, None]
    pixels = rgb(background) * (1 - disc) + disc * rgb(colour) * light[..., None, None, None]
    pixels = pixels * (1 - mark) + rgb(ink) * mark
    pixels = pixels + NOISE * torch.randn(pixels.shape, generator=draw)
    return pixels.round().clamp(0, 255).to(torch.uint8), labels
