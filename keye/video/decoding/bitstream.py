"""Properties of coded packets, read from their headers without decoding: whether decoding can begin at a packet,
whether other pictures are predicted from it, whether it is displayed, and which of its pictures are displayed later.

Only certain properties are reported. A codec that is not listed, and a packet that deviates from its standard, has no
`PictureType`, and all of the file is decoded. Sources: ITU-T H.264 §7.3 and annex D, H.265 §7.3 and §7.4.2.2, ISO/IEC
13818-2 §6.2 and 14496-2 §6.2, RFC 6386 §9.1, the VP9 bitstream specification §6.2 and annex B, the AV1 bitstream
specification §5.3 and §5.9.2.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import av

NO, CLEAN, FLUSH = 0, 1, 2
"""Whether decoding can begin at a packet: no; yes, in any state of the decoder; yes, after flushing the decoder."""


class PictureType(NamedTuple):
    """Properties of a packet.

    restart: NO, CLEAN or FLUSH. reference: whether pictures of its layer may be predicted from it. layer: temporal
    layer; packets of the highest layer that are no reference can be skipped. shown: whether it produces a frame. sets:
    its parameter sets, which must be the same in all of the file. later: bytes of each of its pictures that later
    packets display (alternate references). repeats: whether it displays a picture of an earlier packet. filler: bytes
    without content, as in streams of a constant bit rate.
    """

    restart: int
    reference: bool = True
    layer: int = 0
    shown: bool = True
    sets: bytes = b""
    later: tuple[int, ...] = ()
    repeats: bool = False
    filler: int = 0


Reader = Callable[[av.Packet], PictureType | None]


def packet_reader(context: av.VideoCodecContext) -> Reader | None:
    """The function that reads a stream's packets; None for an unsupported codec."""
    name = context.codec.canonical_name  # of the codec, not of its decoder
    extradata = context.extradata or b""
    if name == "h264":
        size = (extradata[4] & 3) + 1 if len(extradata) > 6 and extradata[0] == 1 else 0
        return lambda packet: _h264(packet, size)
    if name == "hevc":
        size = (extradata[21] & 3) + 1 if len(extradata) > 22 and extradata[:2] != b"\0\0" else 0
        return lambda packet: _hevc(packet, size)
    if name in _READERS:
        return _READERS[name]
    return (lambda packet: PictureType(CLEAN)) if context.codec.intra_only else None


