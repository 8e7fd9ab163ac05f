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
    linear += width * LOCAL_HIDDEN * (LAYERS * LOCAL_HIDDEN + 1) if sizes else 0  # one axis: no sums
    quadratic = 0
    for (height, wide), count in sizes.items():
        linear += height * wide * HIDDEN * (2 * (2 * (LAYERS + 1) + LAYERS * HIDDEN) + width + 1)
        quadratic += count * width * height * wide * wide
        quadratic += count * width * wide * height * wide if height != wide else 0
    # The local kernel: sines and the first layer are made once for each size, the code and the rest for each frame.
    of_size = 2 * (LAYERS + 1) + LOCAL_HIDDEN
    of_frame = 2 * width + 2 * LAYERS * LOCAL_HIDDEN
    linear += SIDE**2 * LOCAL_HIDDEN * (of_size * len(sizes) + of_frame * sum(sizes.values()))
    return 2 * linear, 2 * quadratic
