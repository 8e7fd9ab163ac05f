"""From drawn frames to real files: H.264 in MP4 through PyAV, PNG through Pillow.

The files of the world do not depend on their content as long as they are not decoded: key frames at fixed positions, no
reordering, packets padded to one size (`uniform`), and uncompressed PNG.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

from keye.files import atomic_file

STEP = 1024
"""Bytes; the size of a padded packet is a multiple."""
_UNIFORM = {"sc_threshold": "0", "bf": "0"}


def write_mp4(path: Path, frames: Iterable[np.ndarray], fps: int, crf: int = 18, uniform: bool = False) -> None:
    """Encode frames as H.264 (libx264, yuv420p) with one encoder thread: the same frames give the same bytes.

    The file is written atomically and has no dates in its header.

    Args:
        path: file to write.
        frames: [H, W, 3] uint8 RGB, all of one even size.
        fps: frames per second.
        crf: constant rate factor of libx264.
        uniform: pad all packets to one size, with key frames at fixed positions and no reordering. All packets are kept
            in memory until the end.
    """
    with atomic_file(path) as part, av.open(str(part), "w", format="mp4") as container:
        options = {"preset": "superfast", "crf": str(crf)} | (_UNIFORM if uniform else {})
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.codec_context.thread_count = 1
        stream.pix_fmt = "yuv420p"
        packets = _encode(stream, frames)
        for packet in _padded(list(packets)) if uniform else packets:
            container.mux(packet)


def _encode(stream: av.VideoStream, frames: Iterable[np.ndarray]) -> Iterator[av.Packet]:
    for index, pixels in enumerate(frames):
        if index == 0:
            stream.height, stream.width = pixels.shape[:2]
        yield from stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
    yield from stream.encode()


def _padded(packets: list[av.Packet]) -> Iterator[av.Packet]:
    """The packets, all padded to the smallest multiple of `STEP` bytes that fits the largest."""
    size = -(-(max(map(_stored, packets)) + 6) // STEP) * STEP
    return (_filled(packet, size) for packet in packets)


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
