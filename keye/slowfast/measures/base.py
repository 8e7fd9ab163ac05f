"""The protocol of a similarity measure and the registry of measures."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from keye.video.decoding.packet_facts import PacketFacts

Tower = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A vision tower: (pixel_values [N, 3, 14, 14], grid_thw LongTensor [F, 3]) -> features [N / 4, hidden]."""


class Measure(Protocol):
    """Scores the similarity of frames.

    name: its registered name. threshold: the default similarity below which a frame is slow.
    """

    name: str
    threshold: float

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        """Features [T, ...] of frames uint8 [T, 3, H, W] in RGB; all frames of a clip have one size."""
        ...

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Scores float32 [T] in [0, 1], 1 = identical, of features [T, ...] against one reference [...]."""
        ...


class PacketMeasure(Measure, Protocol):
    """A measure that compares the packets of a file, see `keye.slowfast.measures.packets`.

    pixels: the measure, with its own threshold, for frames without packets.
    """

    pixels: Measure

    def lacks(self, facts: "PacketFacts") -> str | None:
        """Why the packets of a stream say nothing about changes; None where they do."""
        ...

    def read(self, facts: "PacketFacts", frames: np.ndarray) -> torch.Tensor:
        """Features [T, ...] for `compare` of the frames at ascending positions int64 [T] of a stream."""
        ...


REGISTRY: dict[str, type[Measure]] = {}


def register(measure: type[Measure]) -> type[Measure]:
    """Class decorator: register a measure under its `name`. The class is created without arguments."""
    REGISTRY[measure.name] = measure
    return measure
