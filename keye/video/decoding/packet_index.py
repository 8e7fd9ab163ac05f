"""Which packets of a video stream must be decoded for the frames displayed at given times.

One pass over the packets, without decoding, gives the time of every frame. The packets' headers show where decoding can
begin and which pictures are no reference of others. The pass takes about 10 µs per packet and keeps 67 bytes of each, 6
MB for an hour; nothing else here grows with the length of a file.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import av
import numpy as np

from keye.video.decoding.bitstream import NO, packet_reader
from keye.video.decoding.packet_facts import PacketFacts, Pictures, packet_facts
from keye.video.decoding.timeline import TOLERANCE, Timeline, origin_of, packets_of, splitter

# Containers in which the two fields of an interlaced picture may come as two packets.
_FIELD_FORMATS = {"mpegts", "mpeg", "mpegvideo", "h264", "hevc"}
_MOST_PACKETS = 1 << 24


@dataclass(frozen=True)
class Index:
    """The packets of a stream in coding order, and the frames they give in presentation order.

    pts, dts: int64 [packets] in the stream's time base. clock: int64 [packets], the pts, continuous over jumps.
    offsets: int64 [packets], bytes of the stream before each. sizes: int64 [packets], bytes of each. keys: bool
    [packets], whether the container marks it as a key frame. restarts: int8 [packets], see `bitstream`. needless: bool
    [packets], whether no other picture is predicted from it. pictures: int64 [pictures, 2], in coding order, the packet
    that displays each coded picture, and its bytes. frames: int64 [frames], each frame's packet. times: float64
    [frames], seconds. timeline: the clock. uncertain: whether frames precede that of the first packet, which decoders
    may drop.
    """

    pts: np.ndarray
    dts: np.ndarray
    clock: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray
    restarts: np.ndarray
    needless: np.ndarray
    pictures: np.ndarray
    frames: np.ndarray
    times: np.ndarray
    timeline: Timeline
    uncertain: bool

    @property
    def end(self) -> float:
        """End of the last frame in seconds."""
        return self.timeline.end

    def facts(self) -> PacketFacts:
        """What the packets say about the frames."""
        return packet_facts(self.times, self.frames, self.sizes, self.keys, self.pictures)

    def beginning_with(self, pts: int | None) -> "Index | None":
        """The index without the frames before the first decoded one, of timestamp `pts`; None if that is unknown."""
        found = np.flatnonzero(self.pts[self.frames] == (math.nan if pts is None else pts))
        if len(found) == 0:
            return None
        return replace(self, frames=self.frames[found[0] :], times=self.times[found[0] :], uncertain=False)

    def showing(self, moments: Sequence[float]) -> np.ndarray:
        """int64 [n]: the frames displayed at ascending moments (seconds), each once, up to the end.

        The first frame is taken for moments before it.
        """
        inside = [moment for moment in moments if moment < max(self.end, self.times[-1] + TOLERANCE)]
        return np.unique((np.searchsorted(self.times - TOLERANCE, inside, side="right") - 1).clip(0))

    def plan(self, frames: np.ndarray) -> "Plan":
        """The packets to decode for the given frames (ascending positions in presentation order)."""
        wanted = np.zeros(len(self.pts), dtype=bool)
        wanted[self.frames[frames]] = True
        starts = np.flatnonzero(self.restarts)
        decode = np.zeros(len(self.pts), dtype=bool)
        fresh = []
        complete = False  # whether the group is needed up to its end, by the pictures that lead the next group
        for start, stop in zip(starts[::-1], np.append(starts[1:], len(self.pts))[::-1], strict=True):
            leading = self.clock[start:stop] < self.clock[start]
            here = np.flatnonzero(wanted[start:stop])
            if not complete and len(here) == 0:
                continue
            last = stop if complete else start + int(here[-1]) + 1
            complete = start > 0 and bool(leading[here].any())
            decode[start:last] = (wanted | ~self.needless)[start:last]
            if not complete:
                if start > 0:
                    decode[start:last] &= ~leading[: last - start]
                fresh.append(int(start))
        return Plan(decode, wanted, frozenset(fresh))


@dataclass(frozen=True)
class Plan:
    """What to decode.

    decode: bool [packets]. wanted: bool [packets], whose frames are requested. fresh: packets where decoding restarts.
    """

    decode: np.ndarray
    wanted: np.ndarray
    fresh: frozenset[int]


def read_index(container: av.container.InputContainer, stream: av.VideoStream, rate: float) -> Index | None:
    """The index of a stream; None where its frames cannot be known without decoding.

    That is the case for codecs that `bitstream` does not support, packets without a time or with equal times, damage
    that the container reports, and parameters that change within the stream.

    Args:
        rate: frames per second, for the duration of a last frame that has none.
    """
    context = stream.codec_context
    reader = packet_reader(context)
    if reader is None or (context.field_order > 1 and not _FIELD_FORMATS.isdisjoint(container.format.name.split(","))):
        return None
    pts, dts, sizes = array("q"), array("q"), array("q")
    restarts, layers, flags = array("b"), array("b"), array("b")
    sets, parts, pictures = None, splitter(container, stream), Pictures()
    try:
        for packet in packets_of(container, stream):
            if packet.size == 0 and packet.pts is None and packet.dts is None:
                continue  # the end
            odd = packet.size == 0 or packet.pts is None or packet.is_corrupt or packet.has_sidedata("new_extradata")
            picture = None if odd else reader(packet)
            if picture is None or len(pts) == _MOST_PACKETS:
                return None
            if picture.sets:
                sets = picture.sets if sets is None else sets
                if picture.sets != sets:
                    return None
            shown = picture.shown and not packet.is_discard
            length = max(packet.duration or 0, 0)
            parts.add(len(pts), packet.pts, packet.dts, length, picture.restart != NO, shown)
            pts.append(packet.pts)
            dts.append(packet.pts if packet.dts is None else packet.dts)
            sizes.append(packet.size)
            restarts.append(picture.restart)
            layers.append(picture.layer)
            flags.append(4 * packet.is_keyframe + 2 * shown + picture.reference)
            pictures.add(len(sizes) - 1, packet.size, picture)
    except av.error.FFmpegError:
        return None
    visible = np.array(flags) & 2 != 0
    if not pts or restarts[0] == NO or not visible.any():
        return None
    timeline = parts.timeline(origin_of(container, stream), 1 / rate)
    clock = np.array(pts) + timeline.shifts(len(pts))
    shown = np.flatnonzero(visible)
    frames = shown[np.argsort(clock[shown], kind="stable")]
    if (np.diff(clock[frames]) <= 0).any():
        return None
    sizes = np.array(sizes)
    first_group = slice(0, next((at for at in range(1, len(pts)) if restarts[at]), len(pts)))
    return Index(
        pts=np.array(pts),
        dts=np.array(dts),
        clock=clock,
        offsets=np.cumsum(sizes) - sizes,
        sizes=sizes,
        keys=np.array(flags) & 4 != 0,
        restarts=np.array(restarts),
        needless=(np.array(flags) & 1 == 0) & (np.array(layers) == max(layers)),
        pictures=pictures.displayed(),
        frames=frames,
        times=(clock[frames] - timeline.origin) / timeline.second,
        timeline=timeline,
        uncertain=bool((clock[first_group] < clock[0]).any()),
    )
