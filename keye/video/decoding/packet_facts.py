"""What the packets of a video stream say about its frames: bytes, key frames and distances of prediction, undecoded."""

from array import array
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from keye.video.decoding.bitstream import PictureType


@dataclass(frozen=True)
class PacketFacts:
    """The F displayed frames of a stream in presentation order.

    times: float64 [F], seconds. sizes: int64 [F], bytes of each frame's packet. keys: bool [F], whether the container
    marks the packet as a key frame. coded: int64 [F], bytes of the coded picture that is displayed, without filler; it
    may come from an earlier packet (alternate references of VP9, the pyramids of AV1). spans: int64 [F], distance in
    frames to the nearest frame before it that was coded earlier. between: bool [F], whether a frame displayed later was
    coded earlier, as for B-frames.
    """

    times: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray
    coded: np.ndarray
    spans: np.ndarray
    between: np.ndarray


class Pictures:
    """Assigns each coded picture to the packet that displays it."""

    def __init__(self) -> None:
        self._packets, self._sizes = array("q"), array("q")
        self._hidden: list[int] = []  # pictures that are not displayed yet, the next one last
        self._repeats = False

    def add(self, packet: int, size: int, picture: PictureType) -> None:
        """Add the next packet, of `size` bytes, in coding order."""
        self._repeats = self._repeats or picture.repeats
        if self._hidden and not self._repeats and (picture.later or picture.restart):
            # VP9 and libaom may display a filtered alternate reference by a frame of a few bytes that repeats it.
            # Nothing marks this frame; it is the last one before the next alternate reference.
            self._show(packet - 1)
        if picture.repeats and self._hidden:
            # Pyramids are coded depth first: the picture that is displayed next is the latest of earlier packets.
            self._packets[self._hidden.pop()] = packet
        for coded in picture.later:
            self._hidden.append(len(self._packets))
            self._append(packet, coded)
        if not picture.repeats:
            self._append(packet, size - picture.filler - sum(picture.later))

    def displayed(self) -> np.ndarray:
        """int64 [pictures, 2]: (packet that displays it, bytes) of each picture in coding order."""
        return np.stack([np.array(self._packets), np.array(self._sizes)], 1)

    def _append(self, packet: int, size: int) -> None:
        self._packets.append(packet)
        self._sizes.append(size)

    def _show(self, packet: int) -> None:
        for picture in self._hidden:
            self._packets[picture] = packet
        self._hidden.clear()


def packet_facts(
    times: np.ndarray, frames: np.ndarray, sizes: np.ndarray, keys: np.ndarray, pictures: np.ndarray
) -> PacketFacts:
    """The facts of a stream's frames.

    Args:
        times: float64 [F], seconds of the frames. frames: int64 [F], each frame's packet.
        sizes, keys: int64 and bool [packets]. pictures: see `Pictures.displayed`.
    """
    position = np.full(len(sizes), -1)
    position[frames] = np.arange(len(frames))
    coded = np.zeros(len(frames), dtype=np.int64)
    spans, between = np.zeros(len(frames), dtype=np.int64), np.zeros(len(frames), dtype=bool)
    earlier: list[int] = []  # positions of the frames that were coded earlier, ascending
    for packet, size in pictures.tolist():
        frame = int(position[packet])
        if frame < 0:  # a packet that displays nothing
            continue
        coded[frame] += size
        place = bisect_left(earlier, frame)
        if place < len(earlier) and earlier[place] == frame:
            continue  # a frame that repeats its picture
        spans[frame] = frame - (earlier[place - 1] if place else -1)
        between[frame] = place < len(earlier)
        earlier.insert(place, frame)
    return PacketFacts(times, sizes[frames], keys[frames], coded, spans, between)
