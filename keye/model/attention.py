"""One varlen attention for the complete model: packed segments in, packed segments out.

`varlen` is the only attention of the vision tower and of packed training. Its kernel is chosen once for a device, dtype
and head size (`keye.model.backends`), or named by `KeyeConfig.attention`. Decoders of transformers call it under the
attention name "keye" (`decoder_attention`); for padded batches and cached generation the same name means transformers'
sdpa, without its copies of shared key heads.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from keye.errors import KeyeError
from keye.model.backends import BACKENDS, SEGMENTED, available, check_name, choose, fused, run
from keye.model.segments import segments_of

__all__ = ["BACKENDS", "Varlen", "available", "check_name", "choose", "decoder_attention", "varlen"]

Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]
"""(q [L, H, D], k [L, Hkv, D], v [L, Hkv, D], cu_seqlens [S + 1], causal) → [L, H, D]."""


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention inside each segment of a packed sequence; no token attends to another segment.

    Args:
        q: `[L, H, D]` queries.
        k, v: `[L, Hkv, D]` keys and values, Hkv divides H (grouped-query attention; heads are not copied).
        cu_seqlens: `[S + 1]` integer boundaries, from 0 to L, on any device; segments may be empty. Its values are
            read once for all layers, so do not change it in place.
        causal: whether a token attends only to itself and earlier tokens of its segment.
        scale: factor of the scores before the softmax, D ** -0.5 by default.
        backend: "auto" or a name of `BACKENDS`.

    Returns:
        `[L, H, D]` in q's dtype; under autocast in autocast's dtype, like every matrix product.

    Raises:
        KeyeError: a backend that is unknown or cannot run here, or boundaries or heads that do not fit.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise KeyeError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads: the first must be a multiple")
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if torch.compiler.is_compiling():
        return _compiled(q, k, v, cu_seqlens, causal, scale, backend)
    return _eager(q, k, v, cu_seqlens, causal, scale, backend)


def _eager(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float, backend: str) -> Tensor:
    segments = segments_of(cu_seqlens)
    if segments.total != len(q):
        raise KeyeError(f"cu_seqlens bounds {segments.total} tokens, but the packed row has {len(q)}")
    name = choose(backend, q.device, q.dtype, q.shape[-1], q.shape[1] // k.shape[1])
    return run(name, q, k, v, segments, causal, scale) if len(q) else q.clone()


def _compiled(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float, backend: str) -> Tensor:
    """The same inside `torch.compile`, without a graph break and for any boundaries.

    The fused kernels read boundaries on the device and get L as the longest segment, which only enlarges their grid.
    The other backends loop over segments, whose number the compiler does not know, so they are one opaque operator,
    whose backward pass computes the forward pass again.
    """
    name = _constant_choice(backend, q.device, q.dtype, q.shape[-1], q.shape[1] // k.shape[1])
    if name in SEGMENTED:
        return torch.ops.keye.packed_attention(q, k, v, cu_seqlens, causal, scale, backend)
    bounds = cu_seqlens.to(device=q.device, dtype=torch.int32)
    return fused(name, q, k, v, bounds, q.shape[0], causal, scale)


@torch.compiler.assume_constant_result
def _constant_choice(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, groups: int) -> str:
    return choose(backend, device, dtype, head_dim, groups)


@torch.library.custom_op("keye::packed_attention", mutates_args=())
def _packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float, backend: str) -> Tensor:
    out = _eager(q, k, v, cu_seqlens, causal, scale, backend)
    return out.contiguous()


@torch.library.custom_op("keye::packed_attention_backward", mutates_args=())
def _packed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    # Autograd is disabled inside an operator, but `torch.func.vjp` works.
    _, vjp = torch.func.vjp(lambda *x: _eager(*x, cu_seqlens, causal, scale, backend), q, k, v)
    return tuple(x.contiguous().clone() for x in vjp(grad))


@_packed.register_fake
def _packed_shape(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float, backend: str
) -> Tensor:
    return q.new_empty(q.shape)


@_packed_backward.register_fake
def _packed_backward_shape(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.keye.packed_attention_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale, ctx.backend)
    return *grads, None, None, None, None


_packed.register_autograd(_gradients, setup_context=_keep)


def decoder_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    varlen_fn: Varlen | None = None,
    attention: str = "auto",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention interface: query `[B, H, L, D]`, key and value `[B, Hkv, L', D]` → `[B, L, H, D]`.

    Packed when `cu_seqlens` is given: by `varlen` with the backend `attention`, or by `varlen_fn` if a trainer gives
    one (sequence parallelism). Otherwise sdpa, with all options of transformers' own.

    Raises:
        KeyeError: something that packed attention does not support: dropout, a sliding window shorter than a segment, a
            cache, more than one row, or scores that are capped or biased.
    """
    if cu_seqlens is None:
        return _padded(module, query, key, value, attention_mask, **kwargs)
    _check_packed(query, key, cu_seqlens, kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    default = q.shape[-1] ** -0.5
    scale = default if kwargs.get("scaling") is None else kwargs["scaling"]
    if varlen_fn is None:
        out = varlen(q, k, v, cu_seqlens, causal, scale=scale, backend=attention)
    else:  # varlen_fn scales by D ** -0.5; the decoder may use another factor
        out = varlen_fn(q if math.isclose(scale, default) else q * (scale / default), k, v, cu_seqlens, causal)
    return out.unsqueeze(0), None


def _check_packed(query: Tensor, key: Tensor, cu_seqlens: Tensor, kwargs: dict[str, Any]) -> None:
    if len(query) != 1 or key.shape[2] != query.shape[2]:
        raise KeyeError(
            f"packed attention takes one row and no cache, got {len(query)} rows of {query.shape[2]} queries on "
            f"{key.shape[2]} keys: leave cu_seqlens out for padded batches and generation"
        )
    if kwargs.get("dropout"):
        raise KeyeError(
            f"text_config.attention_dropout = {kwargs['dropout']}: packed attention has no dropout; set it to 0"
        )
    window = kwargs.get("sliding_window")
    if window and segments_of(cu_seqlens).longest > window:
        raise KeyeError(
            f"text_config.sliding_window = {window} is shorter than the longest packed document "
            f"({segments_of(cu_seqlens).longest} tokens), and packed attention has no window: set it to null, or give "
            "padded rows instead of cu_seqlens"
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise KeyeError(f"this decoder's attention uses {name!r}, which packed attention does not support")


def _padded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Transformers' sdpa, or the same without copies where it would copy key heads that several queries share."""
    groups = query.shape[1] // key.shape[1]
    unsupported = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    single = query.shape[2] == 1
    if groups == 1 or unsupported or (mask is None and not single) or (mask is not None and mask.shape[1] != 1):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    options = {"attn_mask": mask, "dropout_p": kwargs.get("dropout", 0.0), "scale": kwargs.get("scaling")}
    if single:  # one new token: the heads that share a key become its queries
        out = F.scaled_dot_product_attention(query.unflatten(1, (-1, groups)).squeeze(3), key, value, **options)
        return out.flatten(1, 2)[:, None], None
    if query.device.type != "cpu":  # no fused GPU kernel takes both a mask and groups
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("keye", decoder_attention)
AttentionMaskInterface.register("keye", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def recording(
    weights: list[Tensor], backend: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool
) -> Tensor:
    """`varlen`, which also appends its weights to the list; they are computed separately, as no kernel returns them."""
    weights.append(attention_weights(q, k, cu_seqlens))
    return varlen(q, k, v, cu_seqlens, causal, backend=backend)


def attention_weights(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Tensor:
    """q, k `[N, heads, D]`, segments of `cu_seqlens` → weights `[heads, N, N]` float32, 0 between segments."""
    segment = torch.bucketize(torch.arange(len(q), device=q.device), cu_seqlens[1:].to(q.device), right=True)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    return scores.masked_fill(segment[:, None] != segment[None], -torch.inf).softmax(dim=-1)
