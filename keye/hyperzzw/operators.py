"""The three HyperZ·Z·W operators and the standardisations around them, as pure functions on maps `[B, C, H, W]`.

A kernel W of a slow network is multiplied with an activation Z elementwise (Z·W), and the result, a kernel that depends
on the input, is applied to an activation again (Z·Z·W).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


def global_product(weighted: Tensor, values: Tensor) -> Tensor:
    """The global operator: the matrix product of the last two axes in each channel.

    It needs square maps as published. For other sizes the H rows of the values are resampled to W rows
    (`resampled_rows`); of a square map they stay as they are, so there the operator is the published one.

    Args:
        weighted: `[B, C, H, W]`, an activation times the kernel of a slow network.
        values: `[B, C, H, W]`.

    Returns:
        `[B, C, H, W]`: in place (i, k) the sum over j of weighted (i, j) · values (j, k).
    """
    height, width = weighted.shape[-2:]
    if height != width:
        values = resampled_rows(height, width, values.device).to(values.dtype) @ values
    return weighted @ values


def local_product(kernel: Tensor, values: Tensor) -> Tensor:
    """The local operator: a depthwise convolution whose kernel depends on the input, with zeros around the map.

    Args:
        kernel: `[C, k, k]` for all maps, or `[B, C, k, k]`, one for each; k is odd.
        values: `[B, C, H, W]`.

    Returns:
        `[B, C, H, W]`.
    """
    batch, channels = values.shape[:2]
    side = kernel.shape[-1]
    if kernel.ndim == 3:
        return F.conv2d(values, kernel[:, None], padding=side // 2, groups=channels)
    joined = values.reshape(1, batch * channels, *values.shape[2:])
    found = F.conv2d(joined, kernel.reshape(-1, 1, side, side), padding=side // 2, groups=batch * channels)
    return found.view_as(values)


def twofold_product(kernel: Tensor, values: Tensor) -> Tensor:
    """The operator of two elementwise products: kernel · values · values; the shapes broadcast."""
    return kernel * values * values


def resampled_rows(rows: int, count: int, device: torch.device | None = None) -> Tensor:
    """The matrix `[count, rows]` float32 that interpolates `rows` samples of an axis linearly at `count` places.

    The samples are the centres of equal cells. Where `count` is smaller, the triangle is widened, so that no row is
    left out. Each row sums to 1; the matrix is the identity if both numbers are equal.
    """
    centres = (torch.arange(count, device=device) + 0.5) * (rows / count) - 0.5
    distance = (centres[:, None] - torch.arange(rows, device=device)).abs()
    weights = (1 - distance / max(1.0, rows / count)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def standardised(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Values with mean 0 and variance 1 over the axes, without trained or running statistics; at least in float32."""
    wide = widened(values)
    variance, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
    return ((wide - mean) * torch.rsqrt(variance + EPS)).to(values.dtype)


def widened(values: Tensor) -> Tensor:
    """Values in float32, or in their own precision if that is higher."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def instance_standardised(values: Tensor) -> Tensor:
    """`standardised` over the places of each channel of each map `[B, C, H, W]`."""
    return standardised(values, (2, 3))
