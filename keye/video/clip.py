"""Sources of video as clips of sampled frames with true times: files, URLs, pictures, folders, arrays, lists.

No frames are kept here, so memory does not grow with the length of a clip. Times are seconds on the container's clock,
by presentation timestamp; index / average rate would be wrong for variable frame rates.
"""

import io
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image

from keye.checks import integer, rate, seconds
from keye.errors import VideoError
from keye.video.arrays import FrameArray, is_clip
from keye.video.decoding.containers import open_container
from keye.video.decoding.decoder import Decoder, Frame
from keye.video.decoding.packet_facts import PacketFacts
from keye.video.decoding.prefetch import check_ending, reading
from keye.video.decoding.timeline import TOLERANCE
from keye.video.fetch import UrlRules, data_bytes, download, file_path, path_name, scheme_of, url_name
from keye.video.frame_objects import captured, is_batch, is_capture, time_of, unwrapped
from keye.video.images import load_image, open_image, reason
from keye.video.stills import Moving, Pictures, Spool, Stills, clock_of, image_paths, moves

Source = (
    str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | torch.Tensor | np.ndarray | Image.Image | Iterable
)

_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6", b"\0\0\0\x0cjP  ")
_STREAMS_OF_JPEGS = {".mjpg", ".mjpeg"}


class Reader(Protocol):
    """An opened source that can be read any number of times. See `Clip` for the attributes."""

    size: tuple[int, int]
    duration: float
    expected: int
    wanted: int
    warnings: list[str]

    def frames(self) -> Iterator[Frame]: ...

    def frames_at(self, times: Sequence[float]) -> Iterator[Frame]: ...


class Clip:
    """An opened source. Each iteration reads it and yields the sampled frames.

    name: its name in messages. size: (height, width) in pixels as displayed. duration: end of the last frame in seconds
    (of a damaged file, once it has been read, of the last frame that can be decoded). expected: most frames of an
    iteration. wanted: number of samples before `max_frames` applies. warnings: problems of the source, complete once it
    has been read.
    """

    def __init__(self, name: str, reader: Reader):
        self.name, self._reader = name, reader
        self._kept: list[float] | None = None

    def packets(self) -> tuple[PacketFacts, np.ndarray] | None:
        """What a file's packets say about its frames, and int64 [T], which of them are sampled; nothing is decoded.

        None where the source has no packets, or they do not determine its frames.
        """
        return self._reader.packets() if isinstance(self._reader, Decoder) else None

    def keep(self, places: Sequence[int]) -> None:
        """Use only the sampled frames at ascending `places` from now on; for clips with `packets`.

        An iteration then yields exactly these frames. Instead of one that is damaged it yields the frame that is
        displayed at its time.
        """
        self._kept = self._reader.keep(places)

    def __iter__(self) -> Iterator[Frame]:
        frame = None
        frames = self._reader.frames()
        for frame in frames if self._kept is None else _displayed(frames, self._kept):
            check_ending()
            yield frame
        if frame is None:  # the file is damaged from its beginning, or before the requested range
            why = "; ".join(self.warnings) or "none can be decoded"
            raise VideoError(f"no frame of {self.name} can be used ({why}); give another range or another file")

    @property
    def size(self) -> tuple[int, int]:
        return self._reader.size

    @property
    def duration(self) -> float:
        return self._reader.duration

    @property
    def expected(self) -> int:
        return self._reader.expected

    @property
    def wanted(self) -> int:
        return self._reader.wanted

    @property
    def warnings(self) -> list[str]:
        return self._reader.warnings


def _displayed(frames: Iterator[Frame], times: Sequence[float]) -> Iterator[Frame]:
    """The one of ascending frames that is displayed at each of the ascending times, or else the first one."""
    current, following = None, next(frames, None)
    for time in times:
        while following is not None and (current is None or following.time <= time + TOLERANCE):
            current, following = following, next(frames, None)
        if current is None:
            return
        yield current
    for _ in frames:  # the end of a pass completes the warnings
        pass


