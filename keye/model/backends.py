"""The kernels of packed attention: which of them this machine can run, which one is chosen, and how each is called.

Seven kernels, best first: flash-attn 4, 3 and 2 (optional packages), `torch.nn.attention.varlen` (torch ≥ 2.10, CUDA),
sdpa (any device), cudnn (sdpa with cuDNN's kernel, which "auto" does not choose: for which packs it is faster has not
been measured), and plain, which computes the full score matrix and is the reference of the others. That a kernel can be
imported is not enough: a GPU kernel is chosen only after a forward and a backward pass over a small pack.
"""

import inspect
import math
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from importlib import import_module

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from keye.errors import KeyeError
from keye.model.segments import Segments

BACKENDS = ("flash4", "flash3", "flash2", "torch", "sdpa", "cudnn", "plain")
SEGMENTED = ("sdpa", "cudnn", "plain")  # compute one run of equal segments at a time

# Module, function, and the major CUDA capabilities that the kernel supports.
_PACKAGES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "flash4": ("flash_attn.cute", "flash_attn_varlen_func", (9, 10, 11, 12)),
    "flash3": ("flash_attn_interface", "flash_attn_varlen_func", (9,)),
    "flash2": ("flash_attn", "flash_attn_varlen_func", (8, 9, 10, 11, 12)),
    "torch": ("torch.nn.attention.varlen", "varlen_attn", (8, 9, 10, 11, 12)),
    "cudnn": ("torch", "", (8, 9, 10, 11, 12)),
}
_HALF = (torch.bfloat16, torch.float16)
# The cost of one more sdpa call, in bytes of memory traffic that take as long: measured on one core (21 to 40 µs at
# 3 GB/s); on a GPU a launch takes as long, but memory is a thousand times faster.
_CALL_BYTES = {"cpu": 96 * 1024}
_LAUNCH_BYTES = 32 * 1024**2
_TRIAL_LENGTHS = (1, 70, 5, 200)
_functions: dict[str, Callable[..., object]] = {}


def check_name(name: str) -> str:
    """Return `name` if it is "auto" or a backend.

    Raises:
        KeyeError: another name.
    """
    if name != "auto" and name not in BACKENDS:
        raise KeyeError(
            f"attention = {name!r} is not a backend of Keye: use 'auto' or one of those that can run here, "
            f"{', '.join(available())}"
        )
    return name


def available(device: torch.device | str | None = None) -> list[str]:
    """The backends that can run on `device` (the GPU where there is one, otherwise the CPU), best first."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return [name for name in _ordered(device) if not obstacle(name, device)]


@lru_cache(maxsize=64)
def choose(
    name: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 128,
    groups: int = 1,
) -> str:
    """The backend that computes packed attention of this kind here; reported once on stderr, with the reason.

    Args:
        name: "auto", or the name of a backend.
        device: where the tensors are.
        dtype: of q, k and v.
        head_dim: size of a head.
        groups: query heads per key head.

    Returns:
        A name of `BACKENDS`. A backend that runs here, but not with this dtype or head size, is replaced by "sdpa".

    Raises:
        KeyeError: the backend is unknown, or cannot run on this device.
    """
    device = torch.device(device)
    check_name(name)
    if name != "auto" and (reason := obstacle(name, device)):
        raise KeyeError(
            f"attention = {name!r} cannot run on {device.type} ({reason}): use 'auto' or one of "
            f"{', '.join(available(device))}"
        )
    rejected: dict[str, str] = {}
    for candidate in _ordered(device) if name == "auto" else (name, "sdpa"):
        reason = obstacle(candidate, device) or _unfit(candidate, dtype, head_dim)
        if not reason and candidate in _PACKAGES:
            reason = _trial(candidate, device, dtype, head_dim, groups)
        if not reason:
            break
        rejected[candidate] = reason
    _report_once(f"attention: {candidate} on {device.type}{_reasons(rejected) if rejected or name == 'auto' else ''}")
    return candidate


def obstacle(name: str, device: torch.device) -> str:
    """Why a backend cannot run on `device`; empty if it can."""
    if name not in _PACKAGES:
        return ""
    module, function, majors = _PACKAGES[name]
    if name not in _functions and name != "cudnn":  # a part of torch
        try:
            _functions[name] = getattr(import_module(module), function)
        except ModuleNotFoundError as error:
            return "not installed" if module.startswith(str(error.name)) else f"needs the package {error.name}"
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            return f"installed, but does not import: {_first_line(error)}"
    if device.type != "cuda":
        return "needs CUDA"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability[0] in majors else f"not built for compute capability {capability[0]}.{capability[1]}"


def run(name: str, q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float) -> Tensor:
    """`name`'s packed attention: q `[L, H, D]`, k and v `[L, Hkv, D]` → `[L, H, D]`; shapes are not checked."""
    if name == "sdpa":
        return sdpa(q, k, v, segments, causal, scale)
    if name == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # it fails where cuDNN cannot, and does not use another kernel
            return sdpa(q, k, v, segments, causal, scale)
    if name == "plain":
        return plain(q, k, v, segments, causal, scale)
    return fused(name, q, k, v, segments.bounds_on(q.device), segments.longest, causal, scale)


