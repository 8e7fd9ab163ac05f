"""The protocol of a plan that the modules here draw."""

from typing import Protocol

import torch


class Drawable(Protocol):
    """The attributes of `keye.VideoPlan` that are drawn or printed; `keye.VideoPlan` gives shapes and units."""

    source: str
    frame_types: torch.Tensor
    timestamps: torch.Tensor
    frame_indices: torch.Tensor
    similarity: torch.Tensor
    source_size: tuple[int, int]
    slow_size: tuple[int, int]
    fast_size: tuple[int, int]
    max_tokens: int
    duration: float
    settings: dict
    warnings: tuple[str, ...]

    @property
    def counts(self) -> tuple[int, int]: ...
    @property
    def tokens(self) -> int: ...
    @property
    def tokens_per_frame(self) -> torch.Tensor: ...
    @property
    def tokens_per_second(self) -> float: ...
    @property
    def all_slow_tokens(self) -> int: ...
    @property
    def saved(self) -> float: ...
    @property
    def span(self) -> tuple[float, float]: ...
    @property
    def frame_ends(self) -> torch.Tensor: ...
    def tokens_each(self, kind: int) -> str: ...
    def facts(self) -> list[tuple[str, str]]: ...
    def frame_rows(self) -> list[tuple[str, str, str, str, str, str]]: ...
    def __len__(self) -> int: ...
