"""From drawn frames to real files: H.264 in MP4 through PyAV, PNG through Pillow."""

from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
from PIL import Image


def write_mp4(path: Path, frames: Iterable[np.ndarray], fps: int, crf: int = 18) -> None:
    """Encode frames [H, W, 3] uint8 RGB of one even size as H.264 (libx264, yuv420p), `fps` frames a second.

    One encoder thread and no dates in the header: the same frames give the same bytes. The file appears under its
    name only when it is whole.
    """
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "superfast", "crf": str(crf)})
        stream.codec_context.thread_count = 1
        stream.pix_fmt = "yuv420p"
        for index, pixels in enumerate(frames):
            if index == 0:
                stream.height, stream.width = pixels.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    part.replace(path)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write one frame [H, W, 3] uint8 RGB."""
    Image.fromarray(pixels).save(path, format="PNG", compress_level=1)
