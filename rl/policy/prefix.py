"""The completions of a group share their prompt, which is read once, with gradient, for any size of the group.

A video prompt is long and its answers are short, so packing G copies of "prompt + completion" would compute the same
prompt G times. `PrefixTree` arranges a mini-batch as

    prompt 1 · completion 1,1 · … · completion 1,G · prompt 2 · completion 2,1 · …

in which a completion attends to its prompt and to itself, never to other completions. Only attention mixes tokens, so
with `PrefixTree.attention` as the model's `varlen` function the pass is exact: the log-probabilities and gradients are
those of G separate sequences. The keys and values of a prompt are stored once (see `rl.policy.shared_attention`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, chain

import torch
from torch import Tensor

from keye.model.attention import varlen
from rl.policy.shared_attention import Layout, shared_attention


@dataclass
class PrefixTree:
    """The layout of P prompts and their completions in one packed row of L tokens.

    Args:
        prompt_lengths: P positive lengths. completion_lengths: for each prompt the positive lengths of its completions.
    """

    prompt_lengths: list[int]
    completion_lengths: list[list[int]]
    _starts: list[int] = field(init=False, repr=False)
    _sizes: list[int] = field(init=False, repr=False)  # of prompt 1, its completions together, prompt 2, …
    _layout: Layout = field(init=False, repr=False)
    _prompts: Tensor = field(init=False, repr=False)  # the boundaries of `_layout.prompts`, one tensor for all layers

    def __post_init__(self) -> None:
        if min(self.prompt_lengths) < 1 or min(min(lengths) for lengths in self.completion_lengths) < 1:
            raise ValueError("a PrefixTree needs prompts and completions of at least one token")
        totals = [sum(lengths) for lengths in self.completion_lengths]
        pairs = list(zip(self.prompt_lengths, totals, strict=True))
        self._sizes = list(chain.from_iterable(pairs))
        self._starts = [0, *accumulate(map(sum, pairs))]
        completions = chain.from_iterable(self.completion_lengths)
        self._layout = Layout(_bounds(totals), _bounds(self.prompt_lengths), _bounds(completions))
        self._prompts = torch.tensor(self._layout.prompts, dtype=torch.int32)

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
        sizes = self._sizes
        trunks, leaves = zip(*(_two(x.split(sizes)) for x in (q, k, v)), strict=True)
        of_trunks = varlen(*trunks, self._prompts, True)
        of_leaves = shared_attention(leaves[0], trunks[1], trunks[2], leaves[1], leaves[2], self._layout)
        rows = zip(of_trunks.split(sizes[::2]), of_leaves.split(sizes[1::2]), strict=True)
        return torch.cat([part for pair in rows for part in pair])


def _two(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The prompts' rows and the completions' rows of a list that alternates them; a single one is not copied."""
    both = parts[::2], parts[1::2]
    return tuple(rows[0] if len(rows) == 1 else torch.cat(rows) for rows in both)


def _bounds(lengths: Iterable[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))