@contextmanager
def open_clip(
    source: Source,
    fps: float,
    max_frames: int,
    *,
    timestamps: Sequence[float] | torch.Tensor | None = None,
    source_fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    num_frames: int | None = None,
    urls: UrlRules | None = None,
    lazy: bool = False,
) -> Iterator[Clip]:
    """Open a source for sampling at `fps` frames per second, at most `max_frames` frames spread evenly.

    A source is one of:
    - A video or animation (GIF, WebP, …) as a path, a `file:` or `data:` URL, bytes, or a binary file object, which is
      read from its beginning. At each time i / fps after the first frame, the displayed frame is sampled, each frame at
      most once. Times are the container's: a stream that begins later than its sound has a first time above 0. MPEG
      transport and program streams count from the beginning of the file; where recordings are joined, each continues
      at the end of the one before.
    - Pictures without a clock: a still (also a PIL image or an array [3, H, W]), a folder of images in natural order,
      frames [T, 3, H, W] or [T, H, W, 3] (see `keye.video.arrays`), a list or iterator of pictures (PIL images, arrays,
      paths). With `source_fps` they are sampled like a video; with `timestamps` every frame is used; with neither,
      every frame is used, 1 / fps apart, with a warning.
    - Objects of other libraries: frames of PyAV and torchcodec and pairs (seconds, picture), in lists or iterators, a
      FrameBatch of torchcodec and a `cv2.VideoCapture`, sampled by their own times; {"path", "bytes"} of `datasets`.

    Args:
        source: see above.
        fps: frames sampled per second.
        max_frames: most frames.
        timestamps: ascending seconds, one for each picture.
        source_fps: frames per second of the pictures.
        start, end: use only [start, end) in seconds, beginning with the frame displayed at `start`.
        num_frames: sample this many frames, spread evenly over that range, instead of `fps` or every frame.
        urls: what may be downloaded; None refuses `http(s):` URLs.
        lazy: decode nothing before the first iteration where the packets allow that, so that it raises the error of a
            file without a frame that can be decoded.

    Raises:
        VideoError: the source cannot be read, or an argument is impossible.
    """
    _check_request(fps, max_frames, source_fps, start, end, num_frames)
    with reading(), ExitStack() as stack:
        sampling = (fps, max_frames, start, end, num_frames)
        yield _open(source, sampling, timestamps, source_fps, urls, stack, lazy)


def read_frames_at(source: Source, times: Sequence[float], *, urls: UrlRules | None = None) -> list[Frame]:
    """The frames of a source that are displayed at the given ascending times (seconds)."""
    with reading(), ExitStack() as stack:
        clip = _open(source, (1.0, 1, None, None, None), None, None, urls, stack)
        return list(clip._reader.frames_at(times))


def _check_request(
    fps: float,
    max_frames: int,
    source_fps: float | None,
    start: float | None,
    end: float | None,
    num_frames: int | None,
) -> None:
    for key, value in (("fps", fps), ("source_fps", source_fps)):
        if value is not None:
            rate(key, value, error=VideoError)
    for key, value in (("max_frames", max_frames), ("num_frames", num_frames)):
        if value is not None:
            integer(key, value, error=VideoError)
    for key, value in (("start", start), ("end", end)):
        if value is not None:
            seconds(key, value, error=VideoError)
    if end is not None and (start or 0) >= end:
        raise VideoError(f"start={start or 0:g} is not before end={end:g}; give start < end")


def _open(
    source: Source,
    sampling: tuple[float, int, float | None, float | None, int | None],
    timestamps: Sequence[float] | torch.Tensor | None,
    source_fps: float | None,
    urls: UrlRules | None,
    stack: ExitStack,
    lazy: bool = False,
) -> Clip:
    """The clip of a source; `stack` closes and deletes what was opened for it.

    sampling: (fps, max_frames, start, end, num_frames).
    """
    fps, _, start, _, num_frames = sampling
    every = timestamps is not None or num_frames is not None
    spooling = (None if timestamps is not None else source_fps, None if every else fps, start)
    name, opened = _resolve(unwrapped(source), urls, stack, spooling)
    if not isinstance(opened, Sequence):
        picture = _picture(name, opened)
        if picture is not None and picture is not opened:
            stack.enter_context(picture)
        if picture is not None and not moves(picture):
            opened = [load_image(opened)]
        elif timestamps is not None or source_fps is not None:
            raise VideoError(f"{name} has its own clock; give timestamps and source_fps with folders or arrays")
        elif picture is not None:
            reused = nullcontext(picture) if picture is opened else None
            return Clip(name, Moving(name, lambda: reused or _picture(name, opened), *sampling))
        else:
            decoder = Decoder(open_container(opened, name), name, *sampling, lazy=lazy)
            stack.callback(decoder.close)
            return Clip(name, decoder)
    return Clip(name, Stills(name, opened, clock_of(name, opened, fps, timestamps, source_fps), *sampling[1:]))


