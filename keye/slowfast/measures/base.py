"""The protocol of a similarity measure and the registry of measures."""

from typing import Protocol

import torch


class Measure(Protocol):
    """Scores how alike frames are. `name` is its registered name, `threshold` the value below which a frame is slow."""

    name: str
    threshold: float

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        """Features [T, ...] of frames [T, 3, H, W] uint8 RGB; frames of one clip share one size."""
        ...

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Scores [T] float32 in [0, 1], 1 = the same, of features [T, ...] against one reference [...]."""
        ...


REGISTRY: dict[str, type[Measure]] = {}


def register(measure: type[Measure]) -> type[Measure]:
    """Make a measure class known under its `name`; use it as a decorator. It is built without arguments."""
    REGISTRY[measure.name] = measure
    return measure
