"""Clips that are not decoded as video: arrays, folders and lists of pictures, and animations (GIF, WebP, PNG, AVIF).

`Stills` and `Moving` are readers: `size`, `duration`, `expected`, `wanted` and `warnings` as in `Clip`; `frames()` is a
new pass over the sampled frames; `frames_at(times)` gives the frames displayed at given times. Pictures are loaded one
at a time.
"""

import bisect
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from PIL import Image

from keye.errors import VideoError
from keye.slowfast.budget import thin
from keye.video.decoding.decoder import Frame
from keye.video.fetch import UrlRules, path_name, scheme_of, url_name
from keye.video.frame_objects import time_of
from keye.video.images import IMAGE_SUFFIXES, load_image, reason, rgb

_TOLERANCE = 1e-4  # seconds
_DENSE = 1.1  # times the requested rate; frames that were sampled before are rarely exactly at it
_ENDLESS = 1 << 62
_MOVING = {"GIF", "WEBP", "PNG", "AVIF"}  # formats whose further frames are later ones, not pages or previews


class Clock(NamedTuple):
    """When the pictures of a sequence are displayed.

    times: ascending seconds, one for each. last: seconds that the last one is displayed. rate: pictures per second to
    sample; None uses all. warning: a sentence about what was assumed.
    """

    times: list[float]
    last: float
    rate: float | None = None
    warning: str | None = None


class Stills:
    """Pictures of a sequence as frames: every one, or sampled by their clock like a video; [start, end) in seconds."""

    def __init__(
        self,
        name: str,
        pictures: Sequence[torch.Tensor],
        clock: Clock,
        max_frames: int,
        start: float | None = None,
        end: float | None = None,
        num_frames: int | None = None,
    ):
        self.pictures, self.times = pictures, clock.times
        self.warnings = [clock.warning] if clock.warning else []
        self.duration = self.times[-1] + clock.last
        first, stop = 0, len(self.times)
        if start is not None:  # the first frame is the one displayed at `start`, as in a video
            _check_start(name, start, self.duration)
            first = _displayed(self.times, start)
        if end is not None:
            stop = max(bisect.bisect_left(self.times, end - _TOLERANCE), first + 1)
        inside = range(first, stop)
        if clock.rate is None:
            self.wanted = len(inside) if num_frames is None else min(num_frames, len(inside))
            self._chosen = [first + index for index in thin(len(inside), min(self.wanted, max_frames))]
        else:
            begin = self.times[0] if start is None else start
            length = min(self.duration, math.inf if end is None else end) - begin
            times = self.times[first:stop]
            count = num_frames or max(1, math.ceil(length * clock.rate - _TOLERANCE))
            step = length / count if num_frames else 1 / clock.rate
            self._chosen = [first + index for index in shown(times, begin, step, count)]
            self.wanted = len(self._chosen)
            if self.wanted > max_frames:
                self._chosen = [first + index for index in shown(times, begin, length / max_frames, max_frames)]
        self.expected = len(self._chosen)
        self._indices = getattr(pictures, "indices", None) or range(len(self.times))
        self.size = tuple(pictures[self._chosen[0]].shape[1:])

    def frames(self) -> Iterator[Frame]:
        """The chosen pictures; each call is a new pass."""
        return (self._frame(index) for index in self._chosen)

    def frames_at(self, times: Sequence[float]) -> Iterator[Frame]:
        """The picture displayed at each of the ascending times, each picture once."""
        chosen = dict.fromkeys(_displayed(self.times, time) for time in times)
        return (self._frame(index) for index in chosen)

    def _frame(self, index: int) -> Frame:
        return Frame(self._indices[index], self.times[index], self.pictures[index])


def clock_of(
    name: str,
    pictures: Sequence[torch.Tensor],
    fps: float,
    timestamps: Sequence[float] | torch.Tensor | None,
    source_fps: float | None,
) -> Clock:
    """The clock of pictures: `timestamps` (every picture is used), `source_fps`, their own, or 1 / fps.

    By `source_fps` and by their own clock, pictures are sampled at `fps` if they are denser than that.
    """
    count, own = len(pictures), getattr(pictures, "times", None)
    if timestamps is not None:
        times = _ascending(name, _numbers(name, timestamps), count)
        return Clock(times, times[-1] - times[-2] if count > 1 else 1 / (source_fps or fps))
    if source_fps is not None and not isinstance(pictures, Spool):  # a Spool applies source_fps itself
        times = [index / source_fps for index in range(count)]
        return Clock(times, 1 / source_fps, fps if source_fps > fps else None)
    if own is not None:
        times = _ascending(name, own, count)
        last = pictures.last or (times[-1] - times[-2] if count > 1 else 1 / fps)
        dense = count > _DENSE * fps * (times[-1] + last - times[0]) + 1
        sampled = isinstance(pictures, Spool) and pictures.last is not None  # the rate is used for thinning only
        return Clock(times, last, fps if dense or sampled else None)
    assumed = f"{name} has no clock: its frames are assumed {1 / fps:.4g} s apart (fps={fps:g}); give source_fps"
    times = [index / fps for index in range(count)]
    return Clock(times, 1 / fps, None, f"{assumed} or timestamps" if count > 1 else None)