def _resolve(
    source: Source, urls: UrlRules | None, stack: ExitStack, spooling: tuple[float | None, float | None, float | None]
) -> tuple[str, Sequence[torch.Tensor] | Path | BinaryIO | Image.Image]:
    """(the source's name, its pictures | its file's path | a seekable file | an opened picture)"""
    if isinstance(source, torch.Tensor | np.ndarray):
        return "frames", FrameArray(source) if is_clip(source) else [load_image(source)]
    if is_batch(source):
        times, lasts = (torch.as_tensor(part).tolist() for part in (source.pts_seconds, source.duration_seconds))
        return "frames", FrameArray(source.data, times, lasts[-1] if lasts else None)
    if isinstance(source, Image.Image):
        return "the image", source
    scheme = scheme_of(source)
    if scheme == "data":
        return url_name(source), io.BytesIO(data_bytes(source))
    if scheme not in (None, "file"):
        return url_name(source), stack.enter_context(download(source, urls))
    if isinstance(source, str | os.PathLike):
        if not os.fspath(source):  # Path("") is the working directory, and its pictures would be a video
            raise VideoError("a video names no file; give a path, a URL or bytes")
        return _resolve_path(path_name(source), file_path(source) if scheme else Path(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{memoryview(source).nbytes} bytes", io.BytesIO(source)
    if is_capture(source):
        return _spooled("the cv2.VideoCapture", captured(source), urls, stack, spooling)
    if hasattr(source, "read"):
        name = getattr(source, "name", None)
        name = path_name(name) if isinstance(name, str) else "file object"
        return name, _seekable(source, name, stack)
    if time_of(source) is not None:
        return "the frame", [load_image(source)]
    if not isinstance(source, Iterable) or isinstance(source, Mapping | Set):
        kind = type(source).__name__
        raise VideoError(f"the video is a {kind}; give a path, bytes, a file, uint8 frames or a list of pictures")
    if not isinstance(source, Sequence):
        return _spooled("an iterator of pictures", source, urls, stack, spooling)
    name = f"a list of {len(source)} pictures"
    if not len(source):
        raise VideoError(f"{name} has no picture; give one or more")
    return name, Pictures(name, source, urls)


def _spooled(
    name: str,
    frames: Iterable[object],
    urls: UrlRules | None,
    stack: ExitStack,
    spooling: tuple[float | None, float | None, float | None],
) -> tuple[str, Spool]:
    """Frames that can be read once, in a temporary file; spooling: (source_fps, fps, begin) of `Spool`."""
    pictures = Spool(name, frames, urls, stack.enter_context(tempfile.TemporaryFile(prefix="keye-")), *spooling)
    if not len(pictures):
        raise VideoError(f"{name} has no picture; give one or more")
    return name, pictures


def _resolve_path(name: str, path: Path) -> tuple[str, Sequence[torch.Tensor] | Path]:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return name, Pictures(name, image_paths(path))
    except FileNotFoundError:
        raise VideoError(f"{name} does not exist; check the path") from None
    except (OSError, ValueError) as error:  # no permission, a name too long or with a zero byte
        raise VideoError(f"{name[:200]} cannot be read ({reason(error)}); check the path") from error
    if not stat.S_ISREG(mode):
        raise VideoError(f"{name} is not a regular file; open it and give the file object")
    return name, path


def _seekable(file: BinaryIO, name: str, stack: ExitStack) -> BinaryIO | Path:
    """The file at its beginning, or a temporary copy of a stream that cannot seek."""
    try:
        if getattr(file, "seekable", lambda: False)():
            file.seek(0)
            if isinstance(file.read(1), bytes):
                file.seek(0)
                return file
            raise TypeError
        copy = stack.enter_context(tempfile.NamedTemporaryFile(prefix="keye-"))
        shutil.copyfileobj(file, copy)
        copy.flush()
    except TypeError as error:
        raise VideoError(f'{name} is open in text mode; open it in binary mode, "rb"') from error
    except (OSError, ValueError) as error:
        raise VideoError(f"{name} cannot be read ({reason(error)}); open it again") from error
    return Path(copy.name)


def _picture(name: str, opened: Path | BinaryIO | Image.Image) -> Image.Image | None:
    """The file opened with Pillow; None if its first bytes are not those of a picture."""
    if isinstance(opened, Image.Image):
        return opened
    try:
        if isinstance(opened, Path):
            with open(opened, "rb") as file:
                head = file.read(16)
        else:
            opened.seek(0)
            head = opened.read(16)
            opened.seek(0)
    except (OSError, ValueError) as error:
        raise VideoError(f"{name} cannot be read ({reason(error)}); check the file") from error
    streams = isinstance(opened, Path) and opened.suffix.lower() in _STREAMS_OF_JPEGS
    kinds = head.startswith(_PICTURES), head[:4] + head[8:12] == b"RIFFWEBP", head[4:12] in (b"ftypavif", b"ftypavis")
    return open_image(opened, name) if any(kinds) and not streams else None
