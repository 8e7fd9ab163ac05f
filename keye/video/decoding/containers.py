"""Opening a media file with FFmpeg so that no other file is read.

FFmpeg follows references: playlists (HLS, DASH, ffconcat, SDP) name other files and network addresses, and a name such
as `concat:a|b` or `http://…` is opened as a protocol. The files of a data set are untrusted. Therefore only
self-contained formats and the `file` protocol are allowed, and paths are always passed as paths.
"""

import io
import os
import struct
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
from av.stream import Disposition
from av.video.frame import VideoFrame

from keye.errors import VideoError

# Self-contained formats. The others of FFmpeg name other files (hls, dash, concat, image2, sdp, imf, …), use devices
# and networks, have no video, or belong to old games, whose readers are not maintained for safety.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,kux,live_flv,asf,ogg,mxf,nut,dv,rm,wtv,gxf,"
    "ivf,obu,av1,h261,h263,h264,hevc,vvc,evc,vc1,vc1test,cavsvideo,dirac,mjpeg,mjpeg_2000,yuv4mpegpipe,swf,gif,apng,"
    "dnxhd,dhav,lmlm4,nsv,ivr"
)
_FLATTEST = 10  # a pixel's longer side over its shorter one; higher declared ratios are ignored
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"v=0\r", b"v=0\n", b"<MPD", b"<SmoothStreamingMedia", b"<?xml", b"[playlist]")


MAX_FRAME_PIXELS = 36_000_000  # as displayed: allows 8192x4320 and 7680x4320; 108 MB a frame as uint8


def open_container(target: str | os.PathLike | BinaryIO, name: str) -> av.container.InputContainer:
    """Open a path or a seekable binary file, called `name` in messages, with limits on its decoder's memory.

    Raises:
        VideoError: the file is not a decodable video, or its frames have more than `MAX_FRAME_PIXELS` pixels.
    """
    is_path = isinstance(target, str | os.PathLike)
    options = {"protocol_whitelist": "file" if is_path else "none", "format_whitelist": _FORMATS}
    try:
        container = av.open(
            f"file:{Path(target).absolute()}" if is_path else target,
            options=_decoder_limits(),
            container_options=options,
            metadata_errors="replace",  # titles in unknown encodings
        )
    except (av.error.FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
        if _head(target).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(_PLAYLISTS):
            raise VideoError(f"{name} is a playlist, which contains no video; give the video itself") from error
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"{name} is not a readable video ({reason}); replace it or convert it to mp4") from error
    problem, stream = None, video_stream(container)
    if not container.streams.video:
        problem = "has no video stream; give a file with pictures in it"
    elif stream is None:
        problem = "is sound with a cover picture; give a file with a video in it"
    elif stream.codec_context is None:
        problem = "is coded with a codec that has no decoder here; convert it to mp4 with H.264"
    else:
        height, width = shown_size(stream.codec_context, stream.sample_aspect_ratio)
        if width * height > MAX_FRAME_PIXELS:
            problem = f"has {width}x{height} pixels, and at most {MAX_FRAME_PIXELS:,} are allowed; make it smaller"
        stream.codec_context.options = _decoder_limits()  # for streams whose frames become larger
    if problem:
        container.close()
        raise VideoError(f"{name} {problem}")
    return container


def video_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first video stream of a container that is not a cover picture."""
    moving = (stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic)
    return next(moving, None)


def shown_size(coded: av.VideoCodecContext | VideoFrame, aspect: Fraction | None) -> tuple[int, int]:
    """(height, width) as displayed, before rotation, of pixels whose width is `aspect` times their height.

    The shorter side of a pixel is stretched, so that no detail is lost.
    """
    plausible = aspect is not None and 1 / _FLATTEST <= aspect <= _FLATTEST
    aspect = aspect if plausible else Fraction(1)
    if aspect > 1:
        return coded.height, round(coded.width * aspect)
    return round(coded.height / aspect), coded.width


def display_matrix(stream: av.VideoStream) -> list[int] | None:
    """The first five values of the display matrix that a stream's container declares; None where it declares none.

    PyAV shows the matrix of decoded frames only. Here the stream's parameters are copied into the header of an MP4,
    whose track header contains the matrix (ISO/IEC 14496-12 §8.3.2).
    """
    header = io.BytesIO()
    try:
        with av.open(header, "w", format="mp4", options={"movflags": "empty_moov+frag_keyframe"}) as copy:
            copy.add_stream_from_template(stream)
            copy.start_encoding()
    except (av.error.FFmpegError, ValueError):  # a codec that MP4 does not have
        return None
    track = header.getvalue().partition(b"tkhd")[2]
    wide = 12 * (len(track) > 0 and track[0] == 1)  # version 1 has times and durations of 64 bits
    values = struct.unpack(">5i", track[40 + wide : 60 + wide])
    return None if values == (1 << 16, 0, 0, 0, 1 << 16) else list(values)


def _decoder_limits() -> dict[str, str]:
    """Options of FFmpeg's decoders, which count full blocks, including parts beyond the edges of a picture."""
    return {"max_pixels": str(MAX_FRAME_PIXELS + MAX_FRAME_PIXELS // 8)}


def reopen(container: av.container.InputContainer, name: str) -> av.container.InputContainer:
    """Close a container of `open_container` and open the same file again, at its beginning."""
    file = container.file.file if container.file is not None else None
    container.close()
    if file is not None:
        file.seek(0)
    return open_container(container.name.removeprefix("file:") if file is None else file, name)


def _head(target: str | os.PathLike | BinaryIO) -> bytes:
    try:
        if isinstance(target, str | os.PathLike):
            with open(target, "rb") as file:
                return file.read(64)
        target.seek(0)
        return target.read(64)
    except (OSError, ValueError):
        return b""
