"""Clips that no decoder plays: arrays, folders and lists of pictures, and moving pictures (GIF, WebP, PNG, AVIF).

Each is a reader: `size`, `duration`, `expected`, `wanted` and `warnings` as in `Clip`, `frames()` a new pass over the
sampled frames, `frames_at(times)` the frames on the screen at given times. Pictures are loaded one at a time.
"""

import bisect
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from keye.errors import VideoError
from keye.slowfast.budget import thin
from keye.slowfast.decode import Frame
from keye.slowfast.fetch import UrlRules, scheme_of, url_name
from keye.slowfast.image import IMAGE_SUFFIXES, load_image, reason, rgb

_TOLERANCE = 1e-4  # seconds
_MOVING = {"GIF", "WEBP", "PNG", "AVIF"}  # formats whose further frames are later ones, not pages or previews


class Stills:
    """Every picture of a sequence is a frame, unless num_frames or max_frames say less; [start, end) in seconds."""

    def __init__(
        self,
        name: str,
        pictures: Sequence[torch.Tensor],
        times: Sequence[float],
        last: float,
        max_frames: int,
        start: float | None = None,
        end: float | None = None,
        num_frames: int | None = None,
    ):
        """times: ascending seconds, one for each picture; last: seconds that the last one stays on the screen."""
        self.pictures, self.times = pictures, list(times)
        self.warnings: list[str] = []
        self.duration = self.times[-1] + last
        first, stop = 0, len(self.times)
        if start is not None:  # the frame on the screen then is the first, as in a video
            _check_start(name, start, self.duration)
            first = _showing(self.times, start)
        if end is not None:
            stop = max(bisect.bisect_left(self.times, end - _TOLERANCE), first + 1)
        self.wanted = stop - first if num_frames is None else min(num_frames, stop - first)
        self.expected = min(self.wanted, max_frames)
        self._chosen = [first + index for index in thin(stop - first, self.expected)]
        self.size = tuple(pictures[self._chosen[0]].shape[1:])

    def frames(self) -> Iterator[Frame]:
        """The chosen pictures; each call is a new pass."""
        return (Frame(index, self.times[index], self.pictures[index]) for index in self._chosen)

    def frames_at(self, times: Sequence[float]) -> Iterator[Frame]:
        """The picture on the screen at each of the ascending times, none twice."""
        chosen = dict.fromkeys(_showing(self.times, time) for time in times)
        return (Frame(index, self.times[index], self.pictures[index]) for index in chosen)


def clock(
    name: str, count: int, timestamps: Sequence[float] | torch.Tensor | None, rate: float
) -> tuple[list[float], float]:
    """(ascending seconds of `count` frames, seconds the last one lasts), by timestamps or at `rate` per second."""
    if timestamps is None:
        return [index / rate for index in range(count)], 1 / rate
    times = [float(time) for time in timestamps]
    if len(times) != count:
        raise VideoError(f"{name} has {count} frames but {len(times)} timestamps; give one for each frame")
    if not all(map(math.isfinite, times)) or any(not b > a for a, b in zip(times, times[1:], strict=False)):
        raise VideoError(f"the timestamps of {name} do not ascend; sort the frames by time")
    return times, times[-1] - times[-2] if count > 1 else 1 / rate


def _showing(times: Sequence[float], time: float) -> int:
    return max(bisect.bisect_right(times, time + _TOLERANCE) - 1, 0)


def _check_start(name: str, start: float, duration: float) -> None:
    if start >= duration:
        raise VideoError(f"{name} lasts {duration:.2f} s; give a start before {start:g} s")


class Values(Sequence):
    """Frames uint8 [T, 3, H, W] or [T, H, W, 3], numpy (of which one at a time is copied) or torch."""

    def __init__(self, values: torch.Tensor | np.ndarray):
        shape, kind = list(values.shape), str(values.dtype).removeprefix("torch.")
        fits = len(shape) == 4 and 3 in (shape[1], shape[3])
        if not fits or kind != "uint8" or 0 in shape:
            raise VideoError(
                f"frames must be uint8 [T, 3, H, W] or [T, H, W, 3] with T >= 1, not {kind} {shape}; permute or convert"
                " them"
            )
        self.values, self.last = values, shape[1] != 3

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> torch.Tensor:
        frame = self.values[index]
        frame = torch.from_numpy(np.array(frame)) if isinstance(frame, np.ndarray) else frame
        return frame.permute(2, 0, 1) if self.last else frame


class Pictures(Sequence):
    """A list of pictures (paths, PIL images, arrays, …), loaded one at a time; all must have the size of the first."""

    def __init__(self, name: str, sources: Sequence[object], urls: UrlRules | None = None):
        self.name, self.sources, self.urls = name, sources, urls
        self.size: torch.Size | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels = _load(self.sources[index], index, self.name, self.urls, self.size)
        self.size = pixels.shape[1:]
        return pixels


