"""The motion pathway of a vision tower: the Fast pathway of a SlowFast network over all frames of a clip.

A small 3-D CNN reads every frame at one small size. Its lateral connections gather its features by time around each
slow frame (`keye.motion.timing`), and what they say is added to the patch embeddings of that frame. The last layer
begins at zero: a new pathway does not change a trained tower.

As published (arXiv 1812.03982): the stem, the blocks, temporal kernels of 5 and 3, laterals after the stem and every
stage. Ours: steps in time instead of a stride, statistics of one frame instead of batch normalization, so that a frame
does not depend on its batch-mates, and addition to patch embeddings instead of concatenation to feature maps.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye.motion.settings import MotionSettings
from keye.motion.timing import Steps, lateral_steps, neighbours, still_frames
from keye.slowfast.pixels import normalised

GROUP = 4  # channels of a group of the normalization, at most
PATCHES = 16_384  # patches that are put together to frames at a time


class TimedConv(nn.Conv3d):
    """A 3-D convolution over frames that lie one after another, whose neighbours in time are given.

    Its weights are those of `nn.Conv3d`: over one clip with zeros around it the result is the same.
    """

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int], stride: int = 1) -> None:
        padding = tuple(size // 2 for size in kernel)
        super().__init__(inputs, outputs, kernel, (1, stride, stride), padding, bias=False)

    def forward(self, x: Tensor, around: Tensor) -> Tensor:
        """x `[F, inputs, H, W]`, around `[F, kernel]` of `neighbours` → `[F, outputs, H', W']`."""
        taps = self.kernel_size[0]
        weight = self.weight.transpose(0, 2).transpose(1, 2).flatten(0, 1)  # [taps · outputs, inputs, h, w]
        found = F.conv2d(x, weight, stride=self.stride[1:], padding=self.padding[1:]).unflatten(1, (taps, -1))
        if taps == 1:
            return found[:, 0]
        padded = torch.cat((found, found.new_zeros(1, *found.shape[1:])))
        return sum(padded[around[:, tap], tap] for tap in range(taps))

    def reset_parameters(self) -> None:
        """See `initialize`."""
        self.initialize(nn.init.normal_)

    def initialize(self, fill: Callable[..., Any]) -> None:
        """Kaiming normal by fan-out, as published; `fill(tensor, std=…)` draws from a normal distribution."""
        fan_out = self.out_channels * self.weight[0, 0].numel()
        fill(self.weight, std=(2 / fan_out) ** 0.5)


class GatheredConv(TimedConv):
    """A convolution k×1² at the slow frames alone, over steps in time instead of a stride."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, (kernel, 1, 1))

    def forward(self, x: Tensor, steps: Steps) -> Tensor:
        """x `[F, inputs, H, W]` → `[M, outputs, H, W]` at the slow frames; a step is the mean of its frames."""
        sums = torch.segment_reduce(x[steps.frames].float(), "sum", lengths=steps.lengths, axis=0, unsafe=True)
        means = sums / steps.lengths.clamp(min=1).view(-1, 1, 1, 1)
        stacked = means.to(x.dtype).unflatten(0, (-1, self.kernel_size[0])).flatten(1, 2)  # [M, kernel · inputs, …]
        return F.conv2d(stacked, self.weight.transpose(1, 2).flatten(1, 2))