def fused(
    name: str, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, causal: bool, scale: float
) -> Tensor:
    """A varlen kernel of a package or of torch; `bounds` int32 `[S + 1]` on the device, `longest` at least the longest
    segment.
    """
    known = _keywords(name)
    if name == "torch":
        options: dict[str, object] = {}
        if "scale" in known:
            options["scale"] = scale
        elif not math.isclose(scale * math.sqrt(q.shape[-1]), 1):
            q = q * (scale * math.sqrt(q.shape[-1]))
        # torch 2.10 has a switch; later versions read causality from the window.
        if "is_causal" in known:
            options["is_causal"] = causal
        else:
            options["window_size"] = (-1, 0) if causal else (-1, -1)
        if "enable_gqa" in known:  # 2.10 and 2.11 take fewer key heads without it
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        return _functions[name](q, k, v, bounds, bounds, longest, longest, **options)
    options = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "softmax_scale": scale, "causal": causal}
    if "max_seqlen_q" in known:  # not in the first releases of flash-attn 4
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    out = _functions[name](q, k, v, **options)
    return out[0] if isinstance(out, tuple) else out  # some releases add the log-sum-exp


def sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float) -> Tensor:
    """One `scaled_dot_product_attention` for each run of equal segments.

    Segments of one length that are not neighbours are gathered only where the saved calls outweigh moving the tokens:
    on a CPU that holds for many short segments only.
    """
    token_bytes = 2 * (q.shape[1] + k.shape[1]) * q.shape[2] * q.element_size()
    order, runs = segments.runs(token_bytes, _CALL_BYTES.get(q.device.type, _LAUNCH_BYTES), q.device)
    if order is not None:
        q, k, v = q[order], k[order], v[order]
    # split, not slices: the gradient of a slice is a full-size tensor of zeros, one for every segment.
    sizes = [count * length for count, length in runs]
    outputs = []
    for (count, length), *parts in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        q_, k_, v_ = (x.unflatten(0, (count, length)).transpose(1, 2) for x in parts)
        outputs.append(_grouped(q_, k_, v_, causal, scale).transpose(1, 2).flatten(0, 1))
    packed = torch.cat(outputs) if len(outputs) != 1 else outputs[0]
    return packed if order is None else torch.empty_like(packed).index_copy(0, order, packed)


def _grouped(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """q `[n, H, l, D]`, k and v `[n, Hkv, l, D]`, without copies of k and v for the heads that share them."""
    groups = q.shape[1] // k.shape[1]
    if groups == 1 or q.device.type == "cpu" or q.dtype in _HALF:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=groups != 1)
    # In fp32 the GPU's memory-efficient kernel has no groups, and sdpa would copy the heads and store all scores.
    members = q.unflatten(1, (-1, groups)).unbind(2)
    parts = [F.scaled_dot_product_attention(x, k, v, is_causal=causal, scale=scale) for x in members]
    return torch.stack(parts, dim=2).flatten(1, 2)


