"""The frames of a video file that are displayed at the sample times, decoded with PyAV.

Where the packets allow an index (`packet_index`), only packets that the sampled frames depend on are decoded. Pixels,
times and indices equal those of decoding everything, to which the decoder falls back when a frame deviates from the
index. Decoding runs in a thread, a few frames ahead of the reader; apart from the index, memory does not grow with the
length of the file. Times are seconds on the container's clock (`timeline`), by presentation timestamp.
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
from keye.video.decoding.packet_facts import PacketFacts
from keye.video.decoding.packet_index import Index, Plan, read_index
from keye.video.decoding.picture import FrameConverter
from keye.video.decoding.prefetch import Prefetcher
from keye.video.decoding.timeline import TOLERANCE, claimed_end, packets_of, sample_times, scan

_SMALL = 320 * 240  # pixels
_AHEAD, _AHEAD_BYTES = 3, 64 << 20  # frames that are prefetched, and their bytes; at least one frame
_FAR = 4 << 20  # bytes of packets from which a seek is cheaper than reading
_SEEKABLE = {"mov", "matroska"}
_MOST_BROKEN = 10_000  # errors in one pass, for demuxers that cannot get past a damaged place


@dataclass(frozen=True)
class Frame:
    """`index` among the source's frames in presentation order, `time` in seconds, `pixels` uint8 [3, H, W]."""

    index: int
    time: float
    pixels: torch.Tensor


Decoded = tuple[int, float, VideoFrame]
"""(index, seconds, frame)"""


class _Unexpected(Exception):
    """The decoder's output, or the file, deviates from the index."""