class FastBlock(nn.Module):
    """A bottleneck of the Fast pathway: 3×1², 1×3² with the spatial stride, 1×1²."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        changes = inputs != outputs or stride > 1
        self.shortcut = TimedConv(inputs, outputs, (1, 1, 1), stride) if changes else None
        self.shortcut_norm = frame_norm(outputs) if changes else None
        self.a, self.a_norm = TimedConv(inputs, inner, (3, 1, 1)), frame_norm(inner)
        self.b, self.b_norm = TimedConv(inner, inner, (1, 3, 3), stride), frame_norm(inner)
        self.c, self.c_norm = TimedConv(inner, outputs, (1, 1, 1)), frame_norm(outputs)

    def forward(self, x: Tensor, around: Tensor) -> Tensor:
        """x `[F, inputs, H, W]`, around `[F, 3]` → `[F, outputs, H', W']`."""
        kept = x if self.shortcut is None else self.shortcut_norm(self.shortcut(x, around))
        x = F.relu(self.a_norm(self.a(x, around)))
        x = F.relu(self.b_norm(self.b(x, around)))
        return F.relu(kept + self.c_norm(self.c(x, around)))


class MotionLateral(nn.Module):
    """One lateral connection: Fast features around every slow frame, twice as many channels."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = GatheredConv(channels, 2 * channels, kernel)
        self.norm = frame_norm(2 * channels)

    def forward(self, x: Tensor, steps: Steps) -> Tensor:
        """x `[F, channels, H, W]` → `[M, 2 · channels, H, W]`."""
        return F.relu(self.norm(self.conv(x, steps)))


