"""How much of a frame's detail is kept at a smaller size, measured on the frame's own pixels.

Detail is the energy of the grey picture's gradient. The picture is divided into octaves by averaging 2x2 pixels
repeatedly: what one averaging removes is the energy of an octave (of the Haar wavelet), weighted by its squared
frequency. A size that is smaller by x octaves keeps all octaves but the finest x.
"""

import math
from collections.abc import Sequence

import torch

from keye.slowfast.resizing import resize

OCTAVES = 7
"""A full-size frame of 20x36 tokens is 560 pixels high; after 7 octaves 4 are left."""


def octave_energies(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The detail of frames uint8 [T, 3, H, W] at `size` (height, width), by octave from the finest: float64 [T, 7].

    Sums are over integers, so that a frame's energies do not depend on the batch.
    """
    colours = resize(frames, size).int()
    grey = (77 * colours[:, 0] + 150 * colours[:, 1] + 29 * colours[:, 2]) >> 8
    energies = torch.zeros(len(frames), OCTAVES, dtype=torch.float64)
    for octave in range(OCTAVES):
        height, width = (side // 2 * 2 for side in grey.shape[-2:])
        if not height or not width:
            break
        rows = grey[:, :height:2, :width] + grey[:, 1:height:2, :width]
        sums = rows[..., ::2] + rows[..., 1::2]
        removed = 4 * _squares(grey[:, :height, :width]) - _squares(sums)  # of sums over 4 ** octave pixels
        energies[:, octave] = removed.double() / 4.0 ** (2 * octave)  # once for the squared frequency
        grey = sums
    return energies


def _squares(values: torch.Tensor) -> torch.Tensor:
    values = values.long() if values.max() > 40_000 else values
    return (values * values).sum((1, 2), dtype=torch.int64)


def kept_detail(energies: torch.Tensor, octaves: Sequence[float]) -> torch.Tensor:
    """The share [T, L] of the detail [T, 7] that is kept at sizes smaller by each of L numbers of octaves.

    A flat picture keeps all at any size.
    """
    total = energies.sum(1, keepdim=True)
    shares = torch.where(total > 0, energies / total.clamp(min=1e-12), torch.zeros_like(energies))
    lost = torch.cat([torch.zeros_like(total), shares.cumsum(1)], 1)
    places = torch.tensor(octaves, dtype=torch.float64).clamp(0, OCTAVES)
    below = places.floor().long().clamp(max=OCTAVES - 1)
    part = places - below
    return 1 - (lost[:, below] * (1 - part) + lost[:, below + 1] * part)


def octaves_between(size: tuple[int, int], full: tuple[int, int]) -> float:
    """By how many octaves `size` is smaller than `full`: by 1 where its area is a quarter."""
    return max(0.0, 0.5 * math.log2(full[0] * full[1] / (size[0] * size[1])))
