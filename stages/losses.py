"""Losses that need every rank. The language-model loss lives in the model; its normaliser in `trainer`."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages.distributed.collectives import all_gather

LOGITS = 1 << 22  # pairs whose logits are in memory: 16 MB of fp32, and the same for their gradient


def siglip_loss(
    vision: Tensor, text: Tensor, captions: Tensor, scale: Tensor, bias: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343) of this rank's visuals against the captions of all ranks.

    The vectors of all captions are gathered, which is small. The logits of all pairs would be 4 GB of fp32 at 32,768
    pairs: they are computed for at most `LOGITS` pairs at a time, and again in the backward pass.

    Args:
        vision, text: `[B, D]` unit vectors of this rank's pairs; B is the same on every rank.
        captions: `[B, T]` token ids; equal captions are positives of one another, as a small world repeats them.
        scale: `[1]` log temperature. bias: `[1]`.

    Returns:
        This rank's part of the mean over all visuals: the sum over ranks is the loss of the joined batch.
    """
    texts = all_gather(text.float(), group).flatten(0, 1)
    # Each different caption gets a number, so that pairs are compared by number instead of token by token.
    _, keys = torch.unique(all_gather(captions, group).flatten(0, 1), dim=0, return_inverse=True)
    rank = dist.get_rank(group) if len(keys) > len(captions) else 0
    own = keys[rank * len(captions) : (rank + 1) * len(captions)]
    rows = max(1, LOGITS // len(keys))
    total = vision.new_zeros((), dtype=torch.float32)
    for part, key in zip(vision.float().split(rows), own.split(rows), strict=True):
        total = total + checkpoint(_pairs, part, texts, key, keys, scale, bias, use_reentrant=False)
    return total / len(texts)


def _pairs(vision: Tensor, texts: Tensor, own: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Summed loss of `[n, D]` visuals with captions `own` `[n]` against all texts `[B, D]` with captions `keys`."""
    logits = vision @ texts.T * scale.float().exp() + bias.float()
    signs = torch.where(own[:, None] == keys[None], 1.0, -1.0)
    return -F.logsigmoid(signs * logits).sum()
