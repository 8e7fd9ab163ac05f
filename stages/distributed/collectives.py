"""Records which collectives a rank issues, and finds where ranks disagree.

Every rank of a run must issue the same collectives in the same order, whatever its data; otherwise NCCL hangs or mixes
up tensors. `recorded` sees each call on a `ProcessGroup` that goes through Python: `torch.distributed`, DeepSpeed and
this project, forward and backward, on any backend (gloo, NCCL, the fake one of a simulation).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

# Name of the method of `ProcessGroup` → what is recorded. Torch renamed some of them; either name means the same.
OPERATIONS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce_coalesced",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather_coalesced",
    "_allgather_base": "all_gather_single",
    "all_gather_single": "all_gather_single",
    "allgather_into_tensor_coalesced": "all_gather_single_coalesced",
    "all_gather_single_coalesced": "all_gather_single_coalesced",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter_single",
    "reduce_scatter_single": "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_single_coalesced",
    "reduce_scatter_single_coalesced": "reduce_scatter_single_coalesced",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all_single",
    "all_to_all_single": "all_to_all_single",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
}
UNEQUAL = {"all_to_all", "all_to_all_single", "gather", "scatter"}  # ranks may send and get different amounts


@dataclass(frozen=True)
class Collective:
    """One call. ranks: size of its group. dtype, elements: of all its tensors; −1 elements where ranks may differ."""

    operation: str
    ranks: int
    dtype: str
    elements: int

    def __str__(self) -> str:
        amount = "" if self.elements < 0 else f", {self.elements} elements"
        return f"{self.operation} over {self.ranks} ranks ({self.dtype or 'no tensor'}{amount})"


@contextmanager
def recorded() -> Iterator[list[Collective]]:
    """Record the collectives of this process, in order, while the context is open; not to be nested."""
    calls: list[Collective] = []
    names = [name for name in OPERATIONS if name in vars(dist.ProcessGroup)]
    own = {name: vars(dist.ProcessGroup)[name] for name in names}
    for name in names:
        setattr(dist.ProcessGroup, name, _recording(OPERATIONS[name], own[name], calls))
    try:
        yield calls
    finally:
        for name, method in own.items():
            setattr(dist.ProcessGroup, name, method)


def _recording(operation: str, method: Any, calls: list[Collective]) -> Any:
    def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        tensors = list(_tensors([*args, *kwargs.values()]))
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        elements = -1 if operation in UNEQUAL else sum(tensor.numel() for tensor in tensors)
        calls.append(Collective(operation, group.size(), dtype, elements))
        return method(group, *args, **kwargs)

    return call


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def difference(ranks: Sequence[Sequence[Collective]]) -> str | None:
    """Where the sequences of several ranks first differ, in words; None when they are the same."""
    first = list(ranks[0])
    for rank, calls in enumerate(ranks[1:], 1):
        for i, (wanted, got) in enumerate(zip(first, calls, strict=False)):
            if wanted != got:
                return f"collective {i}: rank 0 issues {wanted}, rank {rank} issues {got}"
        if len(calls) != len(first):
            longer, at = (calls, rank) if len(calls) > len(first) else (first, 0)
            extra = longer[min(len(calls), len(first))]
            counts = f"rank 0 issues {len(first)} collectives, rank {rank} {len(calls)}"
            return f"{counts}; rank {at} goes on with {extra}"
    return None


def difference_over_ranks(calls: Sequence[Collective]) -> str | None:
    """`difference` of all ranks' recorded calls; collective, the same on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(calls))
    return difference(gathered)
