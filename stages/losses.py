"""Losses that need every rank. The language-model loss lives in the model; its normaliser in `trainer`."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from stages.parallel import all_gather


def siglip_loss(
    vision: Tensor, text: Tensor, captions: Tensor, scale: Tensor, bias: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343) of this rank's visuals against the captions of all ranks.

    Args:
        vision, text: `[B, D]` unit vectors of this rank's pairs; B is the same on every rank.
        captions: `[B, T]` token ids; equal captions are positives of one another, as a small world repeats them.
        scale: `[1]` log temperature. bias: `[1]`.

    Returns:
        This rank's part of the mean over all visuals: the sum over ranks is the loss of the joined batch.
    """
    texts = all_gather(text.float(), group).flatten(0, 1)
    keys = all_gather(captions, group).flatten(0, 1)
    logits = vision.float() @ texts.T * scale.float().exp() + bias.float()
    same = (captions[:, None] == keys[None]).all(-1)
    signs = torch.where(same, 1.0, -1.0)
    return -F.logsigmoid(signs * logits).sum() / len(texts)
