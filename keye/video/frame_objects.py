"""Frames of other libraries: PyAV, torchcodec, OpenCV, `datasets`, and arrays of other frameworks.

Of these only PyAV is imported, which the package needs anyway; objects of the others are recognised by attributes.
"""

import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import NamedTuple

import av
import numpy as np
import torch

from keye.errors import VideoError
from keye.video.decoding.picture import FrameConverter

_CV2_POSITION, _CV2_RATE, _CV2_COUNT = 1, 5, 7  # cv2.CAP_PROP_POS_FRAMES, _FPS, _FRAME_COUNT


class Timed(NamedTuple):
    """A picture with its time in seconds; a plain pair (seconds, picture) is accepted, too."""

    time: float
    picture: object


def unwrapped(source: object) -> object:
    """The content of {"path", "bytes"} of `datasets`, and arrays of other frameworks as NumPy arrays."""
    if isinstance(source, Mapping) and source and set(source) <= {"path", "bytes"}:
        inside = source.get("bytes")
        inside = source.get("path") if inside is None else inside
        if inside is None:
            raise VideoError(f"{dict(source)} has neither bytes nor a path; give one of them")
        return inside
    known = isinstance(source, torch.Tensor | np.ndarray) or hasattr(source, "getbands")  # PIL images
    if not known and hasattr(source, "__array__") and hasattr(source, "shape"):
        return np.asarray(source)
    return source


def is_batch(source: object) -> bool:
    """Whether `source` is torchcodec's FrameBatch: data uint8 [T, …], pts_seconds [T] and duration_seconds [T]."""
    return hasattr(source, "pts_seconds") and getattr(getattr(source, "data", None), "ndim", 0) == 4


def is_capture(source: object) -> bool:
    """Whether `source` is a `cv2.VideoCapture`."""
    return type(source).__name__ == "VideoCapture" and hasattr(source, "grab") and hasattr(source, "retrieve")


def captured(capture: object) -> Iterator[Timed]:
    """The frames of a `cv2.VideoCapture` from its beginning in RGB, timed by its rate, decoded one by one.

    Raises:
        VideoError: the capture is not open, or has no rate or no end.
    """
    if not capture.isOpened():
        raise VideoError("the cv2.VideoCapture is not open; open it again, or give its path")
    rate, count = capture.get(_CV2_RATE), capture.get(_CV2_COUNT)
    if not (0 < rate < math.inf and count > 0):
        raise VideoError("the cv2.VideoCapture has no rate or no end, like a camera; give its frames to stream()")
    capture.set(_CV2_POSITION, 0)
    return _read(capture, rate)


def _read(capture: object, rate: float) -> Iterator[Timed]:
    index = 0
    while True:
        there, picture = capture.read()
        if not there:
            return
        yield Timed(index / rate, picture[..., ::-1] if picture.ndim == 3 else picture)  # OpenCV has BGR
        index += 1


def time_of(frame: object) -> float | None:
    """Seconds of a frame that has its own time, else None."""
    time = None
    if isinstance(frame, av.VideoFrame):
        time = frame.time
    elif hasattr(frame, "pts_seconds"):
        time = float(frame.pts_seconds)
    elif isinstance(frame, tuple) and len(frame) == 2 and isinstance(frame[0], Real):
        time = float(frame[0])
    return time


def picture_of(frame: object) -> object:
    """The picture of a frame without its time, as `load_image` accepts it."""
    if isinstance(frame, av.VideoFrame):
        return FrameConverter("the frame", None).paint(frame, frame.time or 0.0)
    if hasattr(frame, "pts_seconds"):
        return frame.data
    return frame[1] if time_of(frame) is not None else frame