def plain(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float) -> Tensor:
    """All scores `[Hkv, H / Hkv, L, L]` with a block mask, at least in fp32: memory grows with the square of L."""
    wide = torch.promote_types(q.dtype, torch.float32)
    segment = torch.repeat_interleave(
        torch.arange(len(segments.lengths)), torch.tensor(segments.lengths), output_size=len(q)
    ).to(q.device)
    allowed = segment[:, None] == segment
    if causal:
        allowed = allowed.tril()
    grouped = q.to(wide).unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("lkgd,mkd->kglm", grouped, k.to(wide)) * scale
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return torch.einsum("kglm,mkd->lkgd", weights, v.to(wide)).flatten(1, 2).to(q.dtype)


def _ordered(device: torch.device) -> tuple[str, ...]:
    """The backends, best first: flash-attn 3 is written for Hopper, 4 mainly for later GPUs."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return ("flash3", "flash4", *BACKENDS[2:]) if hopper else BACKENDS


def _unfit(name: str, dtype: torch.dtype, head_dim: int) -> str:
    """Why a backend does not support this dtype or head size; empty if it does."""
    if name not in _PACKAGES:
        return ""
    if dtype not in _HALF:
        return f"supports bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return "" if head_dim % 8 == 0 and head_dim <= 256 else f"does not support heads of {head_dim}"


def _trial(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, groups: int) -> str:
    """Why a GPU kernel fails on a small pack, forward and backward, compared with `plain`; empty if it agrees."""
    outcome: list[str] = []

    def attempt() -> None:
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                outcome.append(_worst(name, device, dtype, head_dim, groups))
        except Exception as error:  # whatever the kernel raises, the next one is tried
            outcome.append(f"fails on a small pack: {_first_line(error)}")

    # Grad mode, autocast, the hooks of activation checkpointing and the current GPU belong to a thread: a new one has
    # the defaults.
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return outcome[0]


def _worst(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, groups: int) -> str:
    """Run the trial; a message if an output or a gradient differs from `plain` by more than rounding."""
    generator = torch.Generator().manual_seed(0)
    segments = Segments.of_lengths(_TRIAL_LENGTHS)
    shape = (sum(_TRIAL_LENGTHS), 2, head_dim)
    q = torch.randn(shape[0], 2 * groups, head_dim, generator=generator).to(device, dtype).requires_grad_()
    k, v = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(2))
    weight = torch.randn(q.shape, generator=generator).to(device, dtype)
    for causal in (False, True):
        results = []
        for backend in (name, "plain"):
            out = run(backend, q, k, v, segments, causal, head_dim**-0.5)
            results.append((out, *torch.autograd.grad(out, (q, k, v), weight)))
        for what, got, expected in zip(("output", "dq", "dk", "dv"), *results, strict=True):
            got, expected = got.detach().float(), expected.detach().float()
            error = float((got - expected).norm() / expected.norm())
            # The relative error of a few roundings to dtype; a wrong mask or scale gives a tenth or more.
            if not error < 4 * torch.finfo(dtype).eps:
                return f"wrong on a small pack: {what} off by {error:.1%}"
    return ""


@torch.compiler.assume_constant_result
def _keywords(name: str) -> tuple[str, ...]:
    """The parameters of a kernel in the installed release."""
    return _signature(_functions[name])


@lru_cache(maxsize=8)
def _signature(function: Callable[..., object]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _reasons(rejected: dict[str, str]) -> str:
    """The reasons as text; one entry for the three flash-attns if they have the same reason."""
    flash = {rejected.get(name) for name in BACKENDS[:3]}
    if len(flash) == 1 and None not in flash:
        rest = {name: why for name, why in rejected.items() if name not in BACKENDS[:3]}
        rejected = {"flash-attn": flash.pop(), **rest}
    names = {"torch": "torch varlen", "flash4": "flash-attn 4", "flash3": "flash-attn 3", "flash2": "flash-attn 2"}
    return f" ({'; '.join(f'{names.get(name, name)}: {why}' for name, why in rejected.items())})" * bool(rejected)


@lru_cache(maxsize=256)
def _report_once(message: str) -> None:
    """Print a message once per process, and in a distributed run on rank 0 only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(message, file=sys.stderr)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0][:120]}"
