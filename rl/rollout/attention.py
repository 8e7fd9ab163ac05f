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
class Members:
    """The rows of the batch that continue the P prompts of a block, up to g for each.

    index: int64 [P, g]. real: two int64 [rows], the places in `index` of the rows that exist, where prompts have fewer
    than g; a mask would make the host wait for its count in every layer. padding: bool [P, L], True behind the end of a
    prompt, or None if they are equally long.
    """

    index: Tensor
    real: tuple[Tensor, ...]
    padding: Tensor | None


@dataclass(frozen=True)
class SharedPrompts:
    """One layer's keys and values [P, Hkv, L, D] of a block of prompts."""

    members: Members
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


def shared_attention(q: Tensor, keys: Tensor, values: Tensor, padding: Tensor, blocks: list[SharedPrompts]) -> Tensor:
    """One query for each of R rows.

    Args:
        q: [R, H, D]. keys, values: [R, Hkv, T, D], of the completions, with the current token.
        padding: bool [R, T], True behind the end of a row. blocks: together they have each row once.

    Returns:
        [R, H, D] in q's dtype, scaled by D ** -0.5.
    """
    folded = q.unflatten(1, (keys.shape[1], -1))  # [R, Hkv, H / Hkv, D]
    own = _part(folded, keys, values, padding[:, None, None])
    read = [_prompt_part(folded, block) for block in blocks]
    back = torch.cat([block.members.index[block.members.real] for block in blocks]).argsort()
    columns = zip(*((part.total, part.peak, part.weight) for part in read), strict=True)
    shared = Part(*(torch.cat(column)[back] for column in columns))
    return _merged(own, shared).flatten(1, 2).to(q.dtype)


def _prompt_part(folded: Tensor, block: SharedPrompts) -> Part:
    """Attention of the rows of a block's prompts, [rows, Hkv, n, D] in the order of `Members`, to these prompts."""
    members = block.members
    queries = folded[members.index].transpose(1, 2)  # [P, Hkv, g, n, D]
    padding = None if members.padding is None else members.padding[:, None, None]
    part = _part(queries.flatten(2, 3), block.keys, block.values, padding)

    def rows(x: Tensor) -> Tensor:  # [P, Hkv, g · n, ·] → [rows, Hkv, n, ·]
        return x.unflatten(2, queries.shape[2:4]).transpose(1, 2)[members.real]

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