class MotionOutput(nn.Linear):
    """The last layer, from all laterals to the width of the tower; it begins at zero."""

    def reset_parameters(self) -> None:
        """Zero weights and bias."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class MotionPathway(nn.Module):
    """All frames of a batch → what is added to the patch embeddings of slow frames.

    Args:
        settings: see `MotionSettings`.
        hidden_size: width of the tower.
    """

    def __init__(self, settings: MotionSettings, hidden_size: int) -> None:
        super().__init__()
        self.settings = settings
        width, kernel = settings.width, settings.lateral_kernel
        self.stem, self.stem_norm = TimedConv(3, width, (5, 7, 7), 2), frame_norm(width)
        self.stages, self.laterals = nn.ModuleList(), nn.ModuleList([MotionLateral(width, kernel)])
        channels, total = width, 2 * width
        for level, count in enumerate(settings.blocks):
            outputs, stride = width * 4 << level, 1 if level == 0 else 2
            blocks = [
                FastBlock(outputs if place else channels, outputs, 1 if place else stride) for place in range(count)
            ]
            self.stages.append(nn.ModuleList(blocks))
            self.laterals.append(MotionLateral(outputs, kernel))
            channels, total = outputs, total + 2 * outputs
        self.output = MotionOutput(total, hidden_size)

    def forward(self, pixel_values: Tensor | None, grid_thw: Tensor | None, clips: Tensor | None) -> Tensor | None:
        """What is added to the embeddings of all patches, `[N, hidden_size]`: zeros for stills and fast frames.

        Every call uses every layer once, whatever the batch holds, as a trainer that partitions parameters needs.

        Args:
            pixel_values: `[N, 3, P, P]` in raster order, bytes or floats in [−1, 1]; None without frames.
            grid_thw: `[F, 3]`, rows (1, h, w) in patches.
            clips: `[F, 3]` of `keye.motion.timing.clips_of`; None if all are stills.
        """
        count = 0 if grid_thw is None else len(grid_thw)
        clips = still_frames(count) if clips is None else clips.cpu()
        steps = lateral_steps(clips, self.settings.alpha, self.settings.lateral_kernel)
        weight, device = self.stem.weight, self.stem.weight.device
        if not len(steps.slow):  # one empty frame, whose result is not used
            frames = weight.new_zeros(1, 3, self.settings.size, self.settings.size)
            lengths = [1] + [0] * (self.settings.lateral_kernel - 1)
            unused = Steps(*(torch.tensor(x, device=device) for x in ([0], [0], lengths)))
            maps = self._laterals(frames, still_frames(1), unused)
            empty = self.output(torch.cat([x[0, :, :1, :1].flatten(1).T for x in maps], dim=1)).sum() * 0
            return None if pixel_values is None else empty.expand(len(pixel_values), self.output.out_features)
        moving = (clips[:, 0] >= 0).nonzero()[:, 0]  # only frames of clips are read
        place = torch.full((count,), -1).index_put((moving,), torch.arange(len(moving)))
        frames = small_frames(pixel_values, grid_thw, moving, self.settings.size, weight.dtype)
        on_device = Steps(place[steps.slow].to(device), place[steps.frames].to(device), steps.lengths.to(device))
        maps = self._laterals(frames, clips[moving], on_device)
        return self._to_patches(maps, grid_thw, steps.slow, len(pixel_values))

    def _laterals(self, frames: Tensor, clips: Tensor, steps: Steps) -> list[Tensor]:
        """The outputs `[M, 2c, h, w]` of all lateral connections."""
        wide, narrow = (neighbours(clips, kernel).to(frames.device) for kernel in (5, 3))
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(frames, wide))), 3, 2, 1)
        found = [self.laterals[0](x, steps)]
        for stage, lateral in zip(self.stages, self.laterals[1:], strict=True):
            for block in stage:
                x = block(x, narrow)
            found.append(lateral(x, steps))
        return found

    def _to_patches(self, maps: list[Tensor], grid_thw: Tensor, slow: Tensor, total: int) -> Tensor:
        """Maps of the slow frames at the places of their patches, through the last layer: `[total, hidden_size]`."""
        sizes = grid_thw[:, 1:].tolist()
        starts = [0, *grid_thw.prod(1).cumsum(0).tolist()]
        groups: dict[tuple[int, int], list[int]] = {}
        for row, frame in enumerate(slow.tolist()):
            groups.setdefault(tuple(sizes[frame]), []).append(row)
        values, patches = [], []
        for (height, width), rows in groups.items():
            at = torch.tensor(rows, device=maps[0].device)
            resized = [F.interpolate(x[at].float(), (height, width), mode="bilinear").to(x.dtype) for x in maps]
            values.append(torch.cat(resized, dim=1).flatten(2).transpose(1, 2).flatten(0, 1))
            first = torch.tensor([starts[int(slow[row])] for row in rows])
            patches.append((first[:, None] + torch.arange(height * width)).flatten())
        added = self.output(torch.cat(values))
        return added.new_zeros(total, added.shape[1]).index_copy(0, torch.cat(patches).to(added.device), added)


def frame_norm(channels: int) -> nn.GroupNorm:
    """Normalization with the statistics of one frame, in groups of `GROUP` channels where they divide."""
    return nn.GroupNorm(channels // GROUP if channels % GROUP == 0 else 1, channels, eps=1e-5)


def small_frames(pixel_values: Tensor, grid_thw: Tensor, chosen: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Frames `[len(chosen), 3, size, size]` in [−1, 1] from their patches, resized by area without keeping the aspect.

    Args:
        pixel_values: `[N, 3, P, P]` of all frames, bytes or floats in [−1, 1].
        grid_thw: `[F, 3]` of all frames.
        chosen: LongTensor `[n]`, the frames.
        size: height and width of the result.
        dtype: of the result; means are taken in float32.
    """
    side = pixel_values.shape[-1] if pixel_values.ndim == 4 else int((pixel_values.shape[1] // 3) ** 0.5)
    counts = grid_thw.prod(1).tolist()
    parts, sizes = pixel_values.view(-1, 3, side, side).split(counts), grid_thw[:, 1:].tolist()
    groups: dict[tuple[int, int], list[int]] = {}
    for place, frame in enumerate(chosen.tolist()):
        groups.setdefault(tuple(sizes[frame]), []).append(place)
    found: list[Tensor] = [pixel_values.new_empty(0)] * len(chosen)
    for (height, width), places in groups.items():
        most = max(1, PATCHES // (height * width))
        for begin in range(0, len(places), most):
            here = places[begin : begin + most]
            grid = torch.stack([parts[int(chosen[place])] for place in here]).unflatten(1, (height, width))
            pictures = grid.permute(0, 3, 1, 4, 2, 5).reshape(len(here), 3, height * side, width * side)
            resized = F.adaptive_avg_pool2d(normalised(pictures).float(), (size, size)).to(dtype)
            for place, frame in zip(here, resized, strict=True):
                found[place] = frame
    return torch.stack(found)
