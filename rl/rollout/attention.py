"""Attention of one new token per completion to [keys of its prompt, shared by the group] + [keys of the completion].

The rows of a group are folded into the query dimension, so that the keys of a prompt are read once per step for the
whole group. Each part gives an unnormalised sum of values with the maximum and the sum of its exponentials; merging two
parts is exact, up to the rounding of a softmax over all keys at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedPrompt:
    """One layer's keys and values [Hkv, L, D] of a prompt, and the rows int64 [g] of the batch that continue it."""

    rows: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Part:
    """Softmax attention over some of the keys: total [.., N, D], peak and weight [.., N, 1], all float32.

    The attention over these keys is total / weight; peak is the largest score, which was subtracted.
    """

    total: Tensor
    peak: Tensor
    weight: Tensor


def shared_attention(q: Tensor, keys: Tensor, values: Tensor, padding: Tensor, prompts: list[SharedPrompt]) -> Tensor:
    """One query for each of R rows.

    Args:
        q: [R, H, D]. keys, values: [R, Hkv, T, D], of the completions, with the current token.
        padding: bool [R, T], True behind the end of a row. prompts: together they have each row once.

    Returns:
        [R, H, D] in q's dtype, scaled by D ** -0.5.
    """
    folded = q.unflatten(1, (keys.shape[1], -1))  # [R, Hkv, H / Hkv, D]
    own = _part(folded, keys, values, padding[:, None, None])
    read = [_prompt_part(folded, prompt) for prompt in prompts]
    back = torch.cat([prompt.rows for prompt in prompts]).argsort()
    columns = zip(*((part.total, part.peak, part.weight) for part in read), strict=True)
    shared = Part(*(torch.cat(column)[back] for column in columns))
    return _merged(own, shared).flatten(1, 2).to(q.dtype)


def _prompt_part(folded: Tensor, prompt: SharedPrompt) -> Part:
    """Attention of a prompt's rows [R, Hkv, n, D] to the prompt, with g · n queries for each key head."""
    q = folded[prompt.rows]
    part = _part(q.transpose(0, 1).flatten(1, 2)[None], prompt.keys[None], prompt.values[None])

    def rows(x: Tensor) -> Tensor:  # [1, Hkv, g · n, ·] → [g, Hkv, n, ·]
        return x[0].unflatten(1, (len(q), -1)).transpose(0, 1)

    return Part(rows(part.total), rows(part.peak), rows(part.weight))


def _part(q: Tensor, keys: Tensor, values: Tensor, padding: Tensor | None = None) -> Part:
    """Queries [B, Hkv, N, D] against keys and values [B, Hkv, T, D]; padding: bool, broadcast to [B, Hkv, N, T]."""
    scores = _product(q, keys.transpose(2, 3)) * q.shape[-1] ** -0.5
    if padding is not None:
        scores = scores.masked_fill_(padding, float("-inf"))
    peak = scores.amax(-1, keepdim=True)
    weights = scores.sub_(peak).exp_()
    return Part(_product(weights.to(values.dtype), values), peak, weights.sum(-1, keepdim=True))


def _merged(one: Part, other: Part) -> Tensor:
    peak = torch.maximum(one.peak, other.peak)
    first, second = (one.peak - peak).exp(), (other.peak - peak).exp()
    return (one.total * first + other.total * second) / (one.weight * first + other.weight * second)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched product [B, H, N, K] · [B, H, K, M], float32 for any dtype: bf16 scores would differ by 1 %."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda":  # accumulates and returns float32 without float32 copies of the keys
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    return a.float() @ b.float()
