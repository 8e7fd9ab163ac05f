"""The terms that HyperZ·Z·W adds to the cross-entropy: similar kernels in all blocks, and small fast weights."""

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye.hyperzzw.network import slow_parameters

FAST_WEIGHT = 5e-5  # of `fast_norms`, as released
SMOOTHING = 0.1  # of the labels, as released


def slow_neural_loss(kernels: Sequence[Tensor], summed: bool = False) -> Tensor:
    """Sum over pairs of blocks j < i of the mean squared difference of their global kernels, a float32 scalar.

    Args:
        kernels: `[C_i, H, W]` of each block, as in `NetOutput`; C_i is a multiple of C_j. The narrower kernel is
            repeated along the channels.
        summed: compare the sums over the channels instead.
    """
    total = kernels[0].new_zeros((), dtype=torch.float32)
    for first, second in combinations(kernels, 2):
        if summed:
            total = total + F.mse_loss(first.float().sum(0), second.float().sum(0))
        else:
            tiled = first.repeat(len(second) // len(first), 1, 1)
            total = total + F.mse_loss(tiled.float(), second.float())
    return total


def fast_norms(model: nn.Module) -> Tensor:
    """Sum of the Euclidean norms of all parameters outside the slow networks, a float32 scalar."""
    slow = {id(parameter) for parameter in slow_parameters(model)}
    return torch.stack([p.float().norm() for p in model.parameters() if id(p) not in slow]).sum()
