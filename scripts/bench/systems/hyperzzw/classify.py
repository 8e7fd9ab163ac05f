"""Pixel-level classification: scikit-learn's 8×8 digits and drawn 16×16 stills, with each net, optimizer and loss."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye.errors import KeyeError
from keye.hyperzzw import HyperZZWConfig, HyperZZWNet, Kar3, slow_neural_loss
from keye.world.scene import COLOURS, SHAPES, paint

BATCH, WARM_UP = 32, 0.1
RATES = {"AdamW": (1e-3, 3e-3, 1e-2, 3e-2), "Kar3": (1e-4, 3e-4, 1e-3, 3e-3)}
DEV_SEED = 100  # of the runs that choose the learning rates, on images that no result reads


@dataclass(frozen=True)
class Images:
    """images `[n, C, H, W]` float32, labels `[n]`: to train, to choose learning rates, and to report on."""

    train: tuple[Tensor, Tensor]
    dev: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


@cache
def digits() -> Images:
    """997 digits to train, 200 to choose, 600 to report.

    Raises:
        KeyeError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise KeyeError("the digits need scikit-learn; pip install -e '.[adversary]'") from error
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = torch.tensor(found.images[order], dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(found.target[order])
    parts = [(images[a:b], labels[a:b]) for a, b in ((0, 997), (997, 1197), (1197, 1797))]
    return Images(*parts, 10)


@cache
def stills(height: int = 16, width: int = 16) -> Images:
    """1,000 drawn stills to train, 200 to choose, 600 to report: one of four shapes in noise, another coloured dot."""
    return Images(*(_drawn(count, split, height, width) for split, count in enumerate((1000, 200, 600))), len(SHAPES))


def _drawn(count: int, split: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng([split, height, width])
    images, labels = np.empty((count, height, width, 3), np.uint8), rng.integers(len(SHAPES), size=count)
    colours = list(COLOURS.values())
    for image, label in zip(images, labels, strict=True):
        image[:] = rng.integers(40, 120)
        colour, other = rng.permutation(len(colours))[:2]
        for _ in range(2):
            paint(image, "square", colours[other], *(int(rng.integers(side - 1)) for side in (height, width)), 2)
        size = int(rng.integers(7, 11))
        top, left = (int(rng.integers(side - size + 1)) for side in (height, width))
        paint(image, SHAPES[label], colours[colour], top, left, size)
        image[:] = np.clip(image + rng.normal(0, 15, image.shape), 0, 255).astype(np.uint8)
    return torch.tensor(images).permute(0, 3, 1, 2).float() / 128 - 1, torch.tensor(labels)


class Residual(nn.Module):
    """A residual CNN: a convolution, three stages of one residual block, widths w, 2w, 4w, batch norms, a mean."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.blocks, self.skips = nn.ModuleList(), nn.ModuleList()
        for before, after in ((width, width), (width, 2 * width), (2 * width, 4 * width)):
            layers = [
                *(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()),
                *(nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)),
            ]
            self.blocks.append(nn.Sequential(*layers))
            self.skips.append(nn.Identity() if before == after else nn.Conv2d(before, after, 1, bias=False))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """`[B, C, H, W]` → logits `[B, classes]`."""
        x = F.relu(self.first(images))
        for block, skip in zip(self.blocks, self.skips, strict=True):
            x = F.relu(block(x) + skip(x))
        return self.head(x.mean((2, 3)))


def parameters(net: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


def config_of(images: Images, released: bool) -> HyperZZWConfig:
    """Three blocks, for images of this size."""
    channels, side = images.train[0].shape[1:3]
    sizes: dict[str, Any] = {
        "channels": channels, "classes": images.classes, "factors": (12 // channels, 2, 2), "layers": (3, 2, 2),
        "earlier": (0, 0, 1), "dropout": (0.0, 0.05, 0.05),
    }  # fmt: skip
    return HyperZZWConfig.released(size=side, **sizes) if released else HyperZZWConfig.ours(**sizes)


def new_net(kind: str, images: Images) -> nn.Module:
    """A net: "ours", "released", or "residual" with the number of parameters of ours, as near as a width gives it."""
    if kind != "residual":
        return HyperZZWNet(config_of(images, kind == "released"))
    goal = parameters(HyperZZWNet(config_of(images, False)))
    nets = [Residual(images.train[0].shape[1], images.classes, width) for width in range(4, 64)]
    return min(nets, key=lambda net: abs(parameters(net) - goal))


def logits_of(net: nn.Module, images: Tensor) -> Tensor:
    """Logits of either net."""
    return net(images).logits if isinstance(net, HyperZZWNet) else net(images)


@torch.no_grad()
def correct(net: nn.Module, part: tuple[Tensor, Tensor], batch: int = 64) -> list[bool]:
    """Whether each image is classified rightly, in batches of this size."""
    net.eval()
    found = torch.cat([logits_of(net, images).argmax(1) for images in part[0].split(batch)])
    return (found == part[1]).tolist()


def trained(
    kind: str, images: Images, optimizer: str, rate: float, seed: int, steps: int, slow_loss: bool = False
) -> tuple[nn.Module, float]:
    """A trained net and the CPU seconds of its training; the cross-entropy alone, or with the slow neural loss."""
    torch.manual_seed(seed)
    net, began = new_net(kind, images), time.process_time()
    made: Callable[..., torch.optim.Optimizer] = Kar3 if optimizer == "Kar3" else torch.optim.AdamW
    steps_of = made(net.parameters(), lr=rate)
    warm_up = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        steps_of, lambda step: min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    order = torch.randperm(len(images.train[1]) * (BATCH * steps // len(images.train[1]) + 1))
    for step in range(steps):
        rows = order[BATCH * step : BATCH * (step + 1)] % len(images.train[1])
        output = net.train()(images.train[0][rows])
        loss = F.cross_entropy(output.logits if isinstance(net, HyperZZWNet) else output, images.train[1][rows])
        if slow_loss:
            loss = loss + slow_neural_loss(output.kernels)
        steps_of.zero_grad()
        loss.backward()
        steps_of.step()
        schedule.step()
    return net, time.process_time() - began


def chosen_rate(kind: str, images: Images, optimizer: str, steps: int) -> dict[str, Any]:
    """The learning rate with most right images of `dev`, on a seed of its own; the accuracy of each in per cent."""
    tried = {}
    for rate in RATES[optimizer]:
        net, _ = trained(kind, images, optimizer, rate, DEV_SEED, steps)
        tried[rate] = 100 * float(np.mean(correct(net, images.dev)))
    return {"rate": max(tried, key=tried.__getitem__), "tried": [[rate, score] for rate, score in tried.items()]}
