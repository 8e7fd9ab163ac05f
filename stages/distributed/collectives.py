"""Collectives with gradients, and a record of a rank's collectives that shows differences between ranks.

Every rank of a run must issue the same collectives in the same order, whatever its data; otherwise NCCL hangs or mixes
up tensors. `recorded` captures each call on a `ProcessGroup` from Python: of `torch.distributed`, DeepSpeed and this
project, forward and backward, on any backend (gloo, NCCL, the fake one of a simulation).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def exchange_rows(x: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows `[sum(sent), …]` → rows `[sum(got), …]`; the first `sent[0]` rows go to rank 0, and so on."""
    out = x.new_empty(sum(got), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), got, sent, group=group)
    return out


class _AllToAll(torch.autograd.Function):
    """`exchange_rows` with a gradient: the exchange is its own transpose, so the backward pass reverses it."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.got, ctx.group = sent, got, group
        return exchange_rows(x, sent, got, group)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad, ctx.got, ctx.sent, ctx.group), None, None, None


def all_to_all(x: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
    """`exchange_rows` with a gradient."""
    return _AllToAll.apply(x, sent, got, group)


class _AllGather(torch.autograd.Function):
    """`[n, …]` → `[P, n, …]`; the backward pass sums the gradients of all ranks at the owner of a block."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather(list(out.unbind(0)), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """`[n, …]` of the same shape on all ranks → `[P, n, …]` with gradient; a single process: `[1, n, …]`."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return x[None]
    return _AllGather.apply(x, group)


# Method of `ProcessGroup` → recorded name. Torch renamed some methods; both names are listed.
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
UNEQUAL = {"all_to_all", "all_to_all_single", "gather", "scatter"}  # ranks may send and receive different amounts


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
    """Record the collectives of this process in order while the context is open; contexts cannot be nested."""
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
    """A sentence on the first difference between the sequences of several ranks; None if they are the same."""
    first = list(ranks[0])
    for rank, calls in enumerate(ranks[1:], 1):
        for i, (wanted, got) in enumerate(zip(first, calls, strict=False)):
            if wanted != got:
                return f"collective {i}: rank 0 issues {wanted}, rank {rank} issues {got}"
        if len(calls) != len(first):
            longer, at = (calls, rank) if len(calls) > len(first) else (first, 0)
            extra = longer[min(len(calls), len(first))]
            counts = f"rank 0 issues {len(first)} collectives, rank {rank} {len(calls)}"
            return f"{counts}; rank {at} continues with {extra}"
    return None


def difference_over_ranks(calls: Sequence[Collective]) -> str | None:
    """`difference` of the recorded calls of all ranks; collective, the same on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(calls))
    return difference(gathered)