def _numbers(name: str, timestamps: Sequence[float] | torch.Tensor) -> list[float]:
    try:
        return [float(time) for time in timestamps]
    except (TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(timestamps).__name__}: {error}"
        raise VideoError(
            f"the timestamps of {name} are not numbers ({reason}); give the seconds of each frame"
        ) from error


def _ascending(name: str, times: Sequence[float], count: int) -> list[float]:
    if len(times) != count:
        raise VideoError(f"{name} has {count} frames but {len(times)} timestamps; give one for each frame")
    if not all(map(math.isfinite, times)) or any(not b > a for a, b in zip(times, times[1:], strict=False)):
        raise VideoError(f"the timestamps of {name} do not ascend; sort the frames by time")
    return list(times)


def shown(times: Sequence[float], begin: float, step: float, count: int) -> list[int]:
    """The frames displayed at the times begin + i * step, i < count, each frame once."""
    # A loop over frames, not over samples: a file of a few bytes can claim a duration of years.
    firsts = [max(0, math.ceil((time - begin - _TOLERANCE) / step)) for time in times] + [count]
    return [index for index in range(len(times)) if firsts[index] < min(firsts[index + 1], count)]


def _displayed(times: Sequence[float], time: float) -> int:
    return max(bisect.bisect_right(times, time + _TOLERANCE) - 1, 0)


def _check_start(name: str, start: float, duration: float) -> None:
    if start >= duration:
        raise VideoError(f"{name} lasts {duration:.2f} s; give a start before {start:g} s")


class Pictures(Sequence):
    """A list of pictures (paths, PIL images, arrays, …) of one size, loaded one at a time.

    times: seconds of each, where all of them have their own time.
    """

    last: float | None = None

    def __init__(self, name: str, sources: Sequence[object], urls: UrlRules | None = None):
        self.name, self.sources, self.urls = name, sources, urls
        self.size: torch.Size | None = None
        times = [time_of(source) for source in sources]
        self.times = times if None not in times else None

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels = _load(self.sources[index], index, self.name, self.urls, self.size)
        self.size = pixels.shape[1:]
        return pixels


class Spool(Sequence):
    """Frames of an iterator, kept in a file so that they can be read again without filling memory.

    Args:
        source_fps: rate of the frames; None takes the frames' own times.
        fps: keep only the frames displayed at begin + i / fps, if frames have times; None keeps all.
        begin: seconds; None takes the first frame's time.

    indices, times: of the frames kept; times is None where frames have none. last: seconds that the last frame kept is
    displayed.
    """

    def __init__(
        self,
        name: str,
        frames: Iterable[object],
        urls: UrlRules | None,
        file: BinaryIO,
        source_fps: float | None = None,
        fps: float | None = None,
        begin: float | None = None,
    ):
        self.name, self.file, self.urls = name, file, urls
        self.indices: list[int] = []
        self.shape = torch.Size()
        timed = ((time_of(frame) if source_fps is None else n / source_fps, frame) for n, frame in enumerate(frames))
        self.times, self.last = self._keep_all(timed) if fps is None else self._keep_sampled(timed, fps, begin)

    def _keep_all(self, timed: Iterable[tuple[float | None, object]]) -> tuple[list[float] | None, None]:
        times = []
        for index, (time, frame) in enumerate(timed):
            times.append(time)
            self._keep(index, frame)
        return (None if None in times else times), None

    def _keep_sampled(
        self, timed: Iterable[tuple[float | None, object]], fps: float, begin: float | None
    ) -> tuple[list[float] | None, float | None]:
        """Keep frames by their times; each is decided once the next frame's time, which ends it, is known."""
        timed = iter(timed)
        time, frame = next(timed, (None, None))
        if time is None:
            self._keep_all(chain([] if frame is None else [(None, frame)], timed))
            return None, None
        if not math.isfinite(time):
            raise VideoError(f"the time of frame 0 of {self.name} is {time}; give finite seconds")
        times, gap, begin, index = [], 1 / fps, time if begin is None else begin, 0
        for index, (until, following) in enumerate(timed, start=1):
            if until is None or not time < until < math.inf:  # also where it is NaN
                raise VideoError(f"frame {index} of {self.name} has no time or an earlier one; sort the frames by time")
            gap = until - time
            if shown([time, until], begin, 1 / fps, _ENDLESS)[0] == 0:
                times.append(time)
                self._keep(index - 1, frame)
            time, frame = until, following
        if not times or shown([time, time + gap], begin, 1 / fps, _ENDLESS)[0] == 0:
            times.append(time)
            self._keep(index, frame)
        return times, time + gap - times[-1]

    def _keep(self, index: int, frame: object) -> None:
        pixels = _load(frame, index, self.name, self.urls, self.shape[1:] if self.indices else None)
        self.shape = pixels.shape
        self.indices.append(index)
        self.file.write(pixels.contiguous().cpu().numpy())

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> torch.Tensor:
        size = self.shape.numel()
        self.file.seek(index * size)
        return torch.frombuffer(bytearray(self.file.read(size)), dtype=torch.uint8).view(self.shape)


