"""What every kernel of a simulated GPU computes and moves, and how long that takes at least."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from keye.model.flops import attention_pairs

PRODUCTS, ATTENTION, MEMORY, TRANSFER = "products", "attention", "memory", "transfers"
KINDS = (PRODUCTS, ATTENTION, MEMORY, TRANSFER)
aten = torch.ops.aten
ALLOCATIONS = (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided)


@dataclass(frozen=True)
class Rates:
    """What the kernels of a GPU reach: FLOP/s of products and of attention, bytes/s of memory and of the host link."""

    products: float
    attention: float
    memory: float
    link: float


@dataclass
class Sum:
    """Kernels of a kind."""

    kernels: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass
class Ledger:
    """Kernels by kind, and bytes of those that only move memory by operator."""

    device: torch.device
    kinds: dict[str, Sum] = field(default_factory=lambda: {kind: Sum() for kind in KINDS})
    by_operator: dict[str, Sum] = field(default_factory=dict)
    kernels: list[tuple[str, float, float]] = field(default_factory=list)

    def add(self, func: Any, args: Any, kwargs: Any, out: Any, value_of: Callable[[Tensor], Tensor | None]) -> int:
        """Note a kernel; returns the bytes that it needs while it runs."""
        given, made = _on(self.device, (args, kwargs)), _on(self.device, out)
        if not (given or made) or func.namespace == "prim" or func.is_view or _moves_nothing(func, given, made):
            return 0
        moved = sum(_bytes(tensor) for tensor in (*given, *made))
        name, workspace = str(func).rsplit(".", 1)[0], 0
        if _crosses(args, out, self.device):
            kind, work = TRANSFER, 0.0
        elif "attn" in name or "attention" in name:
            kind, work = ATTENTION, attention_work(_named(func, args, kwargs), value_of)
            workspace = 2 * _bytes(args[1]) if "backward" in name else 0  # fp32 gradients of the queries
        elif (count := flop_registry.get(func._overloadpacket)) is not None:
            kind, work = PRODUCTS, float(count(*args, **kwargs, out_val=out))
        else:
            kind, work = MEMORY, 0.0
        for total in (self.kinds[kind], self.by_operator.setdefault(name, Sum())):
            total.kernels += 1
            total.flops += work
            total.bytes += moved
        self.kernels.append((kind, work, moved))
        return workspace

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Kind → seconds: of each kernel what its operations or its bytes take, whichever is longer."""
        took = dict.fromkeys(KINDS, 0.0)
        for kind, work, moved in self.kernels:
            if kind == TRANSFER:
                took[kind] += moved / rates.link
            else:
                rate = rates.attention if kind == ATTENTION else rates.products
                took[kind] += max(work / rate, moved / rates.memory)
        return took


def attention_work(given: dict[str, Any], value_of: Callable[[Tensor], Tensor | None]) -> float:
    """Operations of torch's varlen kernel by its arguments: two products a pair forward, five backward."""
    query, bounds = given["query"], value_of(given["cu_seq_q"])
    if bounds is None:
        raise NotImplementedError("attention between boundaries whose values are not known")
    with _disable_current_modes():
        lengths = bounds.diff().tolist()
    products = 5 if "grad_out" in given else 2
    return products * 2.0 * attention_pairs(lengths, given["is_causal"]) * query.shape[1] * query.shape[2]


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of an operator by their names."""
    return {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs


def _on(device: torch.device, tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor) and leaf.device == device]


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _moves_nothing(func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """An allocation, or another name of the same memory."""
    if func._overloadpacket in ALLOCATIONS:
        return True
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    written = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
    return bool(made) and not written and all(t.untyped_storage()._cdata in storages for t in made)


def _crosses(args: Any, out: Any, device: torch.device) -> bool:
    """Whether a copy goes between the host and the device."""
    tensors = [leaf for leaf in tree_flatten((args, out))[0] if isinstance(leaf, Tensor) and leaf.dim()]
    return len({tensor.device == device for tensor in tensors}) == 2