def ahead_of(size: tuple[int, int]) -> int:
    """How many frames of `size` (height, width) are prefetched."""
    return max(1, min(_AHEAD, _AHEAD_BYTES // (3 * size[0] * size[1])))


class Decoder:
    """Yields the frames of a video stream that are displayed at the sample times, in presentation order.

    size: (height, width) as displayed. duration: end of the last frame in seconds; of damaged files, once read, of the
    last frame that can be decoded. times: the sample times, the first one in each frame. expected: most frames of a
    pass. wanted: number of samples before `max_frames` applies. warnings: complete after a pass.

    Args:
        container: of `open_container`; `close` closes it.
        name: the video's name in messages.
        fps: samples per second.
        max_frames: most frames, spread evenly.
        start, end: use only [start, end) in seconds of the container's clock.
        num_frames: take this many samples, spread evenly over that range, instead of `fps`.
        as_coded: do not correct the pixels' aspect, see `FrameConverter`.
        lazy: decode nothing before the first pass where the packets allow that; `size` is then the container's.

    Raises:
        VideoError: no frame can be decoded, or the range is empty.
    """

    def __init__(
        self,
        container: av.container.InputContainer,
        name: str,
        fps: float,
        max_frames: int,
        start: float | None = None,
        end: float | None = None,
        num_frames: int | None = None,
        as_coded: bool = False,
        lazy: bool = False,
    ):
        self.name = name
        self.warnings: list[str] = []
        self._ahead: Prefetcher[Frame] | None = None
        self._begun, self._broken, self._end = None, 0, None
        self._use(container)
        try:
            self.rate = float(self.stream.average_rate or self.stream.guessed_rate or 0) or 25.0
            self._index = read_index(container, self.stream, self.rate)
            self._moved = True  # whether the container has been read from
            if self._index is not None and self._index.uncertain:
                self._index = self._index.beginning_with(self._first_pts())
            self._read_clock()
            self._painter = FrameConverter(name, 1 if self._small else None, self.stream.sample_aspect_ratio, as_coded)
            begin = self._sample(fps, max_frames, start, end, num_frames)
            if lazy and self._index is not None and self.stream.codec_context.width:
                self._painter.size = self._painter.declared(self.stream)
            else:
                self._begun = self._begin(self.times)
            if self._painter.size is None:
                reason = f" ({self._reason})" if self._reason else ""
                place = f" after {begin:.2f} s" if begin > self._first else ""
                raise VideoError(f"no frame of {name}{place} can be decoded{reason}; replace it or encode it again")
            self.size = self._painter.size
        except BaseException:
            self.close()  # a reference cycle would keep the file open until the next garbage collection
            raise

    @property
    def appear(self) -> list[float]:
        """Ascending seconds at which the stream's frames appear; empty where its packets do not determine them."""
        return [] if self._appear is None else self._appear.tolist()

    @property
    def selective(self) -> bool:
        """Whether only packets that the sampled frames need are decoded; False after a fall-back."""
        return self._index is not None

    def packets(self) -> tuple[PacketFacts, np.ndarray] | None:
        """What the packets say about the frames, and int64 [T], those displayed at `times`; None where they do not."""
        frames = [] if self._index is None else self._index.showing(self.times)
        if len(frames) != len(self.times):
            return None
        self._finish()
        return self._index.facts(), frames

    def keep(self, places: Sequence[int]) -> list[float]:
        """Use only the sample times at these ascending places from now on, and return them."""
        self.times = [self.times[place] for place in places]
        return self.times

    def frames(self) -> Iterator[Frame]:
        """The sampled frames. Each call is a new pass over the file and ends the one before.

        The end of the pass sets `warnings`, and `duration` where the file is shorter than it claims.
        """
        yield from self._pass(self.times)
        self._finish()

    def frames_at(self, times: Sequence[float]) -> Iterator[Frame]:
        """The frame displayed at each of the ascending times (seconds), each frame once; a new pass."""
        self._begun = None
        return self._pass(times)

    def close(self) -> None:
        """End the current pass and close the container."""
        self._stop()
        self._begun = None
        self.container.close()

    def _use(self, container: av.container.InputContainer) -> None:
        self.container, self._moved = container, False
        self.stream = video_stream(container)
        # For small frames a pool of threads costs more than decoding (2-3 times slower at 112x112).
        self._small = self.stream.codec_context.width * self.stream.codec_context.height <= _SMALL
        if self._small:
            self.stream.codec_context.thread_count = 1
        else:
            self.stream.thread_type = "AUTO"

    def _first_pts(self) -> int | None:
        """The timestamp of the first decoded frame."""
        self._rewind()
        try:
            return next(
                (frame.pts for packet in packets_of(self.container, self.stream) for frame in packet.decode()), None
            )
        except (FFmpegError, EOFError):
            return None

    def _rewind(self) -> None:
        """Return to the beginning of the file, with an empty decoder."""
        if self._moved and self._seekable():
            self.container.seek(int(self._index.dts[0]), stream=self.stream)
        elif self._moved:
            self._use(reopen(self.container, self.name))
        self._moved = True

    def _seekable(self) -> bool:
        """Whether timestamps are unique in the file and a seek finds them."""
        single = self._index is not None and len(self._index.timeline.parts) == 1
        return single and not _SEEKABLE.isdisjoint(self.container.format.name.split(","))

    def _read_clock(self) -> None:
        """Set the stream's clock, when frames appear on it, and its actual and claimed end."""
        if self._index is not None:
            self._timeline, self._appear = self._index.timeline, self._index.times
        else:
            self._rewind()
            self._timeline, self._appear = scan(self.container, self.stream, self.rate, _MOST_BROKEN)
        claimed = claimed_end(self.container, self.stream, self._timeline)
        torn = self._index is None or (
            len(self._index.pts) < self.stream.frames and claimed > self._index.end + 1 / self.rate
        )
        if self._timeline is not None:
            self.duration = self._timeline.end
        else:
            self.duration = claimed if self._appear is None else float(self._appear[-1]) + 1 / self.rate
        self._first = 0.0 if self._timeline is None else self._timeline.seconds(self._timeline.parts[0].low, 0)
        self._first = self._first if self._appear is None else float(self._appear[0])
        joined = self._timeline is not None and len(self._timeline.parts) > 1  # the claim is that of one part
        self._claimed = claimed if torn and not joined else self.duration

    def _sample(
        self, fps: float, max_frames: int, start: float | None, end: float | None, num_frames: int | None
    ) -> float:
        """Choose sample times, each in another frame; returns the beginning of the range in seconds."""
        begin = self._first if start is None else max(start, self._first)
        length = min(self.duration if end is None else end, self.duration) - begin
        if end is not None and end <= self._first:
            raise VideoError(f"{self.name} begins at {self._first:.2f} s; give an end after that")
        if length <= 0 and begin > self._first:
            raise VideoError(f"{self.name} lasts {self.duration:.2f} s; give a start and an end within it")
        if self._appear is None:  # frames without times are assumed 1 / rate apart
            fps = min(fps, self.rate)
        self.times, self.wanted = sample_times(self._appear, begin, length, fps, max_frames, num_frames)
        self.expected = len(self.times)
        return begin

    def _begin(self, times: Sequence[float]) -> Iterator[Decoded] | None:
        """A new pass, with its first frame decoded; None where there is none."""
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
        del begun  # only the thread may keep it
        ahead = self._ahead = Prefetcher(frames, ahead_of(self.size), self._halt)
        try:
            yield from ahead
        finally:
            ahead.close()
        if self._ahead is not ahead:
            raise VideoError(f"{self.name} is being read again; open it twice to read it in two places")

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
        if self._end is None and self.duration < self._claimed - 1.0:  # all samples are before the end
            self._end = self.duration
        if self._end is not None and self._end < max(self.times[-1], self._claimed - 1.0):
            notes.append(f"{self.name} ends at {self._end:.2f} s of the {self._claimed:.2f} s it claims to last")
            self.duration = self._end
        elif self._end is not None:
            self.duration = max(self.duration, self._end)
        self.warnings[:] = notes

    def _decoded(self, times: Sequence[float]) -> Iterator[Decoded]:
        """The frame displayed at each of the times: by the index, and by decoding everything if that fails."""
        count, latest = 0, -1.0
        if self._index is not None:
            try:
                for decoded in self._planned(self._index, times):
                    count, latest = decoded[0] + 1, decoded[1]
                    yield decoded
                self._end = self._index.end
                return
            except (_Unexpected, FFmpegError, EOFError):
                if self._halt.is_set():  # the reader has stopped, the file is fine
                    return
                self._index = None
        for number, time, frame in self._showing(times):
            if time > latest:
                count = max(count, number)  # the index had frames that do not exist
                yield count, time, frame
                count += 1

    def _planned(self, index: Index, times: Sequence[float]) -> Iterator[Decoded]:
        """The frames displayed at the times, decoding only what they need; _Unexpected where the index is wrong."""
        requested = index.showing(times)
        if len(requested) == 0:
            return
        plan = index.plan(requested)
        due = np.flatnonzero(plan.decode[index.frames[: requested[-1] + 1]])
        frames = self._fed(index, plan)
        for number in due:
            packet = index.frames[number]
            frame = next(frames, None)
            if frame is None or frame.pts != index.pts[packet] or frame.is_corrupt:
                raise _Unexpected
            if plan.wanted[packet]:
                yield int(number), float(index.times[number]), frame

    def _fed(self, index: Index, plan: Plan) -> Iterator[VideoFrame]:
        """The frames that the decoder makes of the plan's packets."""
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
        """(number, packet) from the container's position; _Unexpected where they deviate from the index."""
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
        """The frames displayed at the ascending times, decoding everything up to the last."""
        current: Decoded | None = None
        wanted = 0
        for following in self._everything():
            showing = wanted
            while current and wanted < len(times) and times[wanted] < following[1] - TOLERANCE:
                wanted += 1
            if wanted > showing:
                yield current
            current = following
            if wanted == len(times):
                return
        if current is None or self._halt.is_set():
            return
        _, time, frame = current
        self._end = time + (float(frame.duration * frame.time_base) if frame.duration else 1 / self.rate)
        if wanted < len(times) and times[wanted] < max(self._end, time + TOLERANCE):
            yield current

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
                if packet is None:  # reading failed, which ended the iterator; later packets may be intact
                    packets = packets_of(self.container, self.stream)
                continue
            for frame in frames:
                self._broken += bool(frame.is_corrupt)
                time = latest + 1 / self.rate  # for frames without a time, or with one that does not ascend
                if frame.pts is not None and clock is not None:
                    part = clock.follow(part, read, frame.pts)
                    read = frame.pts
                    placed = clock.seconds(read, part)
                    time = placed if placed > latest else time
                latest = time
                yield index, time, frame
                index += 1
