"""The segments of a packed row, read from the device once and kept for all layers of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from keye.errors import KeyeError

Runs = list[tuple[int, int]]


@dataclass
class Segments:
    """Lengths of the segments that are not empty, in order, and the tensors that kernels need."""

    lengths: tuple[int, ...]
    total: int = field(init=False)
    longest: int = field(init=False)
    _bounds: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)
    _orders: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.total, self.longest = sum(self.lengths), max(self.lengths, default=0)
        self._neighbours: Runs = [(len(list(group)), length) for length, group in groupby(self.lengths)]
        self._gathered: Runs = [(len(list(group)), length) for length, group in groupby(sorted(self.lengths))]

    @classmethod
    def of_lengths(cls, lengths: tuple[int, ...]) -> Segments:
        """Segments of these lengths, without the empty ones."""
        return cls(tuple(length for length in lengths if length))

    def bounds_on(self, device: torch.device) -> Tensor:
        """int32 `[S + 1]` on `device`, from 0 to L, copied there once."""
        if device not in self._bounds:
            self._bounds[device] = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32).to(device)
        return self._bounds[device]

    def boundaries(self, device: torch.device) -> Tensor:
        """A new tensor int32 `[S + 1]` on `device` that `segments_of` knows, so that nothing waits for the device."""
        bounds = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32).to(device)
        # Segments of its own: these may keep their tensors on the device, and must not keep the key of the table alive.
        _read[bounds] = (_version(bounds), Segments(self.lengths))
        return bounds

    def runs(self, token_bytes: int, call_bytes: int, device: torch.device) -> tuple[Tensor | None, Runs]:
        """Segments as runs (count, length) of equal ones, each of which is one batched call.

        Args:
            token_bytes: the cost of moving a token.
            call_bytes: the cost of a call, in the same unit.
            device: of the token order.

        Returns:
            The token order `[L]` that gathers equal segments, and their runs, where that is cheaper; otherwise None and
            the runs of equal neighbours.
        """
        calls_saved = len(self._neighbours) - len(self._gathered)
        if calls_saved * call_bytes <= self.total * token_bytes:
            return None, self._neighbours
        if device not in self._orders:
            starts = [0, *accumulate(self.lengths)]
            by_length = sorted(zip(self.lengths, starts, strict=False))
            order = torch.cat([torch.arange(start, start + length) for length, start in by_length])
            self._orders[device] = order.to(device)
        return self._orders[device], self._gathered


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def segments_of(cu_seqlens: Tensor) -> Segments:
    """The segments with the boundaries `cu_seqlens` `[S + 1]` (integers, any device).

    Reading them waits for the device, so it is done once per tensor, for all layers. Do not change the tensor in place
    while it is in use; torch counts such changes, except in inference mode, and a changed tensor is read again.

    Raises:
        KeyeError: boundaries that do not start at 0 or that decrease.
    """
    known = _read.get(cu_seqlens)
    if known is not None and known[0] == _version(cu_seqlens):
        return known[1]
    bounds = cu_seqlens.tolist()
    lengths = tuple(stop - start for start, stop in pairwise(bounds))
    if not bounds or bounds[0] != 0 or min(lengths, default=0) < 0:
        raise KeyeError(f"cu_seqlens must rise from 0 to the number of tokens, got {bounds[:8]}")
    segments = Segments.of_lengths(lengths)
    _read[cu_seqlens] = (_version(cu_seqlens), segments)
    return segments


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; torch does not count it in inference mode."""
    return None if tensor.is_inference() else tensor._version
