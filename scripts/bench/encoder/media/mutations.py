"""Small videos of many codecs and containers, and reproducible damage to them by seed and index."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from PIL import Image

from scripts.clips import ClipsMissing, fetch_clips

_RATE = 12
_FRAMES = 24
# name: (encoder, pixel format, its options, the container's options)
_MADE: dict[str, tuple[str, str, dict[str, str], dict[str, str]]] = {
    "h264.mp4": ("libx264", "yuv420p", {"bf": "3", "g": "8"}, {}),
    "h264_front.mp4": ("libx264", "yuv420p", {"g": "12"}, {"movflags": "faststart"}),
    "h264_fragments.mp4": ("libx264", "yuv420p", {"g": "6"}, {"movflags": "frag_keyframe+empty_moov"}),
    "h264.mkv": ("libx264", "yuv420p", {"bf": "2", "g": "12"}, {}),
    "h264.ts": ("libx264", "yuv420p", {"g": "12"}, {}),
    "h264.flv": ("libx264", "yuv420p", {"g": "12"}, {}),
    "h264_10bit.mkv": ("libx264", "yuv420p10le", {"g": "12"}, {}),
    "h264_interlaced.ts": ("libx264", "yuv420p", {"flags": "+ildct+ilme", "g": "12"}, {}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none:pools=1"}, {}),
    "vp8.webm": ("libvpx", "yuv420p", {"g": "12", "cpu-used": "8"}, {}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"g": "12", "cpu-used": "8"}, {}),
    "vp9_alpha.webm": ("libvpx-vp9", "yuva420p", {"g": "12", "cpu-used": "8"}, {}),
    "av1.mp4": ("libsvtav1", "yuv420p", {"preset": "12", "svtav1-params": "lp=1"}, {}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"g": "12", "bf": "2"}, {}),
    "mpeg4.mov": ("mpeg4", "yuv420p", {"g": "12"}, {}),
    "mpeg2.mpg": ("mpeg2video", "yuv420p", {"g": "12"}, {}),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {}, {}),
    "prores.mov": ("prores_ks", "yuva444p10le", {"profile": "4"}, {}),
    "ffv1.mkv": ("ffv1", "gray", {}, {}),
    "wmv2.asf": ("wmv2", "yuv420p", {"g": "12"}, {}),
    "theirs.nut": ("huffyuv", "rgb24", {}, {}),
    "animation.mov": ("qtrle", "argb", {}, {}),
}
_STILL = {"moving.gif": {}, "moving.webp": {"lossless": False}, "moving.png": {}}
_CUT = 2.0  # seconds kept of the real clips


def seed_files(folder: Path) -> list[Path]:
    """The undamaged files, made in `folder` unless they are there: small, and of every family a reader meets."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, recipe in _MADE.items():
        _once(folder / name, lambda part, recipe=recipe: _encode(part, *recipe))
    frames = [Image.fromarray(pixels) for pixels in _pictures()[:12]]
    for name, options in _STILL.items():
        save = {"save_all": True, "append_images": frames[1:], "duration": 80, **options}
        _once(folder / name, lambda part, save=save: frames[0].save(part, **save))
    try:
        for clip in fetch_clips():
            _once(folder / f"real_{clip.name}", lambda part, clip=clip: _cut(clip, part))
    except ClipsMissing as error:
        print(f"without the real clips: {error}")
    return sorted(path for path in folder.iterdir() if path.is_file())


def _once(path: Path, make: Callable[[Path], None]) -> None:
    if not path.exists():
        part = path.with_name(f"part_{path.name}")
        make(part)
        part.replace(path)


def _pictures() -> np.ndarray:
    """Frames [T, H, W, 3]: a square that moves over a gradient, and a cut in the middle."""
    rows, columns = np.mgrid[0:72, 0:96]
    frames = np.stack([np.stack([rows * 3, columns * 2, rows + columns + 4 * t], -1) % 256 for t in range(_FRAMES)])
    frames[_FRAMES // 2 :] = 255 - frames[_FRAMES // 2 :]
    for t in range(_FRAMES):
        frames[t, 20:36, 2 * t : 2 * t + 16] = 230
    return frames.astype(np.uint8)


@contextmanager
def kept_scheduling() -> Iterator[None]:
    """Give this thread back its scheduling: SVT-AV1 makes the thread that encodes a real-time one for a root user.

    Its later threads and processes would inherit that, and those of gloo that wait actively would starve all others.
    """
    if not hasattr(os, "sched_getscheduler"):  # not Linux
        yield
        return
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameter)


