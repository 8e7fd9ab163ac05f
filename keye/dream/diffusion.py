"""Noise levels, the two losses of SlowFast-VGen (arXiv 2410.23277, sections 3.2 and 3.3) and a DDIM sampler.

Slow learning: the past frames of a window are clean, the new ones noised, and the loss is the error of the noise of the
new frames. Fast learning: all frames are noised, and there is no condition.
"""

import math

import torch
from torch import Tensor

from keye.dream.model import DreamModel
from keye.dream.scenes import NO_ACTION

LEAST_KEPT = 1e-3  # the sampler divides by the root of ᾱ
LEAST_LEVEL = 0.02  # below it the noise is hardly visible, and the loss says nothing about the frames


def kept(level: Tensor) -> Tensor:
    """ᾱ, the share of the frame's variance that is kept at a noise level 0 … 1 (cosine schedule, arXiv 2102.09672)."""
    return torch.cos(level * math.pi / 2).square().clamp(LEAST_KEPT, 1.0)


def noised(frames: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """√ᾱ · frames + √(1 − ᾱ) · noise; frames and noise [B, F, 3, S, S], level [B]."""
    share = kept(level)[:, None, None, None, None]
    return share.sqrt() * frames + (1 - share).sqrt() * noise


def conditional_errors(
    model: DreamModel, past: Tensor, new: Tensor, action: Tensor, noise: Tensor, level: Tensor
) -> Tensor:
    """Slow learning: ‖ε − ε_Φ‖² of the new frames, given the clean past and the action.

    Args:
        past: float [B, P, 3, S, S] in −1 … 1. new: float [B, N, 3, S, S].
        action: what moves the camera into each frame, past and new, int64 [B, P + N].
        noise: like `new`. level: float [B].

    Returns:
        The mean over the new frames' pixels of each sample, float32 [B]. The past frames have no part in it.
    """
    before = past.shape[1]
    window = torch.cat([past, noised(new, noise, level)], dim=1)
    predicted = model(window, _levels_of(level, before, new.shape[1]), action)
    return (predicted[:, before:] - noise).square().flatten(1).mean(1)


def unconditional_errors(model: DreamModel, frames: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Fast learning: all frames [B, F, 3, S, S] noised at one level [B], no clean frame, no action; float32 [B]."""
    none = torch.full(frames.shape[:2], NO_ACTION, device=frames.device)
    predicted = model(noised(frames, noise, level), _levels_of(level, 0, frames.shape[1]), none)
    return (predicted - noise).square().flatten(1).mean(1)


def draw_noise(frames: Tensor, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise like `frames` [B, …] and levels [B], drawn on the CPU so that every device gets the same ones.

    The levels are spread evenly over the range: a random offset, equal steps and a random order, for less variance.
    """
    count = len(frames)
    noise = torch.randn(frames.shape, generator=numbers)
    spread = (torch.arange(count) / count + torch.rand(1, generator=numbers)) % 1.0
    level = LEAST_LEVEL + (1 - LEAST_LEVEL) * spread[torch.randperm(count, generator=numbers)]
    return noise.to(frames), level.to(frames)


@torch.no_grad()
def sample(
    model: DreamModel, past: Tensor, action: Tensor, new: int, numbers: torch.Generator, steps: int = 12
) -> Tensor:
    """The next frames, by DDIM without noise of its own (arXiv 2010.02502, η = 0).

    Args:
        past: clean frames, float [B, P, 3, S, S]. new: number of frames.
        action: what moves the camera into each frame, past and new, int64 [B, P + new].
        numbers: draws the initial noise, on the CPU. steps: model calls.

    Returns:
        float [B, new, 3, S, S] in −1 … 1.
    """
    batch, before = past.shape[:2]
    frames = torch.randn((batch, new, *past.shape[2:]), generator=numbers).to(past)
    times = torch.linspace(1, 0, steps + 1)
    for now, then in zip(times[:-1], times[1:], strict=True):
        levels = _levels_of(now.to(past).expand(batch), before, new)
        noise = model(torch.cat([past, frames], dim=1), levels, action)[:, before:]
        share, next_share = kept(now).item(), kept(then).item()
        clean = ((frames - math.sqrt(1 - share) * noise) / math.sqrt(share)).clamp(-1, 1)
        noise = (frames - math.sqrt(share) * clean) / math.sqrt(1 - share)
        frames = math.sqrt(next_share) * clean + math.sqrt(1 - next_share) * noise
    return frames


def _levels_of(level: Tensor, past: int, new: int) -> Tensor:
    """The level of each frame, [B, past + new]: 0 for the past."""
    return torch.cat([level.new_zeros(len(level), past), level[:, None].expand(-1, new)], dim=1)
