"""Heads over features: the language head with its loss, and SigLIP's pooling head of stage 0."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keye.model.config import KeyeVisionConfig
from keye.model.vision import VisionMLP

LOSS_CHUNK = 4096  # rows of fp32 logits in memory at a time
SCORE_CHUNK = 1024  # the same for `RowScores`, which keep several tables of that size

RowScores = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""(logits `[R, vocab]`, targets `[R]`) → tensors `[R, …]` that depend on the same row only."""


class Readout(nn.Module):
    """The language head over hidden states: logits, the summed loss of any number of labels, or scores of each row.

    It has no parameters of its own. It is called once per forward pass, for any number of labels, so that a trainer
    that partitions the head's weight gathers it once for all chunks of the loss.
    """

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, *, head: nn.Module, scores: RowScores | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """hidden `[…, width]` → logits `[…, vocab]`; with targets `[N]` of `[N, width]` their summed loss, in fp32.

        scores: applied to the logits of a chunk of rows at a time, which are computed again in the backward pass; its
            results for all N rows are returned instead of the loss.
        """
        if targets is None:
            return head(hidden)
        if scores is not None:
            chunks = zip(hidden.split(SCORE_CHUNK), targets.split(SCORE_CHUNK), strict=True)
            parts = [checkpoint(_chunk_scores, head, scores, *chunk, use_reentrant=False) for chunk in chunks]
            return tuple(torch.cat(column) for column in zip(*parts, strict=True))
        total = torch.zeros((), device=hidden.device)
        for rows, part in zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            total = total + checkpoint(_chunk_loss, head, rows, part, use_reentrant=False)
        return total


def _chunk_loss(head: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(rows).float(), targets, reduction="sum")


def _chunk_scores(head: nn.Module, scores: RowScores, rows: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return scores(head(rows), targets)


class PoolingHead(nn.Module):
    """SigLIP's pooling head: one learned query attends over all patches of an image or video, then a residual MLP.

    Only the contrastive stage uses it. SigLIP keeps the projections of q, k and v in one `attention.in_proj`.
    """

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.probe = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, width)))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, features: Tensor, owner: Tensor, count: int) -> Tensor:
        """features `[N, width]`, owner `[N]` (index of each patch's image or video), their count → `[count, width]`.

        Softmax and sums over patches are fp32: a bf16 running sum stops growing at 256 terms of one size.
        """
        query = self.q_proj(self.probe[0]).unflatten(-1, (self.heads, -1))
        keys, values = (project(features).unflatten(-1, (self.heads, -1)) for project in (self.k_proj, self.v_proj))
        scores = (keys.float() * query.float()).sum(-1) * query.shape[-1] ** -0.5
        index = owner[:, None].expand_as(scores)
        top = scores.new_full((count, self.heads), -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
        weights = (scores - top[owner]).exp()
        total = weights.new_zeros(count, self.heads).index_add(0, owner, weights)
        pooled = weights.new_zeros(count, *query.shape[1:]).index_add(0, owner, values.float() * weights[..., None])
        x = self.out_proj((pooled / total[..., None]).flatten(1).to(features.dtype))
        return x + self.mlp(self.layernorm(x))
