"""The clock of a video stream: seconds by presentation timestamp, continuous where recordings are joined.

Second 0 is the container's. The clocks of transport and program streams begin anywhere; there second 0 is the first
timestamp of any stream in the file, as in players. Joined recordings (`cat a.ts b.ts`, the titles of a DVD, a receiver
that was reset) change to another clock within the file. Such a jump is found in the packets, and each part is placed
after the one before it, so that no frame is lost or duplicated.
"""

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import av
import numpy as np
from av.format import Flags

TOLERANCE = 1e-4  # seconds; containers round timestamps to their own time base

# Seconds. Decoding timestamps ascend, so a step back is a jump. A large step ahead is a jump in a stream that cannot
# pause. The limits are those of the ffmpeg tool.
_BACK = 0.1
_AHEAD, _AHEAD_ELSEWHERE = 10.0, 108_000.0


@dataclass
class Part:
    """Packets on one clock.

    packet: number of the first packet. In units of the stream's time base: low, top: lowest and highest timestamp;
    length: duration of the frame at `top`, 0 if unknown; shift: offset to the continuous clock.
    """

    packet: int
    low: float = math.inf
    top: float = -math.inf
    length: int = 0
    shift: int = 0


@dataclass(frozen=True)
class Timeline:
    """The parts of a stream in the order of the file.

    second: time base units per second. origin: the timestamp of second 0. last: duration in seconds of a last frame
    that has none.
    """

    parts: tuple[Part, ...]
    second: float
    origin: int
    last: float

    @property
    def end(self) -> float:
        """End of the last frame in seconds."""
        part = self.parts[-1]
        return self.seconds(part.top, -1) + (part.length / self.second or self.last)

    def seconds(self, pts: float, part: int) -> float:
        """The time of a timestamp in a part."""
        return (pts + self.parts[part].shift - self.origin) / self.second

    def shifts(self, packets: int) -> np.ndarray:
        """int64 [packets]: the offset of each packet's timestamp to the continuous clock."""
        starts = [0, *(part.packet for part in self.parts[1:]), packets]
        return np.repeat(np.array([part.shift for part in self.parts], dtype=np.int64), np.diff(starts))

    def follow(self, part: int, latest: float, pts: int) -> int:
        """The part of the next decoded frame, after one with timestamp `latest` in `part`."""

        def contains(number: int) -> bool:
            return self.parts[number].low <= pts <= self.parts[number].top

        back = pts < latest - _BACK * self.second
        if contains(part) and not back:
            return part
        return next((later for later in range(part + 1, len(self.parts)) if contains(later)), part)

    def note(self, name: str) -> str | None:
        """A sentence about jumps, None if there are none."""
        jumps = len(self.parts) - 1
        if not jumps:
            return None
        before, after = self.parts[0].top / self.second, self.parts[1].low / self.second
        time = self.seconds(self.parts[1].low, 1)
        count = "jumps once, at" if jumps == 1 else f"jumps {jumps} times, first at"
        return (
            f"the clock of {name} {count} {time:.2f} s (from {before:.2f} s to {after:.2f} s), as in joined recordings"
            "; later times continue from there"
        )


@dataclass
class Splitter:
    """Splits the packets of a stream, added in the order of the file, where its clock jumps."""

    second: float
    may_pause: bool
    parts: list[Part] = field(default_factory=lambda: [Part(0)])
    _latest: int | None = None

    def add(self, number: int, pts: int, dts: int | None, length: int, restart: bool, shown: bool) -> None:
        """Add the next packet. restart: whether all packets before it on the same clock are displayed before it."""
        part = self.parts[-1]
        jump = restart and pts <= part.top
        if dts is not None:
            ahead = _AHEAD_ELSEWHERE if self.may_pause else _AHEAD
            if self._latest is not None:
                jump = jump or not -_BACK * self.second <= dts - self._latest <= ahead * self.second
            self._latest = dts
        if jump:
            part = Part(number)
            self.parts.append(part)
        if shown:
            part.low = min(part.low, pts)
            if pts > part.top:
                part.top, part.length = pts, length

    def timeline(self, origin: int, last: float) -> Timeline:
        """The parts with displayed frames, each beginning at the end of the one before."""
        parts = [part for part in self.parts if part.low <= part.top]
        for before, part in zip(parts, parts[1:], strict=False):
            end = before.top + before.shift + (before.length or last * self.second)
            part.shift = round(end) - int(part.low)
        return Timeline(tuple(parts), self.second, min(origin, int(parts[0].low)), last)


