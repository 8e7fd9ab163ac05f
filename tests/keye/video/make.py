"""Small videos made for a test: what is in them is known exactly."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from scripts.bench.encoder.media.mutations import kept_scheduling


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    rate: int = 25,
    times_ms: Sequence[int] | None = None,
    rotation: int = 0,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
) -> Path:
    """Write frames [T, H, W, 3] uint8 at `rate`, or at the given times in milliseconds (variable frame rate)."""
    with kept_scheduling(), av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = pixel_format
        stream.options = options or {}
        if rotation:
            stream.set_display_rotation(rotation)
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index if times_ms is None else times_ms[index]
            frame.time_base = Fraction(1, rate) if times_ms is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbered(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frames [count, height, width, 3] whose grey level says which frame it is: 8 + 3 * (index % 80)."""
    levels = (8 + 3 * (np.arange(count) % 80)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def number_of(pixels) -> int:
    """The number that `numbered` drew, read back from uint8 [3, H, W]."""
    return round((float(pixels.float().mean()) - 8) / 3)
