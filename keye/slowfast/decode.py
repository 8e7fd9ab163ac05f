"""The frames of one video file that are on the screen at the sample times, decoded with PyAV.

Nothing here keeps frames: memory does not grow with the length of the file. Times are seconds from the first frame, by
presentation timestamp, never index / average rate (wrong for variable frame rates).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import av
import numpy as np
import torch
from av.video.frame import VideoFrame

from keye.errors import VideoError
from keye.slowfast.containers import reopen

_SMALL = 320 * 240  # pixels
_TOLERANCE = 1e-4  # seconds; containers round timestamps to their own time base


@dataclass(frozen=True)
class Frame:
    """`index` among the source's frames in presentation order, `time` in seconds, `pixels` uint8 [3, H, W]."""

    index: int
    time: float
    pixels: torch.Tensor


def open_decoder(
    container: av.container.InputContainer,
    name: str,
    fps: float,
    max_frames: int,
    start: float | None = None,
    end: float | None = None,
    num_frames: int | None = None,
) -> "Decoder":
    """The decoder of a container's first video stream, called `name` in messages, sampled at `fps` frames per second.

    At most `max_frames` frames, evenly over the clip. start, end: only [start, end) seconds; num_frames: so many
    frames, evenly over that range, instead of `fps`. `close` it in the end, which closes the container. Raises
    VideoError when no frame can be decoded.
    """
    return Decoder(container, name, fps, max_frames, start, end, num_frames)


class Decoder:
    """Decodes one video stream in presentation order and picks the frames on the screen at the sample times."""

    def __init__(
        self,
        container: av.container.InputContainer,
        name: str,
        fps: float,
        max_frames: int,
        start: float | None,
        end: float | None,
        num_frames: int | None,
    ):
        self.name = name
        self.warnings: list[str] = []
        self._open(container)
        self.rate = float(self.stream.average_rate or self.stream.guessed_rate or 0) or 25.0
        self.broken = 0
        self.duration = self._claimed = self._duration()
        self._rewind()
        first = self._first[2]
        turned = first.rotation % 180 != 0
        self.size = (first.width, first.height) if turned else (first.height, first.width)
        begin = min(max(start or 0.0, 0.0), self.duration)
        length = min(self.duration if end is None else end, self.duration) - begin
        if length <= 0 and begin > 0:
            raise VideoError(f"{name} lasts {self.duration:.2f} s; give a start and an end within it")
        fps = min(fps, self.rate)
        self.wanted = max(1, math.ceil(length * fps - _TOLERANCE)) if num_frames is None else num_frames
        self.expected = min(self.wanted, max_frames)
        step = 1 / fps if num_frames is None and self.expected == self.wanted else length / self.expected
        self.times = [begin + index * step for index in range(self.expected)]
        self._fresh = True

    def _open(self, container: av.container.InputContainer) -> None:
        self.container = container
        self.stream = container.streams.video[0]
        # On small frames a pool of threads costs more than the decoding itself (2-3 times slower at 112x112).
        self.small = self.stream.codec_context.width * self.stream.codec_context.height <= _SMALL
        if self.small:
            self.stream.codec_context.thread_count = 1
        else:
            self.stream.thread_type = "AUTO"
        self.reformatter = av.video.reformatter.VideoReformatter()

    def _rewind(self) -> None:
        self._decoded = self._decode()
        try:
            self._first = next(self._decoded)
        except StopIteration:
            raise VideoError(f"no frame of {self.name} can be decoded; replace it or encode it again") from None

    def frames(self) -> Iterator[Frame]:
        """The sampled frames; each call is a new pass over the file. Sets `duration` and `warnings` at its end."""
        self._end: float | None = None
        self.warnings.clear()
        yield from self.frames_at(self.times)
        if self.broken:
            self.warnings.append(f"{self.broken} damaged pieces of {self.name} could not be decoded")
        if self._end is not None and self._end < self.times[-1]:
            self.warnings.append(
                f"{self.name} ends at {self._end:.2f} s of the {self._claimed:.2f} s it claims to last"
            )
            self.duration = self._end
        elif self._end is not None:
            self.duration = max(self._claimed, self._end)

    def frames_at(self, times: Sequence[float]) -> Iterator[Frame]:
        """The frame on the screen at each of the ascending times (seconds), none twice; a new pass."""
        if not self._fresh:
            self.broken = 0
            self._open(reopen(self.container, self.name))
            self._rewind()
        self._fresh = False
        return self._at(times)

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

    def close(self) -> None:
        self.container.close()

    def _at(self, times: Sequence[float]) -> Iterator[Frame]:
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

    def _frame(self, decoded: tuple[int, float, VideoFrame]) -> Frame:
        index, time, frame = decoded
        turns = round(frame.rotation / 90) % 4
        height, width = self.size if turns % 2 == 0 else self.size[::-1]
        threads = 1 if self.small else None
        pixels = self.reformatter.reformat(frame, width, height, "rgb24", threads=threads).to_ndarray()
        if turns:
            pixels = np.ascontiguousarray(np.rot90(pixels, turns))
        return Frame(index, time, torch.from_numpy(pixels).permute(2, 0, 1))
