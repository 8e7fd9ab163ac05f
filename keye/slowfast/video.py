"""A video as a stream of sampled frames with true timestamps: files of any kind through PyAV, image folders, arrays.

Nothing here keeps frames: a clip is iterated once and what is kept of each frame is up to the reader, so memory does
not grow with the length of the file. Times are seconds from the start of the video stream, by presentation timestamp,
never index / average rate (wrong for variable frame rates).
"""

import io
import math
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
from av.video.frame import VideoFrame

from keye.errors import VideoError
from keye.slowfast.budget import thin
from keye.slowfast.image import IMAGE_SUFFIXES, load_image

Source = str | os.PathLike | bytes | BinaryIO | torch.Tensor | np.ndarray

_SMALL = 320 * 240  # pixels
_TOLERANCE = 1e-4  # seconds; containers round timestamps to their own time base


@dataclass(frozen=True)
class Frame:
    """`index` among the source's frames in presentation order, `time` in seconds, `pixels` uint8 [3, H, W]."""

    index: int
    time: float
    pixels: torch.Tensor


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
        yield _Decoder(container, _name(source), fps, max_frames).clip
    finally:
        container.close()


def read_frames_at(source: Source, times: Sequence[float]) -> list[Frame]:
    """The frames on the screen at the given ascending times (seconds) of a video file, for a handful of pictures."""
    container = _open_container(source)
    try:
        return list(_Decoder(container, _name(source), 1.0, 1).at(times))
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


class _Decoder:
    """Decodes one video stream in presentation order and picks the frames on the screen at the sample times."""

    def __init__(self, container: av.container.InputContainer, name: str, fps: float, max_frames: int):
        self.container, self.name = container, name
        self.stream = container.streams.video[0]
        # On small frames a pool of threads costs more than the decoding itself (2-3 times slower at 112x112).
        self.small = self.stream.codec_context.width * self.stream.codec_context.height <= _SMALL
        if self.small:
            self.stream.codec_context.thread_count = 1
        else:
            self.stream.thread_type = "AUTO"
        self.reformatter = av.video.reformatter.VideoReformatter()
        self.rate = float(self.stream.average_rate or self.stream.guessed_rate or 0) or 25.0
        self.broken = 0
        duration = self._duration()
        self._decoded = self._decode()
        try:
            first = next(self._decoded)
        except StopIteration:
            raise VideoError(f"no frame of {name} can be decoded; replace it or encode it again") from None
        self._first = first
        turned = first[2].rotation % 180 != 0
        self.size = (first[2].width, first[2].height) if turned else (first[2].height, first[2].width)
        wanted = max(1, math.ceil(duration * min(fps, self.rate) - _TOLERANCE))
        times = _sample_times(duration, min(fps, self.rate), min(wanted, max_frames), wanted)
        self.clip = Clip(name, self.size, duration, len(times), wanted, iter(()), [])
        self.clip.frames = self._sampled(times, duration)

    def _duration(self) -> float:
        """Seconds, by the stream, else by the timestamps of its packets, else by the container."""
        stream = self.stream
        if stream.duration:
            return float(stream.duration * stream.time_base)
        if self.container.duration and self.container.format.name not in ("gif", "image2"):
            start = max(self.container.start_time or 0, 0)
            return max(self.container.duration - start, 0) / av.time_base
        ends = []
        try:
            for packet in self.container.demux(stream):
                if packet.pts is not None:
                    ends.append(packet.pts + (packet.duration or 0))
            self.container.seek(0)
        except av.error.FFmpegError:  # a damaged index: what was read before it is all that is known
            self.broken += 1
        return float((max(ends) - (stream.start_time or 0)) * stream.time_base) if ends else 0.0

    def _decode(self) -> Iterator[tuple[int, float, VideoFrame]]:
        """Every frame that can be decoded: (index, seconds from the first frame's clock, frame)."""
        start: float | None = None
        index = 0
        latest = -1 / self.rate
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
                frames = packet.decode()
            except (StopIteration, EOFError):
                return
            except av.error.FFmpegError:
                self.broken += 1
                if self.broken > 10_000:  # a demuxer that never gets past a broken place
                    return
                continue
            for frame in frames:
                self.broken += bool(frame.is_corrupt)
                time = frame.time if frame.time is not None else latest + 1 / self.rate + (start or 0.0)
                start = time if start is None else start
                if time - start <= latest:  # a clock that stands still or jumps back: go on at the stream's rate
                    time = start + latest + 1 / self.rate
                latest = time - start
                yield index, latest, frame
                index += 1

    def at(self, times: Sequence[float]) -> Iterator[Frame]:
        """The frame on the screen at each of the ascending times, none twice; stops decoding after the last."""
        held: tuple[int, float, VideoFrame] | None = self._first
        wanted = 0
        for following in self._decoded:
            showing = wanted
            while wanted < len(times) and times[wanted] < following[1] - _TOLERANCE:
                wanted += 1
            if wanted > showing:
                yield self._frame(held)
            held = following
            if wanted == len(times):
                return
        self._end = held[1] + (float(held[2].duration * held[2].time_base) if held[2].duration else 1 / self.rate)
        if wanted < len(times) and times[wanted] < max(self._end, held[1] + _TOLERANCE):
            yield self._frame(held)

    def _sampled(self, times: Sequence[float], duration: float) -> Iterator[Frame]:
        self._end: float | None = None
        yield from self.at(times)
        if self.broken:
            self.clip.warnings.append(f"{self.broken} damaged pieces of {self.name} could not be decoded")
        if self._end is not None and self._end < times[-1]:
            self.clip.warnings.append(
                f"{self.name} ends at {self._end:.2f} s of the {duration:.2f} s it claims to last"
            )
            self.clip.duration = self._end
        elif self._end is not None:
            self.clip.duration = max(duration, self._end)

    def _frame(self, decoded: tuple[int, float, VideoFrame]) -> Frame:
        index, time, frame = decoded
        turns = round(frame.rotation / 90) % 4
        height, width = self.size if turns % 2 == 0 else self.size[::-1]
        threads = 1 if self.small else None
        pixels = self.reformatter.reformat(frame, width, height, "rgb24", threads=threads).to_ndarray()
        if turns:
            pixels = np.ascontiguousarray(np.rot90(pixels, turns))
        return Frame(index, time, torch.from_numpy(pixels).permute(2, 0, 1))


def _sample_times(duration: float, fps: float, count: int, wanted: int) -> list[float]:
    """`count` sample times in seconds: i / fps where all that are wanted may be had, else evenly over the clip."""
    step = 1 / fps if count == wanted else duration / count
    return [index * step for index in range(count)]


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
