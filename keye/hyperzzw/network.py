"""The classifier of HyperZ·Z·W ("Terminator"): five blocks of growing width, the mean over places, a linear head."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from keye.errors import KeyeError
from keye.hyperzzw.block import GROUPS, Block, Form
from keye.hyperzzw.slow import SlowNet

RELEASED_OMEGA = 2000.0  # default of the released functions; the released settings name none


@dataclass(frozen=True)
class HyperZZWConfig:
    """Sizes of `HyperZZWNet`. Each block multiplies the channels by its factor.

    `released` and `ours` make the two forms; every field can be given to either.
    """

    channels: int = 3
    """Channels of an image."""

    classes: int = 10
    """Logits."""

    factors: tuple[int, ...] = (4, 3, 2, 2, 2)
    """λ of each block; the first makes a multiple of 12 channels."""

    layers: tuple[int, ...] = (3, 2, 2, 2, 2)
    """Layers of the slow network of each block's global kernel."""

    earlier: tuple[int, ...] = (0, 0, 1, 1, 2)
    """Outputs of earlier blocks that each block also reads."""

    dropout: tuple[float, ...] = (0.0, 0.05, 0.05, 0.05, 0.05)
    """Probability of dropping a channel of each block's output."""

    size: int | None = None
    """Side of the only images that the net takes, with biases at every place; None: any size and aspect."""

    shared: bool = False
    """Statistics and local kernels from the whole batch. An image's logits then depend on the rest of its batch."""

    omega: float = 1.0
    """ω₀ of the slow networks: kernels have about ω₀ · 6 / √3 periods over a side."""

    @classmethod
    def released(cls, **fields: object) -> "HyperZZWConfig":
        """The released CIFAR-10 net of 1,336,855 parameters: 32×32 images, statistics of the batch."""
        return cls(**{"size": 32, "shared": True, "omega": RELEASED_OMEGA, **fields})

    @classmethod
    def ours(cls, **fields: object) -> "HyperZZWConfig":
        """Kernels of any size and aspect, statistics of each image alone, every parameter registered."""
        return cls(**fields)


class NetOutput(NamedTuple):
    """logits `[B, classes]`; kernels: the global kernel `[C, H, W]` of each block, for the slow neural loss."""

    logits: Tensor
    kernels: list[Tensor]


class HyperZZWNet(nn.Module):
    """Images → logits.

    Raises:
        KeyeError: lists of the config that differ in length, or a first block whose channels are no multiple of 12.
    """

    def __init__(self, config: HyperZZWConfig) -> None:
        super().__init__()
        lists = config.factors, config.layers, config.earlier, config.dropout
        if len({len(values) for values in lists}) != 1:
            raise KeyeError(
                f"HyperZZWConfig: factors, layers, earlier and dropout have {[len(values) for values in lists]} "
                "entries; give each one entry per block"
            )
        if config.channels * config.factors[0] % GROUPS:
            raise KeyeError(
                f"HyperZZWConfig: {config.channels} channels × factor {config.factors[0]} is no multiple of {GROUPS}, "
                "the groups of the standardisation; change factors[0]"
            )
        if too_many := [n for n, count in enumerate(config.earlier) if not 0 <= count <= max(0, n - 1)]:
            raise KeyeError(
                f"HyperZZWConfig: earlier is {config.earlier[too_many[0]]} in block {too_many[0]}, which has "
                f"{max(0, too_many[0] - 1)} outputs before its input; give at most that many"
            )
        self.config = config
        form = Form(config.size and (config.size, config.size), config.shared, config.omega)
        width, blocks = config.channels, []
        for factor, layers, earlier, dropout in zip(*lists, strict=True):
            blocks.append(Block(width, width * factor, layers, earlier, dropout, form))
            width *= factor
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, config.classes)

    def forward(self, images: Tensor) -> NetOutput:
        """images `[B, C, H, W]`, normalised floats in the dtype of the net.

        Raises:
            KeyeError: another type or shape.
        """
        wanted = self.config.channels
        if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != wanted:
            raise KeyeError(
                f"images are {images.dtype} {list(images.shape)}; give normalised floats [B, {wanted}, H, W]"
            )
        outputs, kernels, x = list[Tensor](), list[Tensor](), images
        for block, earlier in zip(self.blocks, self.config.earlier, strict=True):
            # The latest output is the input itself; those before it are joined with the branches.
            x, kernel = block(x, outputs[-2::-1][:earlier] if earlier else ())
            outputs.append(x)
            kernels.append(kernel)
        return NetOutput(self.head(x.mean((2, 3))), kernels)


def slow_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the slow networks inside a model."""
    return [p for module in model.modules() if isinstance(module, SlowNet) for p in module.parameters()]
