"""Operations of the mixer, from the sizes alone; a multiplication and an addition count as two."""

from collections import Counter
from collections.abc import Iterable

from keye.hyperzzw.mixer import BRANCHES, HIDDEN, LAYERS, LOCAL_HIDDEN, SIDE


def mixer_operations(width: int, frames: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Operations of one `HyperZZWMixer` over frames of (height, width) patches in one call.

    Returns:
        linear: products with weights. They grow with the patches, but for the kernels of slow networks, which are made
        once for each size of frame, and those that depend on a frame, once for each frame.
        quadratic: products of activations with activations: the global product, which takes N · W operations in each
        channel, and the resampled rows of frames that are not square.
    """
    sizes = Counter(frames)
    patches = sum(height * wide * count for (height, wide), count in sizes.items())
    linear = patches * (1 + BRANCHES) * width * width + patches * SIDE**2 * width
    linear += _slow(width, 1, LOCAL_HIDDEN, 1) if sizes else 0
    quadratic = 0
    for (height, wide), count in sizes.items():
        linear += _slow(height * wide, 2, HIDDEN, width) + _slow(height * wide, 2, HIDDEN, 1)
        quadratic += count * width * height * wide * wide
        quadratic += count * width * wide * height * wide if height != wide else 0
    cells = SIDE**2 * sum(sizes.values())
    linear += cells * LOCAL_HIDDEN * (2 * width + (1 + 2 * LAYERS) * LOCAL_HIDDEN)
    return 2 * linear, 2 * quadratic


def _slow(points: int, axes: int, hidden: int, channels: int) -> int:
    """Multiplications of a slow network."""
    return points * hidden * ((LAYERS + 1) * axes + LAYERS * hidden + channels)
