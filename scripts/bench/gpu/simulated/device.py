"""A GPU that computes nothing: the real code at full size on a CPU, with the shapes, memory and work of each operation.

Tensors on the device have shapes and no contents, except integers and booleans: their values are computed on the CPU,
because lengths, boundaries and placeholders decide the shapes of everything else. What is found:

- whether tensors of different devices meet (an error), and where the host waits for the device;
- the bytes of all live tensors, on the device and on the host, and their peaks;
- the operations and the bytes moved of every kernel (`ledger.py`).

torch takes such a device as its "PrivateUse1" backend in Python; FakeTensorMode of the CUDA device itself has no
autograd in a build without CUDA. One process can have one such device, and other work does not belong in it.
"""

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from keye.model import attention, backends
from scripts.bench.common.record import ROOT
from scripts.bench.gpu.simulated.ledger import Ledger
from scripts.bench.stages.simulated.shapes import Memory

NAME = "simulated"
CONTENTS = "_contents_on_the_host"  # attribute of a tensor whose values are known
SMALL = 1 << 16  # elements of a floating-point tensor whose values are kept
aten = torch.ops.aten


class Backend(backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def current_device(self) -> int:
        return 0

    def device(self, index: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def synchronize(self, device: Any = None) -> None:
        """Nothing is ever under way."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """There is no state."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class SimulatedGPU(TorchDispatchMode):
    """Used as a context: tensors that are made inside, on `device` or on the host, have no contents.

    Tensors made outside may be used inside; they are on the host.

    Attributes:
        device: of the simulated GPU.
        memory, host: bytes of the tensors on the device and on the host.
        ledger: the kernels so far.
        waits: place in the code → how often the host waits there for a value of the device.

    Raises (inside):
        FakeTensorDeviceMismatchError: an operation on tensors of the device and of the host.
        NotImplementedError: the shape of a result depends on values that are not known.
    """

    def __init__(self) -> None:
        super().__init__()
        if not hasattr(torch, NAME):
            backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
        _register_kernels()
        self.device = torch.device(NAME, 0)
        self.memory, self.host, self.ledger = Memory(), Memory(), Ledger(self.device)
        self.waits: Counter[str] = Counter()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._special: dict[Any, Callable[..., Any]] = {
            aten._local_scalar_dense.default: self._scalar,
            aten.nonzero.default: self._by_value,
            aten.masked_select.default: self._by_value,
            aten.repeat_interleave.Tensor: self._by_value,
            aten.bincount.default: self._by_value,
            aten.unique_consecutive.default: self._by_value,
            aten.equal.default: self._compare,
            aten.allclose.default: self._compare,
        }
        self._outer = contextlib.ExitStack()
        backends.obstacle("torch", torch.device("cpu"))  # loads the kernel's module

    def __enter__(self) -> "SimulatedGPU":
        # torch.tensor makes its tensor on the host first: the device cannot hold values.
        self._outer.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        self._outer.enter_context(patch.object(FakeTensor, "tolist", lambda tensor: self._list(tensor)))
        # The choice of a GPU's kernel, which a trial run would make there.
        self._outer.enter_context(patch.object(attention, "choose", lambda *_: "torch"))
        self._outer.enter_context(self._fake)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._outer.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        args, kwargs = tree_map_only(Tensor, self._mine, (args, kwargs))
        if special := self._special.get(func):
            return special(func, args, kwargs)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = self._without_masks(args)
        out = func(*args, **kwargs)
        # Weak references of this table would keep modules from replacing their parameters (`Module.to`).
        self._fake.fake_tensor_converter.meta_converter.tensor_memo.clear()
        self._compute(func, args, kwargs, out)
        for tensor in _tensors(out):
            (self.memory if tensor.device == self.device else self.host).see(tensor)
        self._note_copy(func, args, out)
        workspace = self.ledger.add(func, args, kwargs, out, self.value_of)
        self.memory.peak = max(self.memory.peak, self.memory.now + workspace)
        return out

    def value_of(self, tensor: Tensor) -> Tensor | None:
        """The contents of a tensor, on the CPU, where they are known."""
        return getattr(tensor, CONTENTS, None) if isinstance(tensor, FakeTensor) else tensor

    def restart(self) -> None:
        """Forget kernels, waits and peaks; tensors that are alive stay."""
        self.ledger = Ledger(self.device)
        self.waits.clear()
        self.memory.restart()
        self.host.restart()

    def _mine(self, tensor: Tensor) -> Tensor:
        """A tensor from outside as one of the host, with its contents."""
        if isinstance(tensor, FakeTensor):
            return tensor
        with _disable_current_modes():
            made = self._fake.from_tensor(tensor.detach(), static_shapes=True)
            if tensor.requires_grad:
                made.requires_grad_()
            setattr(made, CONTENTS, tensor.detach())
        return made

    def _compute(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """The values of the results, where those of all arguments are known and the results are small or integers."""
        given, results = _tensors((args, kwargs)), _tensors(out)
        written = [args[i] for i, arg in enumerate(func._schema.arguments[: len(args)]) if _is_written(arg)]
        known = [self.value_of(tensor) for tensor in given]
        wanted = all(not t.is_floating_point() or t.numel() <= SMALL for t in results)
        if not results or not wanted or func.namespace != "aten" or any(value is None for value in known):
            for tensor in _tensors(written):
                setattr(tensor, CONTENTS, None)
            return
        with _disable_current_modes():
            real = func(*tree_map_only(Tensor, self.value_of, args), **self._on_cpu(kwargs))
        for tensor, value in zip(results, _tensors(real), strict=True):
            setattr(tensor, CONTENTS, value)

    def _on_cpu(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        made = tree_map_only(Tensor, self.value_of, kwargs)
        if made.get("device") is not None:
            made["device"] = torch.device("cpu")
        return {name: value for name, value in made.items() if name != "pin_memory"}

    def _give(self, value: Tensor, device: torch.device) -> Tensor:
        """A tensor of the device with these contents."""
        made = torch.empty(value.shape, dtype=value.dtype, device=device)
        setattr(made, CONTENTS, value)
        return made

    def _by_value(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The results of an operation whose shapes depend on contents."""
        first = args[0]
        if func is not aten.repeat_interleave.Tensor or kwargs.get("output_size") is None:
            self._wait(first)
        if func is aten.masked_select.default:
            with _disable_current_modes():
                count = int(self._known(args[1]).expand(first.shape).sum())
            return torch.empty(count, dtype=first.dtype, device=first.device)
        args, kwargs = tree_map_only(Tensor, self._known, (args, kwargs))
        with _disable_current_modes():
            value = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda found: self._give(found, first.device), value)

    def _scalar(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._wait(args[0])
        if args[0].is_floating_point() and self.value_of(args[0]) is None:
            return 1.0  # a loss or a norm: it is printed, and no shape depends on it
        with _disable_current_modes():
            return self._known(args[0]).item()

    def _list(self, tensor: Tensor) -> Any:
        self._wait(tensor)
        with _disable_current_modes():
            return self._known(tensor).tolist()

    def _compare(self, func: Any, args: Any, kwargs: Any) -> bool:
        self._wait(args[0])
        first, second = (self._known(tensor) for tensor in args[:2])
        with _disable_current_modes():
            return bool(func(first, second, *args[2:], **kwargs))

    def _known(self, tensor: Tensor) -> Tensor:
        value = self.value_of(tensor)
        if value is None:
            raise NotImplementedError(f"values that the simulation does not have are read at {place()}")
        return value

    def _without_masks(self, args: Any) -> Any:
        """The arguments of an indexing operation with the places of a mask instead of the mask."""
        indices: list[Any] = []
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                with _disable_current_modes():
                    columns = self._known(index).nonzero().unbind(1)
                self._wait(index)
                indices += [self._give(column, index.device) for column in columns]
            else:
                indices.append(index)
        return (args[0], indices, *args[2:])

    def _wait(self, tensor: Tensor) -> None:
        if tensor.device == self.device:
            self.waits[place()] += 1

    def _note_copy(self, func: Any, args: Any, out: Any) -> None:
        """Count a copy from the device to the host that the host waits for."""
        if func is aten._to_copy.default and args[0].device == self.device != out.device:
            self.waits[place()] += 1
        elif func is aten.copy_.default and args[1].device == self.device != args[0].device:
            self.waits[place()] += 1


@cache
def _register_kernels() -> torch.library.Library:
    """Operators that are a kernel on CUDA, and that torch would take apart on another device."""
    library = torch.library.Library("aten", "IMPL")
    for name in ("_fused_rms_norm", "_fused_rms_norm_backward", "silu_backward"):
        library.impl(name, _computed, "PrivateUse1")
    return library


def _computed(*args: Any) -> None:
    raise NotImplementedError("a tensor of the simulated device is used outside its context")


def place() -> str:
    """file:line of the innermost line of the project that is running."""
    for frame in reversed(traceback.extract_stack(sys._getframe(1))):
        path = frame.filename
        if path.startswith(str(ROOT)) and "/simulated/" not in path and "/.venv/" not in path:
            return f"{path[len(str(ROOT)) + 1 :]}:{frame.lineno}"
    return "outside the project"


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
