"""The frames of one video file that are on the screen at the sample times, decoded with PyAV.

Where the packets of the file tell enough (`index`), only what the sampled frames depend on is decoded; the pixels,
times and indices are those of decoding everything, which is what is done once anything comes out otherwise than the
index says. Decoding runs in a thread, a few frames ahead of the reader. No more frames are held: memory does not grow
with the length of the file but for the index. Times are seconds on the container's clock (`timeline`), by presentation
timestamp, never index / average rate (wrong for variable frame rates).
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.video.frame import VideoFrame

from keye.errors import VideoError
from keye.video.decoding.bitstream import FLUSH
from keye.video.decoding.containers import reopen, video_stream
from keye.video.decoding.packet_index import Index, Plan, read_index
from keye.video.decoding.picture import FrameConverter
from keye.video.decoding.prefetch import Prefetcher
from keye.video.decoding.timeline import TOLERANCE, first_samples, origin_of, packets_of, scan

_SMALL = 320 * 240  # pixels
_AHEAD, _AHEAD_BYTES = 3, 64 << 20  # frames; and no more than so many bytes of them, but one
_FAR = 4 << 20  # bytes of packets from which on going to a place is cheaper than reading on to it
_SEEKABLE = {"mov", "matroska"}
_MOST_BROKEN = 10_000  # errors in one pass: a demuxer that never gets past a broken place


@dataclass(frozen=True)
class Frame:
    """`index` among the source's frames in presentation order, `time` in seconds, `pixels` uint8 [3, H, W]."""

    index: int
    time: float
    pixels: torch.Tensor


Decoded = tuple[int, float, VideoFrame]
"""(index, seconds, frame)"""


class _Unexpected(Exception):
    """What came out of the decoder, or out of the file, is not what the index says."""


def open_decoder(
    container: av.container.InputContainer,
    name: str,
    fps: float,
    max_frames: int,
    start: float | None = None,
    end: float | None = None,
    num_frames: int | None = None,
    as_coded: bool = False,
) -> "Decoder":
    """The decoder of a container's first video stream, called `name` in messages, sampled at `fps` frames per second.

    At most `max_frames` frames, evenly over the clip. start, end: only [start, end) seconds of the container's clock;
    num_frames: so many moments, evenly over that range, instead of `fps`. `close` it in the end, which closes the
    container. as_coded: pixels as they are in the file, square or not (`FrameConverter`). Raises VideoError when no
    frame can be decoded.
    """
    return Decoder(container, name, fps, max_frames, start, end, num_frames, as_coded)


