"""One varlen attention call for the whole model: packed segments in, packed segments out.

`varlen` is the only attention the vision tower and packed training use. Transformers' decoders reach it under the
attention name "keye" (see `decoder_attention`); for padded batches and cached generation the same name falls back to
transformers' own sdpa.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import groupby

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
    order, runs = segment_runs(tuple(cu_seqlens.tolist()))
    if order is not None:
        order = order.to(q.device)
        q, k, v = q[order], k[order], v[order]
    # split, not slices: the gradient of a slice is a full-size tensor of zeros, one for every segment.
    sizes = [count * length for count, length in runs]
    outputs = []
    for (count, length), *parts in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        q_, k_, v_ = (x.unflatten(0, (count, length)).transpose(1, 2) for x in parts)
        out = F.scaled_dot_product_attention(q_, k_, v_, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    packed = torch.cat(outputs) if len(outputs) != 1 else outputs[0]
    return packed if order is None else torch.empty_like(packed).index_copy(0, order, packed)


@lru_cache(maxsize=64)
def segment_runs(bounds: tuple[int, ...]) -> tuple[Tensor | None, list[tuple[int, int]]]:
    """Segments gathered by length, so that each length is one batched call.

    Returns the token order that brings equal segments together (None when they already are) and the (count, length) of
    each run.
    """
    segments = [(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False) if stop > start]
    by_length = sorted(segments, key=lambda s: s[1] - s[0])
    lengths = [stop - start for start, stop in by_length]
    runs = [(len(list(group)), length) for length, group in groupby(lengths)]
    if by_length == segments:
        return None, runs
    return torch.cat([torch.arange(start, stop) for start, stop in by_length]), runs


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
