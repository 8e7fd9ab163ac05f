"""SlowFast Networks (arXiv 1812.03982): a 3-D CNN with a Slow and a Fast pathway over the frames of one clip.

The parameters of the model zoo's files load through `keye.motion.names`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye.errors import ArgumentError
from keye.motion.settings import PRESETS, SlowFastSettings

STAGE_STRIDES = (1, 2, 2, 2)  # spatial, of res2 to res5
SLOW_KERNELS = (1, 1, 3, 3)  # temporal, of res2 to res5
FAST_KERNELS = (3, 3, 3, 3)


def conv(
    inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1)
) -> nn.Conv3d:
    """A 3-D convolution without bias that keeps the size at stride 1."""
    return nn.Conv3d(inputs, outputs, kernel, stride, tuple(size // 2 for size in kernel), bias=False)


class Stem(nn.Module):
    """conv1 and pool1: `[B, 3, T, H, W]` → `[B, width, T, H / 4, W / 4]`."""

    def __init__(self, width: int, temporal: int) -> None:
        super().__init__()
        self.conv = conv(3, width, (temporal, 7, 7), (1, 2, 2))
        self.norm = nn.BatchNorm3d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(F.relu(self.norm(self.conv(x))), (1, 3, 3), (1, 2, 2), (0, 1, 1))


class Shortcut(nn.Module):
    """The projection of a block's input where its size changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = conv(inputs, outputs, (1, 1, 1), (1, stride, stride))
        self.norm = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Block(nn.Module):
    """A bottleneck: temporal × 1², 1 × 3² with the spatial stride, 1 × 1²; `[B, inputs, …]` → `[B, outputs, …]`."""

    def __init__(self, inputs: int, outputs: int, temporal: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        self.shortcut = Shortcut(inputs, outputs, stride) if inputs != outputs or stride != 1 else None
        self.a, self.a_norm = conv(inputs, inner, (temporal, 1, 1)), nn.BatchNorm3d(inner)
        self.b, self.b_norm = conv(inner, inner, (1, 3, 3), (1, stride, stride)), nn.BatchNorm3d(inner)
        self.c, self.c_norm = conv(inner, outputs, (1, 1, 1)), nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a_norm(self.a(x)))
        y = F.relu(self.b_norm(self.b(y)))
        kept = x if self.shortcut is None else self.shortcut(x)
        return F.relu(kept + self.c_norm(self.c(y)))


