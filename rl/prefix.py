"""The completions of a group share their prompt, which is read once, with gradient, for any size of the group.

A video prompt is long and its answers are short, so packing G copies of "prompt + completion" would compute the same
prompt G times. `PrefixTree` arranges a mini-batch as

    prompt 1 · completion 1,1 · … · completion 1,G · prompt 2 · completion 2,1 · …

in which a completion attends to its prompt and to itself, never to other completions. Only attention mixes tokens, so
with `PrefixTree.attention` as the model's `varlen` function the pass is exact: the log-probabilities and gradients are
those of G separate sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


@dataclass
class PrefixTree:
    """The layout of P prompts and their completions in one packed row of L tokens.

    Args:
        prompt_lengths: P positive lengths. completion_lengths: for each prompt the positive lengths of its completions.
    """

    prompt_lengths: list[int]
    completion_lengths: list[list[int]]
    _starts: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.prompt_lengths) < 1 or min(min(lengths) for lengths in self.completion_lengths) < 1:
            raise ValueError("a PrefixTree needs prompts and completions of at least one token")
        self._starts = [0]
        for prompt, completions in zip(self.prompt_lengths, self.completion_lengths, strict=True):
            self._starts.append(self._starts[-1] + prompt + sum(completions))

    @property
    def length(self) -> int:
        """L, tokens in the row."""
        return self._starts[-1]

    def cu_seqlens(self) -> Tensor:
        """int32 [P + 1]: where each prompt with its completions begins, and the end."""
        return torch.tensor(self._starts, dtype=torch.int32)

    def pack(self, prompts: list[Tensor], completions: list[list[Tensor]]) -> Tensor:
        """Concatenate P prompts [.., Lp] and their completions [.., Lc] along the last dimension → [.., L]."""
        rows = (row for prompt, group in zip(prompts, completions, strict=True) for row in (prompt, *group))
        return torch.cat(list(rows), dim=-1)

    def predictors(self) -> Tensor:
        """int64 [T]: for every completion token the index of the token that predicts it.

        A completion's first token is predicted by the last token of the prompt, which the group shares.
        """
        places = []
        for start, prompt, lengths in zip(self._starts, self.prompt_lengths, self.completion_lengths, strict=False):
            last, begin = start + prompt - 1, start + prompt
            for length in lengths:
                places += [last, *range(begin, begin + length - 1)]
                begin += length
        return torch.tensor(places, dtype=torch.long)

    def owner(self) -> Tensor:
        """int64 [T]: the sequence, counted over all prompts, that each completion token belongs to."""
        lengths = torch.tensor([length for group in self.completion_lengths for length in group])
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
        """The model's `varlen` function: q [L, H, D], k and v [L, Hkv, D] → [L, H, D].

        Raises:
            ValueError: q and cu_seqlens are not of this layout.
        """
        if not causal or cu_seqlens.numel() != len(self._starts) or q.shape[0] != self.length:
            raise ValueError(f"PrefixTree of {self.length} tokens was given {q.shape[0]} tokens, causal={causal}")
        outputs = []
        for start, prompt, lengths in zip(self._starts, self.prompt_lengths, self.completion_lengths, strict=False):
            trunk, leaves = slice(start, start + prompt), slice(start + prompt, start + prompt + sum(lengths))
            outputs.append(_attend(q[trunk][None], k[trunk][None], v[trunk][None])[0])
            outputs.append(_leaves(q[leaves], k[leaves], v[leaves], k[trunk], v[trunk], lengths))
        return torch.cat(outputs)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, Lq, H, D] against [B, Lk, Hkv, D]; causal, with the last query aligned to the last key."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
    mask = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)


def _leaves(q: Tensor, k: Tensor, v: Tensor, trunk_k: Tensor, trunk_v: Tensor, lengths: list[int]) -> Tensor:
    """Attention of one prompt's completions, flat [sum(lengths), …], to their prompt [Lp, Hkv, D] and themselves.

    The completions become a batch [G, longest], padded at the end, where causality hides padding from real tokens.
    """
    group, longest = len(lengths), max(lengths)
    sizes = torch.tensor(lengths, device=q.device)
    real = torch.arange(longest, device=q.device) < sizes[:, None]
    place = (real.flatten().cumsum(0) - 1).clamp_min(0).view(group, longest)
    keys = torch.cat([trunk_k.expand(group, *trunk_k.shape), k[place]], dim=1)
    values = torch.cat([trunk_v.expand(group, *trunk_v.shape), v[place]], dim=1)
    return _attend(q[place], keys, values)[real]
