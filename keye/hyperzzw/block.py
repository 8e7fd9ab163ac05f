"""The block of the classifier: ten branches over one input, joined by a 1×1 convolution, without a residual path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye.hyperzzw.operators import (
    global_product,
    instance_standardised,
    local_product,
    standardised,
    twofold_product,
)
from keye.hyperzzw.slow import ContextSlowNet, SlowNet

BRANCHES = 10
SIDES = (3, 9, 5, 7)  # of the four local kernels
GROUPS = 12  # of channels with a standardisation each


@dataclass(frozen=True)
class Form:
    """How the parts of a net are made.

    size: (height, width) of every map, with trained biases at each place, as released; None: any size. shared:
    statistics and local kernels from the batch, as released; otherwise from each map alone. omega: ω₀.
    """

    size: tuple[int, int] | None
    shared: bool
    omega: float


def pointwise(channels: int, out: int, start: Callable[..., Tensor], bias: bool = True) -> nn.Conv2d:
    """A 1×1 convolution with weights drawn by `start`, a function of torch.nn.init, and a bias of 0, or none."""
    made = nn.Conv2d(channels, out, 1, bias=bias)
    start(made.weight, nonlinearity="linear" if start is nn.init.kaiming_uniform_ else "leaky_relu")
    if bias:
        nn.init.zeros_(made.bias)
    return made


class RecursiveGatedUnit(nn.Module):
    """Y q with q = GELU(IS(K x · Q(V x))) + bias; K, Q, V, Y are 1×1 convolutions, the bias has a value per place.

    With maps of any size there is no bias after K x · Q(V x), as what follows standardises each channel.
    """

    def __init__(self, channels: int, form: Form) -> None:
        super().__init__()
        start = nn.init.kaiming_uniform_
        self.key, self.query, self.value = (pointwise(channels, channels, start) for _ in range(3))
        self.out = pointwise(channels, channels, start, form.size is not None)
        self.bias = None if form.size is None else nn.Parameter(torch.zeros(1, 1, *form.size))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → the same shape."""
        gated = instance_standardised(self.key(x) * self.query(self.value(x)))
        return self.out(F.gelu(gated) if self.bias is None else F.gelu(gated) + self.bias)


class ChannelWeighting(nn.Module):
    """x · σ(K · m · m), m the mean of each channel, K a kernel over the channels."""

    def __init__(self, channels: int, form: Form) -> None:
        super().__init__()
        self.slow = SlowNet(1, 32, 2, 1, (channels,), omega=form.omega)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → the same shape."""
        kernel = self.slow(x.shape[1:2])[..., None, None].to(x.dtype)
        return x * torch.sigmoid(twofold_product(kernel, x.mean((2, 3), keepdim=True)))


class Interaction(nn.Module):
    """x · σ(a · b): a of the mean of `seen` over its places, b of that over its channels, both `twofold_product`."""

    def __init__(self, channels: int, form: Form) -> None:
        super().__init__()
        self.channel = SlowNet(1, 16, 2, 1, (channels,), omega=form.omega)
        self.space = SlowNet(2, 64, 2, 1, form.size, omega=form.omega)

    def forward(self, seen: Tensor, x: Tensor) -> Tensor:
        """Both `[B, C, H, W]` → the same shape."""
        channel = self.channel(x.shape[1:2])[..., None, None].to(x.dtype)
        space = self.space(x.shape[2:]).to(x.dtype)
        by_channel = twofold_product(channel, seen.mean((2, 3), keepdim=True))
        by_place = twofold_product(space, seen.mean(1, keepdim=True))
        return x * torch.sigmoid(by_place * by_channel)


class LocalBranch(nn.Module):
    """A depthwise convolution with a kernel that depends on `source`, a 1×1 convolution, standardised, GELU, + bias."""

    def __init__(self, channels: int, side: int, form: Form) -> None:
        super().__init__()
        self.slow = ContextSlowNet(channels, side, omega=form.omega, shared=form.shared)
        self.mixer = pointwise(channels, channels, nn.init.kaiming_normal_)
        # In the first block, with one channel in each group of the standardisation, nothing would train it.
        self.bias = None if form.size is None else nn.Parameter(torch.zeros(1))
        self.axes = (0, 2, 3) if form.shared else (1, 2, 3)

    def forward(self, source: Tensor, x: Tensor) -> Tensor:
        """Both `[B, C, H, W]` → the same shape."""
        kernel = self.slow(source).to(x.dtype)
        found = F.gelu(standardised(self.mixer(local_product(kernel, x)), self.axes))
        return found if self.bias is None else found + self.bias


class Block(nn.Module):
    """Branches → 1×1 bottleneck → standardisation by groups → GELU → dropout of channels.

    Args:
        channels: of the input.
        out: channels of the output, a multiple of 12.
        layers: of the slow network of the global kernel.
        earlier: outputs of earlier blocks that are joined with the branches.
        dropout: probability of each channel.
        form: see `Form`.
    """

    def __init__(self, channels: int, out: int, layers: int, earlier: int, dropout: float, form: Form) -> None:
        super().__init__()
        self.form = form
        self.slow = SlowNet(2, 64, layers, channels, form.size, omega=form.omega)
        self.gated_kernel, self.gated_input = RecursiveGatedUnit(channels, form), RecursiveGatedUnit(channels, form)
        # With maps of any size no bias precedes a standardisation that removes it.
        self.mixer = pointwise(channels, channels, nn.init.kaiming_normal_, form.size is not None)
        self.weighting, self.interaction = ChannelWeighting(channels, form), Interaction(channels, form)
        self.local = nn.ModuleList(LocalBranch(channels, side, form) for side in SIDES)
        joined = channels * (BRANCHES + earlier)
        self.bottleneck = pointwise(joined, out, nn.init.kaiming_normal_, form.size is not None)
        self.bias = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor, earlier: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """x `[B, C, H, W]`, earlier outputs of blocks, latest first → `[B, out, H, W]` and the kernel `[C, H, W]`."""
        kernel = self.slow(x.shape[2:])
        weighted = x * kernel.to(x.dtype)
        fast = instance_standardised(self.gated_kernel(weighted) + self.gated_input(x))
        mixed = instance_standardised(self.mixer(x))
        channel = instance_standardised(self.weighting(x))
        seen = self._global(weighted, fast)
        # Sources and inputs of the local branches are crossed, as released.
        pairs = (x, channel), (channel, x), (mixed, x), (x, mixed)
        local = [branch(*pair) for branch, pair in zip(self.local, pairs, strict=True)]
        branches = [
            *(seen, fast, self._global(weighted, mixed), torch.sigmoid(seen) * seen),
            *(self._global(weighted, channel), self.interaction(seen, x), *local),
            *(output.repeat(1, x.shape[1] // output.shape[1], 1, 1) for output in earlier),
        ]
        joined = self._standardised(self.bottleneck(torch.cat(branches, 1)))
        return self.dropout(F.gelu(joined) + self.bias), kernel

    def _global(self, weighted: Tensor, values: Tensor) -> Tensor:
        """`global_product`; with maps of any size a mean of its W terms times √W, so that its spread stays the same."""
        found = global_product(weighted, values)
        return found * (1 if self.form.size else found.shape[-1] ** -0.5)

    def _standardised(self, x: Tensor) -> Tensor:
        """Groups of channels, in turn over the batch and over each instance; one map at a time: over its group."""
        axes = (0, 2, 3) if self.form.shared else (1, 2, 3)
        groups = x.chunk(GROUPS, 1)
        return torch.cat([standardised(group, (2, 3) if i % 2 else axes) for i, group in enumerate(groups)], 1)