def _load(source: object, index: int, name: str, urls: UrlRules | None, size: torch.Size | None) -> torch.Tensor:
    """Load a picture; its (height, width) must be `size` if given. Errors name the picture."""
    called = path_name(source) if isinstance(source, str | os.PathLike) else f"frame {index} of {name}"
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
    """The images of a folder in natural order ("2" before "10"), without hidden files."""

    def natural(path: Path) -> list[int | str]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]

    paths = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    if not paths:
        raise VideoError(
            f"{path_name(folder)} contains no images; give a folder of {', '.join(sorted(IMAGE_SUFFIXES))} files"
        )
    return sorted(paths, key=natural)


class Moving:
    """An animation, sampled by its own clock like a video."""

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
        """opener: opens the file with Pillow; called for every pass."""
        self.name, self.opener = name, opener
        self.warnings: list[str] = []
        self.times, self.size, at, shortest = [], (0, 0), 0.0, math.inf
        for picture in self._play(self.warnings):
            self.size = self.size if self.times else _turned_size(picture)
            self.times.append(at)
            delay = picture.info.get("duration", 0)
            delay = delay / 1000 if delay > 10 else 0.1  # as browsers do for delays of 10 ms or less
            at, shortest = at + delay, min(shortest, delay)
        if not self.times:
            raise VideoError(f"{name} contains no readable picture; replace it or save it again")
        self.duration = at
        begin = start or 0.0
        _check_start(name, begin, at)
        length = min(at if end is None else end, at) - begin
        rate = min(fps, 1 / shortest)
        count = max(1, math.ceil(length * rate - _TOLERANCE)) if num_frames is None else num_frames
        self._chosen = shown(self.times, begin, 1 / rate if num_frames is None else length / count, count)
        self.wanted = len(self._chosen)
        if self.wanted > max_frames:
            self._chosen = shown(self.times, begin, length / max_frames, max_frames)
        self.expected = len(self._chosen)

    def frames(self) -> Iterator[Frame]:
        """The sampled frames; each call is a new pass over the file."""
        return self._pick(self._chosen)

    def frames_at(self, times: Sequence[float]) -> Iterator[Frame]:
        """The frame displayed at each of the ascending times, each frame once."""
        return self._pick([_displayed(self.times, time) for time in times])

    def _pick(self, chosen: Sequence[int]) -> Iterator[Frame]:
        wanted = set(chosen)
        for index, picture in enumerate(self._play([])):
            if index in wanted:
                yield Frame(index, self.times[index], rgb(picture))
            if index >= max(wanted, default=0):
                return

    def _play(self, warnings: list[str]) -> Iterator[Image.Image]:
        """The opened file, positioned at one frame after the other; ends with a warning where it is damaged."""
        index = 0
        with self.opener() as picture:
            while True:
                try:
                    picture.seek(index)
                    picture.load()
                except EOFError:  # the end of the file
                    return
                except Exception as error:  # on damaged files, Pillow's readers raise almost any exception
                    warnings.append(f"{self.name} cannot be read beyond frame {index - 1} ({reason(error)})")
                    return
                yield picture
                index += 1


def moves(picture: Image.Image) -> bool:
    """Whether a file opened with Pillow is an animation."""
    try:
        return picture.format in _MOVING and getattr(picture, "is_animated", False)
    except Exception:  # Pillow reads ahead to the second frame, and raises almost any exception on damaged files
        return False


def _turned_size(picture: Image.Image) -> tuple[int, int]:
    width, height = picture.size
    return (width, height) if picture.getexif().get(0x0112, 1) >= 5 else (height, width)