def ahead_of(size: tuple[int, int]) -> int:
    """How many frames of a (height, width) are decoded ahead of their reader."""
    return max(1, min(_AHEAD, _AHEAD_BYTES // (3 * size[0] * size[1])))


class Decoder:
    """Picks the frames on the screen at the sample times of one video stream, in presentation order.

    size: (height, width) after turning. duration: seconds, when the last frame leaves the screen; of damaged files
    what was decoded, once it has been read. times: the moments at which a frame is first seen. expected: the most
    frames a pass yields; wanted: what the sampling asks for before `max_frames`. warnings: complete after a pass.
    """

    def __init__(
        self,
        container: av.container.InputContainer,
        name: str,
        fps: float,
        max_frames: int,
        start: float | None,
        end: float | None,
        num_frames: int | None,
        as_coded: bool = False,
    ):
        self.name = name
        self.warnings: list[str] = []
        self._ahead: Prefetcher[Frame] | None = None
        self._use(container)
        self.rate = float(self.stream.average_rate or self.stream.guessed_rate or 0) or 25.0
        self._index = read_index(container, self.stream, self.rate)
        self._moved = True  # whether the container has been read from
        if self._index is not None and self._index.uncertain:
            self._index = self._index.beginning_with(self._first_pts())
        self._read_clock()
        self._painter = FrameConverter(name, 1 if self._small else None, self.stream.sample_aspect_ratio, as_coded)
        begin = self._sample(fps, max_frames, start, end, num_frames)
        self._begun = self._begin(self.times)
        if self._begun is None:
            reason = f" ({self._reason})" if self._reason else ""
            place = f" after {begin:.2f} s" if begin > self._first else ""
            raise VideoError(f"no frame of {name}{place} can be decoded{reason}; replace it or encode it again")
        self.size = self._painter.size

    @property
    def appear(self) -> list[float]:
        """The seconds at which the stream's frames appear, ascending, as far as its packets tell."""
        return [] if self._appear is None else self._appear.tolist()

    @property
    def selective(self) -> bool:
        """Whether no more is decoded than the sampled frames need; it turns False when that has gone wrong."""
        return self._index is not None

    def frames(self) -> Iterator[Frame]:
        """The sampled frames; each call is a new pass over the file and ends the one before.

        At its end it sets `warnings`, and `duration` where the file is shorter than it claims.
        """
        yield from self._pass(self.times)
        self._finish()

    def frames_at(self, times: Sequence[float]) -> Iterator[Frame]:
        """The frame on the screen at each of the ascending times (seconds), none twice; a new pass."""
        self._begun = None
        return self._pass(times)

    def close(self) -> None:
        """End the pass that is running and close the container."""
        self._stop()
        self._begun = None
        self.container.close()

    def _use(self, container: av.container.InputContainer) -> None:
        self.container, self._moved = container, False
        self.stream = video_stream(container)
        # On small frames a pool of threads costs more than the decoding itself (2-3 times slower at 112x112).
        self._small = self.stream.codec_context.width * self.stream.codec_context.height <= _SMALL
        if self._small:
            self.stream.codec_context.thread_count = 1
        else:
            self.stream.thread_type = "AUTO"

    def _first_pts(self) -> int | None:
        """The timestamp of the first frame that comes out of the decoder."""
        self._rewind()
        try:
            return next(
                (frame.pts for packet in packets_of(self.container, self.stream) for frame in packet.decode()), None
            )
        except (FFmpegError, EOFError):
            return None

    def _rewind(self) -> None:
        """Be at the beginning of the file, with an empty decoder."""
        if self._moved and self._seekable():
            self.container.seek(int(self._index.dts[0]), stream=self.stream)
        elif self._moved:
            self._use(reopen(self.container, self.name))
        self._moved = True

    def _seekable(self) -> bool:
        """Whether a timestamp names one place in the file, and a seek finds it."""
        single = self._index is not None and len(self._index.timeline.parts) == 1
        return single and not _SEEKABLE.isdisjoint(self.container.format.name.split(","))

    def _read_clock(self) -> None:
        """The stream's clock, when frames appear on it as far as packets tell, and when it ends and claims to end."""
        if self._index is not None:
            self._timeline, self._appear = self._index.timeline, self._index.times
        else:
            self._rewind()
            self._timeline, self._appear = scan(self.container, self.stream, self.rate, _MOST_BROKEN)
        claimed = self._claim()
        torn = self._index is None or (
            len(self._index.pts) < self.stream.frames and claimed > self._index.end + 1 / self.rate
        )
        if self._timeline is not None:
            self.duration = self._timeline.end
        else:
            self.duration = claimed if self._appear is None else float(self._appear[-1]) + 1 / self.rate
        self._first = 0.0 if self._timeline is None else self._timeline.seconds(self._timeline.parts[0].low, 0)
        self._first = self._first if self._appear is None else float(self._appear[0])
        joined = self._timeline is not None and len(self._timeline.parts) > 1  # what is claimed is one part's
        self._claimed = claimed if torn and not joined else self.duration

    def _claim(self) -> float:
        """Seconds at which the stream ends by what the file says of itself; 0 if it says nothing."""
        stream, origin = self.stream, origin_of(self.container, self.stream)
        if stream.duration and stream.duration > 0:
            return float((stream.duration + (stream.start_time or origin) - origin) * stream.time_base)
        # The whole file's length is that of its pictures only where there is nothing else in it.
        alone = self._timeline is None or len(self.container.streams) == 1
        if self.container.duration and alone and self.container.format.name != "gif":
            return max(self.container.duration, 0) / av.time_base
        return 0.0

    def _sample(
        self, fps: float, max_frames: int, start: float | None, end: float | None, num_frames: int | None
    ) -> float:
        """Choose the moments to look at, each of which shows another frame; returns where the range begins."""
        begin = self._first if start is None else max(start, self._first)
        length = min(self.duration if end is None else end, self.duration) - begin
        if end is not None and end <= self._first:
            raise VideoError(f"{self.name} begins at {self._first:.2f} s; give an end after that")
        if length <= 0 and begin > self._first:
            raise VideoError(f"{self.name} lasts {self.duration:.2f} s; give a start and an end within it")
        if self._appear is None:  # frames without times are as far apart as the average rate says
            fps = min(fps, self.rate)
        count = max(1, math.ceil(length * fps - TOLERANCE)) if num_frames is None else num_frames
        step = 1 / fps if num_frames is None or length <= 0 else length / count
        samples = first_samples(self._appear, begin, step, count)
        self.wanted = len(samples)
        if self.wanted > max_frames:
            step = length / max_frames
            samples = first_samples(self._appear, begin, step, max_frames)
        self.expected = len(samples)
        self.times = (begin + step * samples).tolist()
        return begin

    def _begin(self, times: Sequence[float]) -> Iterator[Decoded] | None:
        """A pass that has its first frame; None where there is none."""
        self._halt = threading.Event()
        self._broken, self._reason = 0, ""
        self._end: float | None = None
        self._painter.notes.clear()
        decoded = self._decoded(times)
        first = next(decoded, None)
        if first is None:
            return None
        self._painter.size = self._painter.size or self._painter.measure(first[2])
        return chain([first], decoded)

    def _pass(self, times: Sequence[float]) -> Iterator[Frame]:
        self._stop()
        begun = self._begun or self._begin(times)
        self._begun = None
        if begun is None:
            return
        frames = (Frame(index, time, self._painter.paint(frame, time)) for index, time, frame in begun)
        del begun  # the thread's alone
        ahead = self._ahead = Prefetcher(frames, ahead_of(self.size), self._halt)
        try:
            yield from ahead
        finally:
            ahead.close()
        if self._ahead is not ahead:
            raise VideoError(f"another reading of {self.name} has begun; open it twice to read it twice at once")

    def _stop(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _finish(self) -> None:
        notes = list(self._painter.notes.values())
        if self._broken:
            notes.append(f"{self._broken} damaged pieces of {self.name} could not be decoded")
        jumps = self._timeline and self._timeline.note(self.name)
        notes += [jumps] if jumps else []
        if self._end is None and self.duration < self._claimed - 1.0:  # all that was asked for came before its end
            self._end = self.duration
        if self._end is not None and self._end < max(self.times[-1], self._claimed - 1.0):
            notes.append(f"{self.name} ends at {self._end:.2f} s of the {self._claimed:.2f} s it claims to last")
            self.duration = self._end
        elif self._end is not None:
            self.duration = max(self.duration, self._end)
        self.warnings[:] = notes

    def _decoded(self, times: Sequence[float]) -> Iterator[Decoded]:
        """The frame on the screen at each of the times: by the index, and by decoding everything once that fails."""
        count, given = 0, -1.0
        if self._index is not None:
            try:
                for decoded in self._planned(self._index, times):
                    count, given = decoded[0] + 1, decoded[1]
                    yield decoded
                self._end = self._index.end
                return
            except (_Unexpected, FFmpegError, EOFError):
                if self._halt.is_set():  # nothing is wrong with the file; nobody reads on
                    return
                self._index = None
        for number, time, frame in self._showing(times):
            if time > given:
                count = max(count, number)  # the index counted frames that do not exist
                yield count, time, frame
                count += 1

    def _planned(self, index: Index, times: Sequence[float]) -> Iterator[Decoded]:
        """The frames on the screen at the times, decoding no more than they need; _Unexpected if that goes wrong."""
        asked = index.showing(times)
        if len(asked) == 0:
            return
        plan = index.plan(asked)
        due = np.flatnonzero(plan.decode[index.frames[: asked[-1] + 1]])
        turn = 0
        for frame in self._fed(index, plan):
            number = due[turn]
            packet = index.frames[number]
            if frame.pts != index.pts[packet] or frame.is_corrupt:
                raise _Unexpected
            if plan.wanted[packet]:
                yield int(number), float(index.times[number]), frame
            turn += 1
            if turn == len(due):
                return
        raise _Unexpected

    def _fed(self, index: Index, plan: Plan) -> Iterator[VideoFrame]:
        """What the decoder makes of the packets that are to be decoded."""
        self._rewind()
        context = self.stream.codec_context
        packets, place = self._packets(index), 0
        fed = False
        for target in np.flatnonzero(plan.decode).tolist():
            far = index.offsets[target] - index.offsets[place] > _FAR
            if far and target in plan.fresh and self._seekable():
                yield from context.decode(None) if fed else ()
                self.container.seek(int(index.dts[target]), stream=self.stream)
                packets, fed = self._packets(index), False
            place, packet = next(((at, packet) for at, packet in packets if at >= target), (-1, None))
            if place != target:
                raise _Unexpected
            if fed and index.restarts[target] == FLUSH and target in plan.fresh:
                yield from context.decode(None)
                context.flush_buffers()
            yield from packet.decode()
            fed = True
        yield from context.decode(None)

    def _packets(self, index: Index) -> Iterator[tuple[int, av.Packet]]:
        """(number, packet) from where the container is; _Unexpected unless they are as in the index."""
        number = None
        for packet in packets_of(self.container, self.stream):
            if self._halt.is_set() or packet.pts is None:
                return
            if number is None:
                number = next(iter(np.flatnonzero(index.pts == packet.pts)), -1)
            if not 0 <= number < len(index.pts) or index.pts[number] != packet.pts:
                raise _Unexpected
            yield int(number), packet
            number += 1

    def _showing(self, times: Sequence[float]) -> Iterator[Decoded]:
        """The frames on the screen at the ascending times, decoding everything until the last."""
        held: Decoded | None = None
        wanted = 0
        for following in self._everything():
            showing = wanted
            while held and wanted < len(times) and times[wanted] < following[1] - TOLERANCE:
                wanted += 1
            if wanted > showing:
                yield held
            held = following
            if wanted == len(times):
                return
        if held is None or self._halt.is_set():
            return
        self._end = held[1] + (float(held[2].duration * held[2].time_base) if held[2].duration else 1 / self.rate)
        if wanted < len(times) and times[wanted] < max(self._end, held[1] + TOLERANCE):
            yield held

    def _everything(self) -> Iterator[Decoded]:
        """Every frame that can be decoded."""
        self._rewind()
        clock, part, read = self._timeline, 0, -math.inf
        index = 0
        latest = -1 / self.rate
        packets = packets_of(self.container, self.stream)
        while not self._halt.is_set() and self._broken < _MOST_BROKEN:
            packet = None
            try:
                packet = next(packets)
                frames = packet.decode()
            except (StopIteration, EOFError):
                return
            except FFmpegError as error:
                self._broken += 1
                self._reason = error.strerror
                if packet is None:  # reading failed, which ended the iterator; what comes after may be whole
                    packets = packets_of(self.container, self.stream)
                continue
            for frame in frames:
                self._broken += bool(frame.is_corrupt)
                time = latest + 1 / self.rate  # of frames without a time, or of a clock that stands still or jumps back
                if frame.pts is not None and clock is not None:
                    part = clock.follow(part, read, frame.pts)
                    read = frame.pts
                    placed = clock.seconds(read, part)
                    time = placed if placed > latest else time
                latest = time
                yield index, time, frame
                index += 1