def _encode(path: Path, codec: str, pix_fmt: str, options: dict[str, str], muxing: dict[str, str]) -> None:
    with kept_scheduling(), av.open(str(path), "w", container_options=muxing) as container:
        stream = container.add_stream(codec, rate=_RATE)
        stream.width, stream.height, stream.pix_fmt = 96, 72, pix_fmt
        stream.options = {"threads": "1", **options}
        for pixels in _pictures():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt)))
        container.mux(stream.encode(None))


def _cut(clip: Path, path: Path) -> None:
    """The first seconds of a clip, its packets copied."""
    with av.open(str(clip)) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None and packet.dts * packet.time_base < _CUT:
                packet.stream = stream
                container.mux(packet)


def mutate(files: Sequence[bytes], seed: int, index: int) -> tuple[int, bytes, str]:
    """(which file, the file damaged in one to three ways, what was done) for an index; always the same."""
    rng = random.Random(f"{seed}/{index}")
    which = rng.randrange(len(files))
    content = bytearray(files[which])
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.choice(list(_DAMAGE))
        content = _DAMAGE[kind](content, rng, files) or content
        done.append(kind)
    return which, bytes(content), "+".join(done)


def _place(content: bytearray, rng: random.Random, most: int) -> slice:
    """A range of at most `most` bytes; one time in three near an end, where headers and indexes are."""
    length = rng.randint(1, max(1, min(most, len(content))))
    start = rng.randrange(max(1, len(content) - length))
    near = rng.randrange(min(2048, max(1, len(content) - length)))
    start = rng.choice((start,) * 5 + (near, near, max(0, len(content) - length - near)))
    return slice(start, start + length)


def _flip_bits(content: bytearray, rng: random.Random, files: Sequence[bytes]) -> None:
    for _ in range(rng.choice((1, 4, 16, 64))):
        at = _place(content, rng, 1).start
        if at < len(content):
            content[at] ^= 1 << rng.randrange(8)


def _set_number(content: bytearray, rng: random.Random, files: Sequence[bytes]) -> None:
    """A number that readers get wrong, where lengths and counts are."""
    for _ in range(rng.choice((1, 2, 8))):
        size = rng.choice((1, 2, 4, 8))
        value = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, rng.getrandbits(64)))
        at = _place(content, rng, size).start
        content[at : at + size] = value.to_bytes(8, rng.choice(("big", "little")))[:size]


def _truncate(content: bytearray, rng: random.Random, files: Sequence[bytes]) -> bytearray:
    return content[: rng.randrange(len(content) + 1)]


def _zero(content: bytearray, rng: random.Random, files: Sequence[bytes]) -> None:
    where = _place(content, rng, 4096)
    content[where] = bytes(len(content[where]))


def _noise(content: bytearray, rng: random.Random, files: Sequence[bytes]) -> None:
    where = _place(content, rng, 4096)
    content[where] = rng.randbytes(len(content[where]))


def _splice(content: bytearray, rng: random.Random, files: Sequence[bytes]) -> bytearray:
    """The beginning of one file and the rest of another."""
    other = rng.choice(files)
    header = rng.choice((8, 32, 64, 512, rng.randrange(4096)))
    return bytearray(other[:header]) + content[header:]


def _swap(content: bytearray, rng: random.Random, files: Sequence[bytes]) -> None:
    first, second = _place(content, rng, 2048), _place(content, rng, 2048)
    length = min(first.stop - first.start, second.stop - second.start)
    one, other = slice(first.start, first.start + length), slice(second.start, second.start + length)
    content[one], content[other] = content[other], content[one]


def _repeat(content: bytearray, rng: random.Random, files: Sequence[bytes]) -> bytearray:
    where = _place(content, rng, 4096)
    return content[: where.stop] + content[where] * rng.choice((1, 3, 20)) + content[where.stop :]


def _remove(content: bytearray, rng: random.Random, files: Sequence[bytes]) -> None:
    del content[_place(content, rng, 2048)]


_DAMAGE: dict[str, Callable[[bytearray, random.Random, Sequence[bytes]], bytearray | None]] = {
    "bits": _flip_bits,
    "numbers": _set_number,
    "truncated": _truncate,
    "zeros": _zero,
    "noise": _noise,
    "spliced": _splice,
    "swapped": _swap,
    "repeated": _repeat,
    "removed": _remove,
}
