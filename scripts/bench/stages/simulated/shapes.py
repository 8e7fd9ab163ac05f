"""Tensors without values: a training step runs with shapes alone, and what it would hold in memory is counted.

Large floating-point tensors live on torch's meta device, small ones and integers are real, because code reads lengths,
grids and labels. `Shapes` is the dispatch mode under which both work together, as if all were on one device.
"""

import weakref
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
REAL = 64  # elements of a floating-point tensor that is made with values, at most
SIZED = {
    aten.empty.memory_format, aten.zeros.default, aten.ones.default, aten.full.default, aten.rand.default,
    aten.randn.default, aten.empty_strided.default,
}  # fmt: skip
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Memory:
    """Bytes of the meta storages that are alive, now and at most; `window`: at most since a moment of its own."""

    def __init__(self) -> None:
        self.now = self.peak = self.window = 0
        self._known: dict[int, weakref.ref] = {}

    def see(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` from now until nothing refers to it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak, self.window = max(self.peak, self.now), max(self.window, self.now)

    def forget(self, tensor: Tensor) -> None:
        """Count a storage no longer, though it stays."""
        key = tensor.untyped_storage()._cdata
        if key in self._known:
            self.now -= tensor.untyped_storage().nbytes()
            self._known[key] = weakref.ref(tensor.untyped_storage(), lambda _: self._known.pop(key, None))

    def restart(self) -> None:
        """Begin a new peak at what is held now."""
        self.peak = self.now


class Shapes(TorchDispatchMode):
    """See the module's docstring. memory: what the meta tensors that were seen would take."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.operators += 1
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.is_meta for x in tensors):
            if func.namespace != "c10d":
                out = self._without_values(func, tensors, args, kwargs)
            else:
                out = func(*args, **kwargs)
        else:
            if func in SIZED and prod(args[0]) > REAL and _floating(kwargs):
                kwargs = {**kwargs, "device": torch.device("meta"), "pin_memory": False}
            out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.is_meta:
                self.memory.see(x)
        return out

    def _without_values(self, func: Any, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is aten._local_scalar_dense.default:
            return _value(args[0].dtype)
        if _written(func) and isinstance(args[0], Tensor) and not args[0].is_meta:
            return args[0]  # a real tensor keeps its value
        if func in INDEXED:
            args = (args[0], [row for x in args[1] for row in _rows(x)], *args[2:])
        if not all(x.is_meta for x in tensors):
            args, kwargs = tree_map_only(Tensor, _shape, (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _floating(kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return dtype.is_floating_point


def _written(func: Any) -> bool:
    arguments = func._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write


def _value(dtype: torch.dtype) -> bool | int | float:
    """What stands for a number that is read: a finite norm or loss, and no overflow."""
    return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _rows(index: Tensor | None) -> list[Tensor | None]:
    """A mask with values as positions, one index a dimension, because their number is a shape."""
    masked = index is not None and index.dtype == torch.bool and not index.is_meta
    return list(index.nonzero().T) if masked else [index]


def _shape(x: Tensor) -> Tensor:
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