def splitter(container: av.container.InputContainer, stream: av.VideoStream) -> Splitter:
    return Splitter(float(1 / stream.time_base), not _restarts(container))


def origin_of(container: av.container.InputContainer, stream: av.VideoStream) -> int:
    """The timestamp, in the stream's time base, of second 0."""
    if not _restarts(container) or container.start_time is None:
        return 0
    return round(container.start_time / av.time_base / stream.time_base)


def scan(
    container: av.container.InputContainer, stream: av.VideoStream, rate: float, most_broken: int
) -> tuple[Timeline | None, np.ndarray | None]:
    """The clock of a stream, and the ascending seconds at which frames appear, from the packets alone.

    Where no packet has a time there is no clock, and frames are 1 / rate apart.

    Args:
        rate: frames per second, also for the duration of a last frame that has none.
        most_broken: reading ends after this many errors.

    Returns:
        (clock, seconds); each is None where the packets do not determine it.
    """
    found, clock, count, broken = splitter(container, stream), array("q"), 0, 0
    complete = True
    packets = packets_of(container, stream)
    while broken < most_broken:
        try:
            packet = next(packets)
        except (StopIteration, EOFError):
            break
        except av.error.FFmpegError:
            broken += 1
            packets = packets_of(container, stream)
            continue
        if packet.size == 0 or packet.is_discard:
            continue
        count += 1
        complete = complete and packet.pts is not None
        pts = packet.dts if packet.pts is None else packet.pts
        if pts is None:
            continue
        # Restarts and the packing of fields are unknown here, so the order of timestamps is not used to find jumps.
        found.add(len(clock), pts, packet.dts, max(packet.duration or 0, 0), False, True)
        clock.append(pts)
    if not clock:
        return None, np.arange(count) / rate if count else None
    timeline = found.timeline(origin_of(container, stream), 1 / rate)
    times = (np.array(clock) + timeline.shifts(len(clock)) - timeline.origin) / timeline.second
    return timeline, np.unique(times) if complete else None


def claimed_end(container: av.container.InputContainer, stream: av.VideoStream, timeline: Timeline | None) -> float:
    """The end of the stream in seconds that the file declares; 0 if none."""
    if stream.duration and stream.duration > 0:
        origin = origin_of(container, stream)
        return float((stream.duration + (stream.start_time or origin) - origin) * stream.time_base)
    # The duration of the file is that of its video only where it has no other stream.
    alone = timeline is None or len(container.streams) == 1
    if container.duration and alone and container.format.name != "gif":
        return max(container.duration, 0) / av.time_base
    return 0.0


def sample_times(
    times: np.ndarray | None, begin: float, length: float, fps: float, max_frames: int, num_frames: int | None
) -> tuple[list[float], int]:
    """Sample times in seconds, each in another frame, at most `max_frames`, and their number before that limit.

    Args:
        times: seconds at which frames appear, where they are known.
        begin, length: of the sampled range, in seconds.
        fps: samples per second. num_frames: take this many samples instead.
    """
    count = max(1, math.ceil(length * fps - TOLERANCE)) if num_frames is None else num_frames
    step = 1 / fps if num_frames is None or length <= 0 else length / count
    samples = first_samples(times, begin, step, count)
    wanted = len(samples)
    if wanted > max_frames:
        step = length / max_frames
        samples = first_samples(times, begin, step, max_frames)
    return (begin + step * samples).tolist(), wanted


def first_samples(times: np.ndarray | None, begin: float, step: float, count: int) -> np.ndarray:
    """The i < count for which begin + i * step is the first such time in a frame; all i without `times`.

    times: seconds at which frames appear. The cost grows with the number of frames and not with `count`, since a file
    of a few bytes can claim a duration of years.
    """
    if times is None:
        return np.arange(count)
    firsts = np.ceil((times - begin - TOLERANCE) / step).clip(0)
    return firsts[firsts < np.minimum(np.append(firsts[1:], count), count)]


def packets_of(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """The packets of a stream from the container's position, and an empty one at the end of the file.

    PyAV raises IndexError for packets of streams that appear within damaged or joined transport streams. They are not
    of this stream and are skipped.
    """
    while True:
        try:
            yield from container.demux(stream)
            return
        except IndexError:
            continue


def _restarts(container: av.container.InputContainer) -> bool:
    """Whether the format's clock may begin anywhere and begin again."""
    return bool(container.format.flags & Flags.ts_discont.value)
