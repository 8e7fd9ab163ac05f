"""The mixer of the vision tower: HyperZ·Z·W operators in place of attention, for frames of many sizes in one batch.

One slow network makes the kernels of every frame size, the large grid of a slow frame and the small one of a fast
frame, by sampling the same picture. All statistics are those of one frame, so a frame's features do not depend on what
it is packed with. A frame of H×W patches costs N · W multiplications in each channel instead of attention's N · N.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye.hyperzzw.operators import global_product, instance_standardised, local_product, twofold_product, widened
from keye.hyperzzw.slow import ContextSlowNet, SlowNet

HIDDEN, LAYERS = 32, 2  # of the slow network of the global kernel and of the gate over places
LOCAL_HIDDEN, SIDE = 16, 5  # of the local kernel
BRANCHES = 3


@dataclass(frozen=True)
class FrameGroups:
    """The frames of a packed batch, grouped by size.

    sizes: (height, width) in patches and the number of frames of each group. order: LongTensor `[N]` that gathers the
    patches of each group, frame after frame; None if they are in that order already. back: its inverse.
    """

    sizes: tuple[tuple[int, int, int], ...]
    order: Tensor | None = None
    back: Tensor | None = None

    @classmethod
    def of(cls, frames: Tensor, device: torch.device | None = None) -> "FrameGroups":
        """Groups of frames `[F, 2]` (height, width in patches), in the order of their first frames; reads `frames`.

        device: of the patches; by default that of `frames`.
        """
        listed = [(int(height), int(width)) for height, width in frames.tolist()]
        spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
        start = 0
        for size in listed:
            stop = start + size[0] * size[1]
            spans.setdefault(size, []).append((start, stop))
            start = stop
        sizes = tuple((*size, len(found)) for size, found in spans.items() if size[0] * size[1])
        gathered = [span for found in spans.values() for span in found]
        if gathered == sorted(gathered):
            return cls(sizes)
        order = torch.cat([torch.arange(*span) for span in gathered])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        device = frames.device if device is None else device
        return cls(sizes, order.to(device), back.to(device))

    def maps(self, values: Tensor) -> Iterator[Tensor]:
        """values `[N, C]` of all patches, gathered → the maps `[n, C, height, width]` of each group, as views."""
        parts = values.split([height * width * count for height, width, count in self.sizes])
        for part, (height, width, count) in zip(parts, self.sizes, strict=True):
            yield part.view(count, height, width, -1).permute(0, 3, 1, 2)


class HyperZZWMixer(nn.Module):
    """Three branches of the block that see other patches, joined by a linear layer; its weights are about attention's.

    With the normalised input x `[C, H, W]` of a frame, the global kernel K and v = IS(V x): the global branch is
    g = (x · K) v / √W, the local branch a depthwise convolution of x with a kernel of x, the interaction
    x · σ(a · b), a from the mean of g over its places and b from that over its channels. Each is normalised over its
    channels (layer norm) before the last linear layer.

    Args:
        width: C.
        eps: of the norms.
        omega: ω₀ of the slow networks.
    """

    def __init__(self, width: int, eps: float = 1e-6, omega: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.slow = SlowNet(2, HIDDEN, LAYERS, width, omega=omega)
        self.channel = SlowNet(1, LOCAL_HIDDEN, LAYERS, 1, (width,), scale=1.0, omega=omega)
        self.space = SlowNet(2, HIDDEN, LAYERS, 1, omega=omega)
        self.local = ContextSlowNet(width, SIDE, LOCAL_HIDDEN, omega=omega)
        self.value = nn.Linear(width, width, bias=False)  # IS removes a bias
        self.branch_scale = nn.Parameter(torch.ones(BRANCHES, width))
        self.branch_shift = nn.Parameter(torch.zeros(BRANCHES, width))
        self.out = nn.Linear(BRANCHES * width, width)

    def forward(self, x: Tensor, frames: FrameGroups) -> Tensor:
        """x `[N, C]`, the patches of all frames in raster order → `[N, C]`."""
        if frames.order is not None:
            x = x[frames.order]
        channel = self.channel((x.shape[1],))[..., None, None]
        pairs = zip(frames.maps(x), frames.maps(self.value(x)), strict=True)
        found = torch.cat([self._branches(*pair, channel) for pair in pairs])  # [N, branches, C]
        normed = F.layer_norm(widened(found), found.shape[-1:], eps=self.eps)
        joined = normed * self.branch_scale + self.branch_shift
        out = self.out(joined.to(x.dtype).flatten(1))
        return out if frames.back is None else out[frames.back]

    def _branches(self, x: Tensor, values: Tensor, channel: Tensor) -> Tensor:
        """Maps `[n, C, H, W]` of frames of one size, channel `[1, C, 1, 1]` → `[n · H · W, branches, C]`."""
        size = x.shape[2:]
        weighted = x * self.slow(size).to(x.dtype)
        seen = global_product(weighted, instance_standardised(values)) * size[1] ** -0.5
        local = local_product(self.local(x).to(x.dtype), x)
        by_channel = twofold_product(channel, widened(seen).mean((2, 3), keepdim=True))
        by_place = twofold_product(self.space(size), widened(seen).mean(1, keepdim=True))
        gated = x * torch.sigmoid(by_place * by_channel).to(x.dtype)
        return torch.stack((seen, local, gated), dim=1).permute(0, 3, 4, 1, 2).flatten(0, 2)
