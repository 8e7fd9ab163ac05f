"""A short drawn clip in memory and a chat about it, for tests of the complete model."""

import numpy as np


def clip(frames: int = 9, seed: int = 0) -> np.ndarray:
    """Frames uint8 `[frames, 112, 168, 3]`, three pictures one after the other."""
    pictures = np.random.default_rng(seed).integers(0, 255, (3, 4, 6, 3), dtype=np.uint8)
    return pictures.repeat(28, 1).repeat(28, 2)[np.arange(frames) * 3 // frames]


def chat(seed: int = 0, frames: int = 9, image: bool = False) -> list[dict]:
    """A question about a clip, after an image if `image`, and its answer."""
    media = [{"type": "video", "video": clip(frames, seed)}]
    if image:
        media.insert(0, {"type": "image", "image": clip(1, seed + 1)[0]})
    question = {"role": "user", "content": [*media, {"type": "text", "text": "Which colour?"}]}
    return [question, {"role": "assistant", "content": "red"}]
