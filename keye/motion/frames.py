"""The frames of the two pathways of a clip."""

import torch
from torch import Tensor

from keye.errors import ArgumentError
from keye.motion.settings import SlowFastSettings

MEAN, STD = 0.45, 0.225
"""Of RGB values in [0, 1], the same for all channels."""


def slow_places(raw: int, alpha: int) -> list[int]:
    """The fast frames that the Slow pathway reads: `raw // alpha` evenly spaced ones from first to last, truncated.

    The release does this; the paper says every alpha-th frame. For 32 frames and alpha 8: 0, 10, 20, 31.
    """
    if raw < alpha or raw % alpha:
        raise ArgumentError(
            f"{raw} frames are not a multiple of alpha = {alpha}; sample {max(1, round(raw / alpha)) * alpha}"
        )
    count = raw // alpha
    return [place * (raw - 1) // max(1, count - 1) for place in range(count)]


def pathways(frames: Tensor, settings: SlowFastSettings) -> list[Tensor]:
    """Float32 inputs of `SlowFastNet` from uint8 frames `[B, αT, 3, H, W]`: Slow, then Fast, of those that exist.

    Raises:
        ArgumentError: another type or shape, or the number of frames is not a multiple of alpha.
    """
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[2] != 3:
        found = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, Tensor) else f"a {type(frames).__name__}"
        raise ArgumentError(f"frames are {found}; give a tensor torch.uint8 [B, frames, 3, H, W] with values 0 to 255")
    values = (frames.float() / 255 - MEAN) / STD
    fast = values.transpose(1, 2)
    slow = fast[:, :, slow_places(frames.shape[1], settings.alpha)]
    return ([slow] if settings.slow else []) + ([fast] if settings.fast else [])


def macs(settings: SlowFastSettings | str, size: int = 256) -> int:
    """Multiply-accumulates of one clip of `size` × `size` pixels: convolutions and products of matrices.

    settings: or the name of a preset.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from keye.motion.network import SlowFastNet

    with torch.device("meta"):
        network = SlowFastNet(settings).eval()
        frames = torch.zeros(1, network.settings.raw, 3, size, size, dtype=torch.uint8)
        clips = pathways(frames, network.settings)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(clips)
    return counter.get_total_flops() // 2