class Spool(Sequence):
    """Frames that come once (a generator's), kept on disk so that they can be read again without filling memory."""

    def __init__(self, name: str, frames: Iterable[object], urls: UrlRules | None, file: BinaryIO):
        self.file, self.count, self.shape = file, 0, torch.Size()
        for index, frame in enumerate(frames):
            pixels = _load(frame, index, name, urls, self.shape[1:] if index else None)
            self.count, self.shape = index + 1, pixels.shape
            file.write(pixels.contiguous().cpu().numpy())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        size = self.shape.numel()
        self.file.seek(index * size)
        return torch.frombuffer(bytearray(self.file.read(size)), dtype=torch.uint8).view(self.shape)


def _load(source: object, index: int, name: str, urls: UrlRules | None, size: torch.Size | None) -> torch.Tensor:
    """The picture, of the given (height, width) if any; errors name it."""
    called = str(source) if isinstance(source, str | os.PathLike) else f"frame {index} of {name}"
    called = url_name(called) if scheme_of(called) else called
    try:
        pixels = load_image(source, urls)
    except VideoError as error:
        raise error if called in str(error) else VideoError(f"{called}: {error}") from error
    if size is not None and pixels.shape[1:] != size:
        sizes = f"{pixels.shape[2]}x{pixels.shape[1]} pixels and the first {size[1]}x{size[0]}"
        raise VideoError(f"{called} has {sizes}; give images of one size")
    return pixels


def image_paths(folder: Path) -> list[Path]:
    """The images of a folder, "2" before "10"; hidden files left out."""

    def natural(path: Path) -> list[int | str]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]

    paths = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    if not paths:
        raise VideoError(f"{folder} holds no images; give a folder of {', '.join(sorted(IMAGE_SUFFIXES))} files")
    return sorted(paths, key=natural)


class Moving:
    """A moving picture file, sampled by its own clock like a video."""

    def __init__(
        self,
        name: str,
        opener: Callable[[], AbstractContextManager[Image.Image]],
        fps: float,
        max_frames: int,
        start: float | None = None,
        end: float | None = None,
        num_frames: int | None = None,
    ):
        """opener: gives the file opened with Pillow, once for every pass."""
        self.name, self.opener = name, opener
        self.warnings: list[str] = []
        self.times, self.size, at, shortest = [], (0, 0), 0.0, math.inf
        for picture in self._play(self.warnings):
            self.size = self.size if self.times else _turned_size(picture)
            self.times.append(at)
            delay = picture.info.get("duration", 0)
            delay = delay / 1000 if delay > 10 else 0.1  # as browsers play the delays that nobody means
            at, shortest = at + delay, min(shortest, delay)
        if not self.times:
            raise VideoError(f"{name} holds no picture that can be read; replace it or save it again")
        self.duration = at
        begin = start or 0.0
        _check_start(name, begin, at)
        length = min(at if end is None else end, at) - begin
        rate = min(fps, 1 / shortest)
        count = max(1, math.ceil(length * rate - _TOLERANCE)) if num_frames is None else num_frames
        self._chosen = self._shown(begin, 1 / rate if num_frames is None else length / count, count)
        self.wanted = len(self._chosen)
        if self.wanted > max_frames:
            self._chosen = self._shown(begin, length / max_frames, max_frames)
        self.expected = len(self._chosen)

    def _shown(self, begin: float, step: float, count: int) -> list[int]:
        """The frames on the screen at the times begin + i * step, i < count, none twice."""
        # Frame by frame, as a file of a few bytes can claim to last for years.
        firsts = [max(0, math.ceil((time - begin - _TOLERANCE) / step)) for time in self.times] + [count]
        return [index for index in range(len(self.times)) if firsts[index] < min(firsts[index + 1], count)]

    def frames(self) -> Iterator[Frame]:
        """The sampled frames; each call is a new pass over the file."""
        return self._pick(self._chosen)

    def frames_at(self, times: Sequence[float]) -> Iterator[Frame]:
        """The frame on the screen at each of the ascending times, none twice."""
        return self._pick([_showing(self.times, time) for time in times])

    def _pick(self, chosen: Sequence[int]) -> Iterator[Frame]:
        wanted = set(chosen)
        for index, picture in enumerate(self._play([])):
            if index in wanted:
                yield Frame(index, self.times[index], rgb(picture))
            if index >= max(wanted, default=0):
                return

    def _play(self, warnings: list[str]) -> Iterator[Image.Image]:
        """The file at each of its frames in turn; where it cannot be read on, a warning says so and it ends."""
        index = 0
        with self.opener() as picture:
            while True:
                try:
                    picture.seek(index)
                    picture.load()
                except EOFError:  # Pillow's word for the end
                    return
                except Exception as error:  # damaged files make the readers of single formats raise almost anything
                    warnings.append(f"{self.name} cannot be read beyond frame {index - 1} ({reason(error)})")
                    return
                yield picture
                index += 1


def moves(picture: Image.Image) -> bool:
    """Whether a file opened with Pillow is a moving picture."""
    try:
        return picture.format in _MOVING and getattr(picture, "is_animated", False)
    except Exception:  # the second frame is looked for, and damaged files make Pillow raise almost anything
        return False


def _turned_size(picture: Image.Image) -> tuple[int, int]:
    width, height = picture.size
    return (width, height) if picture.getexif().get(0x0112, 1) >= 5 else (height, width)
