"""A video as a stream of sampled frames with true timestamps: files of any kind through PyAV, image folders, arrays.

Nothing here keeps frames: a clip is iterated once and what is kept of each frame is up to the reader, so memory does
not grow with the length of the file. Times are seconds from the start of the video stream, by presentation timestamp,
never index / average rate (wrong for variable frame rates).
"""

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch

from keye.errors import VideoError
from keye.slowfast.budget import thin
from keye.slowfast.decode import Frame, open_decoder
from keye.slowfast.image import IMAGE_SUFFIXES, load_image

Source = str | os.PathLike | bytes | BinaryIO | torch.Tensor | np.ndarray


@dataclass
class Clip:
    """An opened source, to be iterated once. `warnings` grows while the frames are read.

    name: what to call it; size: (height, width) after rotation; duration: seconds (of damaged files: what was decoded,
    once it has been read); expected: the most frames the iteration can yield; wanted: what the sampling rate asks for.
    """

    name: str
    size: tuple[int, int]
    duration: float
    expected: int
    wanted: int
    frames: Iterator[Frame]
    warnings: list[str]

    def __iter__(self) -> Iterator[Frame]:
        return self.frames


@contextmanager
def open_clip(
    source: Source,
    fps: float,
    max_frames: int,
    *,
    timestamps: Sequence[float] | torch.Tensor | None = None,
    source_fps: float | None = None,
) -> Iterator[Clip]:
    """Open a source for sampling at `fps` frames per second, evenly at most `max_frames` over the clip.

    source: a file's path, its bytes or a binary file object; a folder of images in natural order; or uint8 frames
    [T, 3, H, W]. Of folders and arrays every frame is used, at `timestamps` (seconds) or at `source_fps` frames per
    second (default: `fps`). Files are sampled at min(fps, their own rate): for each time i / fps the frame that is on
    the screen, so never the same frame twice. Raises VideoError when nothing can be read.
    """
    if isinstance(source, torch.Tensor | np.ndarray):
        pixels = _check_array(torch.as_tensor(source))
        yield _still_clip("frames", pixels, len(pixels), timestamps, source_fps or fps, max_frames)
        return
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        paths = _image_paths(Path(source))
        yield _still_clip(str(source), _Folder(paths), len(paths), timestamps, source_fps or fps, max_frames)
        return
    if timestamps is not None or source_fps is not None:
        raise VideoError(f"{_name(source)} has its own clock; give timestamps and source_fps with folders or arrays")
    container = _open_container(source)
    try:
        decoder = open_decoder(container, _name(source), fps, max_frames)
        container = decoder  # closes whichever container its latest pass reads
        clip = Clip(decoder.name, decoder.size, decoder.duration, decoder.expected, decoder.wanted, iter(()), [])

        def frames() -> Iterator[Frame]:
            yield from decoder.frames()
            clip.duration, clip.warnings[:] = decoder.duration, decoder.warnings

        clip.frames = frames()
        yield clip
    finally:
        container.close()


def read_frames_at(source: Source, times: Sequence[float]) -> list[Frame]:
    """The frames on the screen at the given ascending times (seconds) of a video file, for a handful of pictures."""
    container = _open_container(source)
    try:
        container = open_decoder(container, _name(source), 1.0, 1)
        return list(container.frames_at(times))
    finally:
        container.close()


def _name(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return str(source)
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    return str(getattr(source, "name", "file object"))


def _open_container(source: Source) -> av.container.InputContainer:
    name = _name(source)
    if isinstance(source, str | os.PathLike):
        if not Path(source).exists():
            raise VideoError(f"{name} does not exist; check the path")
        target: object = str(source)
    elif isinstance(source, bytes | bytearray | memoryview):
        target = io.BytesIO(source)
    elif hasattr(source, "read"):
        seekable = getattr(source, "seekable", lambda: False)()
        target = source if seekable else io.BytesIO(source.read())
    else:
        raise VideoError(f"a video cannot be a {type(source).__name__}; give a path, bytes, a file or uint8 frames")
    try:
        container = av.open(target, mode="r")
    except (av.error.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"{name} is not a readable video ({reason}); replace it or convert it to mp4") from error
    if not container.streams.video:
        container.close()
        raise VideoError(f"{name} has no video stream; give a file with pictures in it")
    if container.streams.video[0].codec_context is None:
        container.close()
        raise VideoError(f"{name} is coded in a way that no decoder here knows; convert it to mp4 with H.264")
    return container


def _check_array(frames: torch.Tensor) -> torch.Tensor:
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8 or 0 in frames.shape:
        found = f"{str(frames.dtype).removeprefix('torch.')} {list(frames.shape)}"
        raise VideoError(f"frames must be uint8 [T, 3, H, W] with T >= 1, not {found}; permute or convert them")
    return frames


class _Folder(Sequence):
    """A folder's images, loaded one at a time."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.size = tuple(load_image(paths[0]).shape[1:])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels = load_image(self.paths[index])
        if tuple(pixels.shape[1:]) != self.size:
            sizes = f"{pixels.shape[2]}x{pixels.shape[1]} pixels and the first {self.size[1]}x{self.size[0]}"
            raise VideoError(f"{self.paths[index]} has {sizes}; give a folder of images of one size")
        return pixels


def _image_paths(folder: Path) -> list[Path]:
    def natural(path: Path) -> list[int | str]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]

    paths = sorted((path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES), key=natural)
    if not paths:
        raise VideoError(f"{folder} holds no images; give a folder of {', '.join(sorted(IMAGE_SUFFIXES))} files")
    return paths


def _still_clip(
    name: str,
    pixels: Sequence[torch.Tensor] | torch.Tensor,
    count: int,
    timestamps: Sequence[float] | torch.Tensor | None,
    rate: float,
    max_frames: int,
) -> Clip:
    times = [index / rate for index in range(count)] if timestamps is None else [float(time) for time in timestamps]
    if len(times) != count:
        raise VideoError(f"{name} has {count} frames but {len(times)} timestamps; give one for each frame")
    if any(not later > earlier for earlier, later in zip(times, times[1:], strict=False)):
        raise VideoError(f"the timestamps of {name} do not ascend; sort the frames by time")
    kept = thin(count, max_frames)
    frames = (Frame(index, times[index], pixels[index]) for index in kept)
    size = pixels.size if isinstance(pixels, _Folder) else tuple(pixels.shape[2:])
    last = (times[-1] - times[-2]) if count > 1 else 1 / rate
    return Clip(name, size, times[-1] + last, len(kept), count, frames, [])