def _nal_units(data: bytes | memoryview, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the NAL units, after lengths of `size` bytes, or after start codes where `size` is 0."""
    at = 0
    while size and at + size < len(data):
        start = at + size
        at = start + int.from_bytes(data[at:start], "big")
        yield start, at
    if size and at != len(data):
        yield len(data), len(data) + 1  # the lengths do not add up: an invalid unit
    if not size:
        start = data.find(b"\0\0\1")
        while start >= 0:
            following = data.find(b"\0\0\1", start + 3)
            yield start + 3, len(data) if following < 0 else following
            start = following


def _h264(packet: av.Packet, size: int) -> PictureType | None:
    data = memoryview(packet) if size else bytes(packet)
    pictures, filler, reference, restart, sets = 0, 0, False, NO, b""
    for start, end in _nal_units(data, size):
        if end > len(data) or start >= end:
            return None
        kind = data[start] & 31
        if 1 <= kind <= 5:
            pictures += 1
            reference = reference or data[start] & 0x60 != 0
            restart = CLEAN if kind == 5 else restart
        elif kind == 6 and packet.is_keyframe and restart == NO and _recovers_here(bytes(data[start + 1 : end])):
            restart = FLUSH
        elif kind == 12:
            filler += end - start
        elif kind in (7, 8, 13, 15):
            sets += bytes(data[start:end]).rstrip(b"\0")
    return PictureType(restart, reference, sets=sets, filler=filler) if pictures else None


def _recovers_here(message: bytes) -> bool:
    """Whether supplemental information has a recovery point after 0 frames with exact pictures (H.264 D.2.8)."""
    message = message.replace(b"\0\0\3", b"\0\0")
    at = 0
    while at + 2 < len(message):
        kind = length = 0
        while at < len(message) and message[at] == 255:
            kind, at = kind + 255, at + 1
        kind, at = kind + message[at] if at < len(message) else -1, at + 1
        while at < len(message) and message[at] == 255:
            length, at = length + 255, at + 1
        length, at = length + message[at] if at < len(message) else 0, at + 1
        if kind == 6:
            return at < len(message) and message[at] & 0xC0 == 0xC0  # ue(0) is a 1; then exact_match_flag
        at += length
    return False


def _hevc(packet: av.Packet, size: int) -> PictureType | None:
    data = memoryview(packet) if size else bytes(packet)
    found: PictureType | None = None
    filler, sets = 0, b""
    for start, end in _nal_units(data, size):
        if end > len(data) or start + 1 >= end:
            return None
        kind, above = data[start] >> 1 & 63, (data[start] & 1) << 5 | data[start + 1] >> 3
        if above:  # another view, or transparency
            continue
        if kind < 32 and found is None:
            restart = CLEAN if kind in (19, 20) else FLUSH if 16 <= kind <= 21 else NO
            found = PictureType(restart, kind > 14 or kind % 2 == 1, (data[start + 1] & 7) - 1)
        elif kind in (32, 33, 34):
            sets += bytes(data[start:end]).rstrip(b"\0")
        elif kind == 38:
            filler += end - start
    return found and found._replace(sets=sets, filler=filler)


def _vp8(packet: av.Packet) -> PictureType | None:
    first = memoryview(packet)[0]
    return PictureType(CLEAN if first & 1 == 0 else NO, shown=bool(first & 16))


def _vp9(packet: av.Packet) -> PictureType | None:
    data = bytes(packet)
    starts = [0]
    later, repeats = [], False
    if data[-1] & 0xE0 == 0xC0:  # a superframe: its index at the end has the sizes of the frames
        count, width = (data[-1] & 7) + 1, (data[-1] >> 3 & 3) + 1
        index = data[-2 - count * width : -1]
        if len(index) == 1 + count * width and index[0] == data[-1]:
            for frame in range(count - 1):
                starts.append(starts[-1] + int.from_bytes(index[1 + frame * width :][:width], "little"))
    shown = 0
    for start, end in zip(starts, [*starts[1:], len(data)], strict=True):
        if start >= len(data) or data[start] >> 6 != 2:
            return None
        bits = data[start] << (data[start] & 0x30 == 0x30)  # profile 3 has one bit more
        shown += bool(bits & 8) or bool(bits & 2)
        repeats = repeats or bool(bits & 8)
        later += [] if bits & 10 else [end - start]
    first = data[0] << (data[0] & 0x30 == 0x30)
    if shown > 1:
        return None
    return PictureType(CLEAN if first & 12 == 0 else NO, shown=shown == 1, later=tuple(later), repeats=repeats)


def _av1(packet: av.Packet) -> PictureType:
    """A temporal unit: pictures of frame OBUs, or of frame headers and the tile groups after them."""
    data, at = memoryview(packet), 0
    sizes: list[int] = []
    hidden: list[bool] = []
    repeats, filler = False, 0
    while at < len(data):
        start, kind = at, data[at] >> 3 & 15
        sized, at = data[at] & 2, at + 1 + (data[at] >> 2 & 1)
        length, at = _leb128(data, at) if sized else (len(data) - at, at)
        end = at + length
        if kind in (3, 6) and at < min(end, len(data)):
            if data[at] & 0x80:
                repeats = True
            else:
                sizes.append(end - start)
                hidden.append(not data[at] & 0x10)
        elif kind == 4 and sizes:
            sizes[-1] += end - start
        elif kind == 15:
            filler += end - start
        at = end
    later = tuple(size for size, unseen in zip(sizes, hidden, strict=True) if unseen)
    return PictureType(CLEAN if packet.is_keyframe else NO, later=later, repeats=repeats, filler=filler)


def _leb128(data: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at a byte, seven bits a byte from the lowest, and the position after it."""
    value = shift = 0
    while at < len(data) and shift < 56:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if not data[at - 1] & 128:
            break
    return value, at


def _mpeg2(packet: av.Packet) -> PictureType | None:
    data = bytes(packet)
    picture = data.find(b"\0\0\1\0")
    if picture < 0 or picture + 5 >= len(data):
        return None
    extension = data.find(b"\0\0\1\xb5", picture)
    if extension >= 0 and extension + 6 < len(data) and data[extension + 4] >> 4 == 8:
        if data[extension + 6] & 3 != 3 and data.find(b"\0\0\1\0", picture + 4) < 0:
            return None  # one field of two
    sequence = data.find(b"\0\0\1\xb3", 0, picture)
    group = data.find(b"\0\0\1\xb8", 0, picture)
    kind = data[picture + 5] >> 3 & 7
    restart = CLEAN if kind == 1 and sequence >= 0 and packet.is_keyframe else NO
    sets = data[sequence : group if group > sequence else picture] if sequence >= 0 else b""
    return PictureType(restart, kind != 3, sets=sets) if kind in (1, 2, 3) else None


def _mpeg4(packet: av.Packet) -> PictureType | None:
    data = bytes(packet)
    picture = data.find(b"\0\0\1\xb6")
    # Very short pictures may have no coded content; two pictures in one packet are made for old AVI players.
    if picture < 0 or len(data) - picture < 20 or data.find(b"\0\0\1\xb6", picture + 4) >= 0:
        return None
    group = data.find(b"\0\0\1\xb3", 0, picture)
    kind = data[picture + 4] >> 6
    restart = CLEAN if kind == 0 and packet.is_keyframe else NO
    return PictureType(restart, kind != 2, sets=data[: group if group >= 0 else picture])


def _by_flag(packet: av.Packet) -> PictureType:
    return PictureType(CLEAN if packet.is_keyframe else NO)


_READERS: dict[str, Reader] = {
    "vp8": _vp8,
    "vp9": _vp9,
    "mpeg1video": _mpeg2,
    "mpeg2video": _mpeg2,
    "mpeg4": _mpeg4,
    "av1": _av1,
    "ffv1": _by_flag,
}
