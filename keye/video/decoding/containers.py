"""Opening one media file with FFmpeg, so that nothing but that file is ever read.

FFmpeg follows what is written in files: playlists (HLS, DASH, ffconcat, SDP) name other files and network addresses,
and a name such as `concat:a|b` or `http://…` is opened as a protocol. In a data set these are other people's words. So
only self-contained formats are admitted, only the `file` protocol, and paths are always given as paths.
"""

import os
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
from av.stream import Disposition
from av.video.frame import VideoFrame

from keye.errors import VideoError

# Formats that hold their own pictures. FFmpeg knows many more; those left out name other files (hls, dash, concat,
# image2, sdp, imf, …), talk to devices and networks, hold no video, or are of old games that nobody keeps safe.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,kux,live_flv,asf,ogg,mxf,nut,dv,rm,wtv,gxf,"
    "ivf,obu,av1,h261,h263,h264,hevc,vvc,evc,vc1,vc1test,cavsvideo,dirac,mjpeg,mjpeg_2000,yuv4mpegpipe,swf,gif,apng,"
    "dnxhd,dhav,lmlm4,nsv,ivr"
)
_FLATTEST = 10  # a pixel's longer side over its shorter one; what claims more is not believed
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"v=0\r", b"v=0\n", b"<MPD", b"<SmoothStreamingMedia", b"<?xml", b"[playlist]")


MAX_FRAME_PIXELS = 36_000_000  # on the screen: 8192x4320 and 7680x4320 are within; 108 MB a frame as uint8


def open_container(target: str | os.PathLike | BinaryIO, name: str) -> av.container.InputContainer:
    """Open a path or a seekable binary file, called `name` in messages, with limits for what its decoder may allocate.

    VideoError if it is no video to be decoded, or has frames of more than `MAX_FRAME_PIXELS`.
    """
    inside = isinstance(target, str | os.PathLike)
    options = {"protocol_whitelist": "file" if inside else "none", "format_whitelist": _FORMATS}
    try:
        container = av.open(
            f"file:{Path(target).absolute()}" if inside else target,
            options=_decoder_limits(),
            container_options=options,
            metadata_errors="replace",  # titles in unknown encodings
        )
    except (av.error.FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
        if _head(target).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(_PLAYLISTS):
            raise VideoError(f"{name} is a playlist, which only names videos; give the video itself") from error
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"{name} is not a readable video ({reason}); replace it or convert it to mp4") from error
    problem, stream = None, video_stream(container)
    if not container.streams.video:
        problem = "has no video stream; give a file with pictures in it"
    elif stream is None:
        problem = "is sound with a picture for its cover; give a file with a video in it"
    elif stream.codec_context is None:
        problem = "is coded in a way that no decoder here knows; convert it to mp4 with H.264"
    else:
        height, width = shown_size(stream.codec_context, stream.sample_aspect_ratio)
        if width * height > MAX_FRAME_PIXELS:
            problem = f"has {width}x{height} pixels, and {MAX_FRAME_PIXELS:,} are the most; make it smaller"
        stream.codec_context.options = _decoder_limits()  # for frames that grow on the way
    if problem:
        container.close()
        raise VideoError(f"{name} {problem}")
    return container


def video_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first stream of a container that is a video, not the cover of what there is to hear."""
    moving = (stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic)
    return next(moving, None)


def shown_size(coded: av.VideoCodecContext | VideoFrame, aspect: Fraction | None) -> tuple[int, int]:
    """(height, width) on the screen, before turning, of pixels whose width is `aspect` times their height.

    The shorter side of a pixel is stretched, so that nothing is lost.
    """
    believed = aspect is not None and 1 / _FLATTEST <= aspect <= _FLATTEST
    aspect = aspect if believed else Fraction(1)
    if aspect > 1:
        return coded.height, round(coded.width * aspect)
    return round(coded.height / aspect), coded.width


def _decoder_limits() -> dict[str, str]:
    """Options of FFmpeg's decoders. They count whole blocks, which may stand out over the edges of a picture."""
    return {"max_pixels": str(MAX_FRAME_PIXELS + MAX_FRAME_PIXELS // 8)}


def reopen(container: av.container.InputContainer, name: str) -> av.container.InputContainer:
    """Close a container that `open_container` opened and open the same file anew, at its beginning."""
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
