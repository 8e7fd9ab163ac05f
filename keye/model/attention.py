"""One varlen attention call for the whole model: packed segments in, packed segments out.

`varlen` is the only attention the vision tower and packed training use. Transformers' decoders reach it under the
attention name "keye" (see `decoder_attention`); for padded batches and cached generation the same name falls back to
transformers' own sdpa.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]
"""(q [L, H, D], k [L, Hkv, D], v [L, Hkv, D], cu_seqlens [S + 1], causal) → [L, H, D]."""


def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    """Attention inside each segment of a packed sequence; segments never see one another.

    Args:
        q: `[L, H, D]` queries.
        k, v: `[L, Hkv, D]` keys and values, Hkv divides H (grouped-query attention).
        cu_seqlens: `[S + 1]` integer boundaries, from 0 to L.
        causal: whether a token sees only itself and earlier tokens of its segment.

    Returns:
        `[L, H, D]` in q's dtype.
    """
    gqa = q.shape[1] != k.shape[1]
    outputs = []
    for start, count, length in equal_runs(cu_seqlens):
        stop = start + count * length
        q_, k_, v_ = (x[start:stop].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q_, k_, v_, is_causal=causal, enable_gqa=gqa)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) != 1 else outputs[0]


def equal_runs(cu_seqlens: Tensor) -> list[tuple[int, int, int]]:
    """Consecutive segments of one length as (start, count, length): each run is one batched sdpa call, no copy."""
    runs: list[tuple[int, int, int]] = []
    bounds = cu_seqlens.tolist()
    for start, stop in zip(bounds, bounds[1:], strict=False):
        length = stop - start
        if length == 0:
            continue
        if runs and runs[-1][2] == length:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, length)
        else:
            runs.append((start, 1, length))
    return runs


def decoder_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    varlen_fn: Varlen | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention interface (`[B, H, L, D]`): packed when `cu_seqlens` is given, otherwise sdpa."""
    if cu_seqlens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return (varlen_fn or varlen)(q, k, v, cu_seqlens, True).unsqueeze(0), None


AttentionInterface.register("keye", decoder_attention)
AttentionMaskInterface.register("keye", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