class NonLocal(nn.Module):
    """A non-local block in the dot-product form with half of the channels; added to its input.

    Keys and values are pooled 2 × 2. The product of keys and values comes first, which costs less and is the same.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // 2
        self.theta, self.phi, self.g = (nn.Conv3d(width, inner, 1) for _ in range(3))
        self.out, self.norm = nn.Conv3d(inner, width, 1), nn.BatchNorm3d(width)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool3d(x, (1, 2, 2))
        queries = self.theta(x).flatten(2)
        keys, values = self.phi(pooled).flatten(2), self.g(pooled).flatten(2)
        mixed = (values @ keys.transpose(1, 2) / keys.shape[2]) @ queries
        return x + self.norm(self.out(mixed.unflatten(2, x.shape[2:])))


class Pathway(nn.Sequential):
    """The blocks of one stage in one pathway."""

    def __init__(self, inputs: int, outputs: int, kernels: Sequence[int], stride: int, after: Sequence[int]) -> None:
        layers: dict[str, nn.Module] = {}
        for number, temporal in enumerate(kernels):
            first = number == 0
            layers[f"block{number}"] = Block(inputs if first else outputs, outputs, temporal, stride if first else 1)
            if number in after:
                layers[f"nonlocal{number}"] = NonLocal(outputs)
        super().__init__(OrderedDict(layers))


class Lateral(nn.Module):
    """What the Slow pathway gets of the Fast one: `slow [B, C, T, …]`, `fast [B, c, αT, …]` → `[B, C + …, T, …]`."""

    def __init__(self, width: int, settings: SlowFastSettings) -> None:
        super().__init__()
        self.kind, self.alpha = settings.lateral, settings.alpha
        if self.kind == "conv":
            self.conv = conv(width, 2 * width, (settings.lateral_kernel, 1, 1), (settings.alpha, 1, 1))
            self.norm = nn.BatchNorm3d(2 * width)

    @staticmethod
    def added(width: int, settings: SlowFastSettings) -> int:
        """Channels that a connection from `width` Fast channels adds to the Slow pathway."""
        return {"conv": 2 * width, "concat": settings.alpha * width, "sample": width}.get(settings.lateral, 0)

    def forward(self, slow: Tensor, fast: Tensor) -> Tensor:
        if self.kind == "conv":
            return torch.cat((slow, F.relu(self.norm(self.conv(fast)))), dim=1)
        if self.kind == "sample":
            return torch.cat((slow, fast[:, :, :: self.alpha]), dim=1)
        channels = fast.unflatten(2, (-1, self.alpha)).transpose(2, 3).flatten(1, 2)
        return slow + channels if self.kind == "sum" else torch.cat((slow, channels), dim=1)


class SlowFastNet(nn.Module):
    """The network; `SlowFastNet("r50_4x16")([slow, fast])` returns logits.

    Args:
        settings: or the name of a preset (`keye.motion.settings.PRESETS`).

    Raises:
        ArgumentError: no preset has this name, or the settings are of another type.
    """

    def __init__(self, settings: SlowFastSettings | str = "r50_4x16") -> None:
        super().__init__()
        if isinstance(settings, str):
            if settings not in PRESETS:
                raise ArgumentError(f"no preset {settings!r}; use one of {', '.join(PRESETS)}")
            settings = PRESETS[settings]
        if not isinstance(settings, SlowFastSettings):
            raise ArgumentError(f"settings are {settings!r:.60}; give SlowFastSettings(…) or the name of a preset")
        self.settings = settings
        names = [name for name in ("slow", "fast") if getattr(settings, name)]
        widths = {"slow": settings.width, "fast": settings.width // settings.beta}
        inputs = dict(widths)
        self.stem = nn.ModuleDict({name: Stem(widths[name], {"slow": 1, "fast": 5}[name]) for name in names})
        self.stages, self.lateral = nn.ModuleList(), nn.ModuleList()
        for stage, (count, stride) in enumerate(zip(settings.blocks, STAGE_STRIDES, strict=True)):
            if settings.joined:
                self.lateral.append(Lateral(inputs["fast"], settings))
                inputs["slow"] += Lateral.added(inputs["fast"], settings)
            paths = {}
            for name in names:
                kernel = {"slow": SLOW_KERNELS, "fast": FAST_KERNELS}[name][stage]
                kernels = [kernel] * count
                if stage == 2 and settings.temporal is not None:
                    kernels[settings.temporal :] = [1] * len(kernels[settings.temporal :])
                after = settings.nonlocal_blocks if stage == 2 and name == "slow" else ()
                outputs = widths[name] * 4 * 2**stage
                paths[name] = Pathway(inputs[name], outputs, kernels, stride, after)
                inputs[name] = outputs
            self.stages.append(nn.ModuleDict(paths))
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(sum(inputs[name] for name in names), settings.classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's start: Kaiming normal by fan-out, the last norm of a block at zero, the head N(0, 0.01)."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Block):
                nn.init.zeros_(module.c_norm.weight)
            elif isinstance(module, NonLocal):
                nn.init.zeros_(module.norm.weight)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def features(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of res5, one of each pathway that exists.

        Args:
            clips: float frames of the pathways that exist, Slow first: `[B, 3, T, H, W]` and `[B, 3, αT, H, W]`; they
                are converted to the dtype of the weights.

        Raises:
            ArgumentError: the number, type or shape of the tensors or the number of frames does not fit the settings.
        """
        names = list(self.stem)
        if len(clips) != len(names):
            raise ArgumentError(f"give {len(names)} tensors ({', '.join(names)}), not {len(clips)}")
        for name, clip in zip(names, clips, strict=True):
            if clip.ndim != 5 or clip.shape[1] != 3 or not clip.is_floating_point() or len(clip) != len(clips[0]):
                raise ArgumentError(
                    f"the {name} frames are {clip.dtype} {list(clip.shape)}; give normalised floats "
                    "[B, 3, frames, H, W] with one B for all pathways (keye.motion.frames.pathways makes them)"
                )
        x = {name: clip.to(self.head.weight.dtype) for name, clip in zip(names, clips, strict=True)}
        if len(x) == 2 and x["fast"].shape[2] != self.settings.alpha * x["slow"].shape[2]:
            raise ArgumentError(
                f"{x['slow'].shape[2]} slow and {x['fast'].shape[2]} fast frames; the Fast pathway needs alpha = "
                f"{self.settings.alpha} times as many (keye.motion.frames.pathways)"
            )
        x = {name: self.stem[name](clip) for name, clip in x.items()}
        for number, stage in enumerate(self.stages):
            if self.settings.joined:
                x["slow"] = self.lateral[number](x["slow"], x["fast"])
            x = {name: stage[name](value) for name, value in x.items()}
        return [x[name] for name in names]

    def forward(self, clips: Sequence[Tensor]) -> Tensor:
        """Logits `[B, classes]`; see `features`."""
        pooled = [value.mean((2, 3, 4)) for value in self.features(clips)]
        return self.head(self.dropout(torch.cat(pooled, dim=1)))
