"""From drawn frames to real files: H.264 in MP4 through PyAV, PNG through Pillow.

The bytes of a file do not depend on its content as long as they are not decoded: key frames at fixed positions, no
reordering, packets padded to one size, and uncompressed PNG.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
from PIL import Image

STEP = 1024
"""Bytes; the packets of a file are padded to the smallest multiple that fits the largest of them."""
_OPTIONS = {"preset": "superfast", "sc_threshold": "0", "bf": "0"}


def write_mp4(path: Path, frames: Iterable[np.ndarray], fps: int, crf: int = 18) -> None:
    """Encode frames [H, W, 3] uint8 RGB of one even size as H.264 (libx264, yuv420p), `fps` frames a second.

    One encoder thread and no dates in the header: the same frames give the same bytes. The file is written atomically.
    """
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={**_OPTIONS, "crf": str(crf)})
        stream.codec_context.thread_count = 1
        stream.pix_fmt = "yuv420p"
        packets: list[av.Packet] = []
        for index, pixels in enumerate(frames):
            if index == 0:
                stream.height, stream.width = pixels.shape[:2]
            packets += stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
        packets += stream.encode()
        longest = max(map(_stored, packets))
        size = -(-(longest + 6) // STEP) * STEP
        for packet in packets:
            container.mux(_filled(packet, size))
    part.replace(path)


def _stored(packet: av.Packet) -> int:
    """Bytes of a packet in the file, where a length of four bytes replaces every start code of three."""
    return packet.size + len(re.findall(rb"(?<!\x00)\x00\x00\x01", bytes(packet)))


def _filled(packet: av.Packet, size: int) -> av.Packet:
    """The packet padded to `size` bytes by a filler NAL unit (type 12, ITU-T H.264 7.3.2.7), which decoders skip."""
    filler = b"\0\0\0\1\x0c" + b"\xff" * (size - _stored(packet) - 6) + b"\x80"
    filled = av.Packet(bytes(packet) + filler)
    filled.stream, filled.time_base, filled.is_keyframe = packet.stream, packet.time_base, packet.is_keyframe
    filled.pts, filled.dts, filled.duration = packet.pts, packet.dts, packet.duration
    return filled


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write one frame [H, W, 3] uint8 RGB as an uncompressed PNG: its size depends on H and W only."""
    Image.fromarray(pixels).save(path, format="PNG", compress_level=0)
