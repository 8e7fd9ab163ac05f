"""The choice of the next token: softmax at a temperature, optionally cut by top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from rl.policy.scoring import token_log_probs

CHUNK = 64  # rows of float64 cumulative probabilities [CHUNK, vocab] that are in memory at the same time


@dataclass(frozen=True)
class Drawn:
    """The next token of each of R rows."""

    tokens: Tensor
    """int64 [R]."""

    log_probs: Tensor
    """float32 [R], of softmax(logits / temperature) over all tokens, as in training; at temperature 1 if greedy."""

    sampler_log_probs: Tensor
    """float32 [R], of the distribution that was sampled from: cut by top-k and top-p, and normalised again."""


@dataclass(frozen=True)
class TokenSampler:
    """Draws tokens.

    top_p: only the most likely tokens that sum up to this probability. top_k: only this number of the most likely
    tokens; 0 is all. banned: ids that are never drawn.
    """

    top_p: float = 1.0
    top_k: int = 0
    banned: tuple[int, ...] = ()

    @property
    def cuts(self) -> bool:
        """Whether the distribution that is sampled from differs from the one that is trained."""
        return self.top_p < 1 or self.top_k > 0

    def __call__(self, logits: Tensor, temperature: float, uniform: Tensor) -> Drawn:
        """logits [R, V] in any dtype; uniform: float64 [R] in [0, 1), one random number for each row."""
        parts = [
            self._draw(rows, temperature, numbers)
            for rows, numbers in zip(logits.split(CHUNK), uniform.split(CHUNK), strict=True)
        ]
        return Drawn(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _draw(self, logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table = token_log_probs(logits, temperature or 1.0, self.banned)
        if temperature == 0:
            tokens = table.argmax(-1)
            chosen = table.gather(-1, tokens[:, None])[:, 0]
            return tokens, chosen, chosen
        cut = self._cut(table) if self.cuts else table
        tokens = _inverse_cdf(cut, uniform)
        chosen = [x.gather(-1, tokens[:, None])[:, 0] for x in (table, cut)]
        return tokens, *chosen

    def _cut(self, table: Tensor) -> Tensor:
        """Log-probabilities [R, V] after top-k and then top-p, in the order and with the ties of `generate`."""
        warpers = LogitsProcessorList()
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers(None, table).log_softmax(-1)


def _inverse_cdf(table: Tensor, uniform: Tensor) -> Tensor:
    """The token [R] at which the cumulative probability of log-probabilities [R, V] exceeds a number in [0, 1).

    One number per token: rounding errors of 1e-7 in the logits change a token in one of about 1e6 draws only.
    """
    cumulative = table.double().exp().cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    tokens = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total)  # the last token with a probability, where rounding reached the total
    # Of logits that are not numbers both are V, and an index of V would end a process with a GPU without a sentence.
    return torch.minimum(tokens, last)[:, 0].clamp_max(table.shape[-1] - 1)
