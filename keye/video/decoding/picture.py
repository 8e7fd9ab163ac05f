"""Decoded frames in RGB as a player shows them: colours by the file's tags, square pixels, upright, of one size."""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import torch
from av.sidedata.sidedata import SideDataContainer, Type
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation

from keye.errors import VideoError
from keye.video.decoding.containers import display_matrix, shown_size

_HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273
_BT709, _UNSPECIFIED, _BT2020 = 1, 2, 9  # matrices and primaries of the same


class Orientation(NamedTuple):
    """How a picture is displayed: transposed, then mirrored along x and y."""

    transposed: bool
    flip_x: bool
    flip_y: bool


class FrameConverter:
    """Converts decoded frames to uint8 [3, H, W]; `notes` has a sentence about each kind of loss.

    The matrix (BT.601, BT.709, BT.2020) and the range of luma are those of the file's tags. Without tags, luma is
    limited and the matrix follows the picture's size, as in players: BT.709 from 1280 columns or 577 rows, BT.601
    below. More than 8 bits are rounded. Transparent pixels are blended with white, as in images. Pixels that are not
    square are stretched along their shorter side. `size`, (height, width) as displayed, is the first frame's; later
    frames of other sizes are resized to it.

    Args:
        name: the video's name in messages.
        threads: threads of a conversion; None takes FFmpeg's default.
        aspect: a pixel's width over its height, None if unknown.
        as_coded: ignore the aspect, and take untagged colours as BT.601 at any size, as FFmpeg converts them.
    """

    def __init__(self, name: str, threads: int | None, aspect: Fraction | None = None, as_coded: bool = False):
        self.name, self.threads, self.as_coded = name, threads, as_coded
        self.aspect = None if as_coded else aspect
        self.size: tuple[int, int] | None = None
        self.notes: dict[str, str] = {}
        self._reformatter = av.video.reformatter.VideoReformatter()

    def measure(self, frame: VideoFrame) -> tuple[int, int]:
        """A frame's (height, width) as displayed."""
        height, width = shown_size(frame, self.aspect)
        return (width, height) if orientation(frame).transposed else (height, width)

    def declared(self, stream: av.VideoStream) -> tuple[int, int]:
        """The (height, width) of a stream as displayed, by its container, which also fills `notes`."""
        self._note_format(stream.codec_context.color_trc, stream.codec_context.field_order > 1)
        height, width = shown_size(stream.codec_context, self.aspect)
        return (width, height) if _orientation(display_matrix(stream)).transposed else (height, width)

    def paint(self, frame: VideoFrame, time: float) -> torch.Tensor:
        """The frame at `time` seconds as uint8 [3, H, W], with (H, W) = `size`.

        Raises:
            VideoError: FFmpeg cannot convert the frame.
        """
        self.size = self.size or self.measure(frame)
        self._note(frame, time)
        layout = orientation(frame)
        height, width = self.size[::-1] if layout.transposed else self.size
        self._settle_matrix(frame)
        transparent = frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)
        if any(part.bits < 8 for part in frame.format.components):  # only this conversion scales them to 8 bits
            frame = self._convert(frame, width, height, "rgb24")
        deep = any(part.bits > 8 for part in frame.format.components)
        scaled = (frame.width, frame.height) != (width, height)
        if transparent or deep or scaled or width % 32 == 0:
            # FFmpeg converts to planes faster than to interleaved colours, and more than 8 bits more precisely (0.3 of
            # a level instead of 1.5); the measures need planes.
            shown = self._convert(frame, width, height, "gbrap" if transparent else "gbrp")
            green, blue, red, *alpha = (_rows(plane)[:height, :width] for plane in shown.planes)
            pixels = np.stack([red, green, blue])
            if transparent:
                pixels = _on_white(pixels, alpha[0])
        else:
            # For these widths, FFmpeg's fast conversion of 8-bit yuv420p to planes leaves the last columns unwritten.
            (plane,) = self._convert(frame, width, height, "rgb24").planes
            rows = _rows(plane)[:height, : 3 * width].reshape(height, width, 3)
            pixels = np.ascontiguousarray(rows.transpose(2, 0, 1))
        if any(layout):
            pixels = pixels.transpose(0, 2, 1) if layout.transposed else pixels
            pixels = np.ascontiguousarray(pixels[:, :: -1 if layout.flip_y else 1, :: -1 if layout.flip_x else 1])
        return torch.from_numpy(pixels)

    def _settle_matrix(self, frame: VideoFrame) -> None:
        """Tag a frame without a colour matrix with the matrix that its size suggests."""
        if frame.colorspace != _UNSPECIFIED or frame.format.is_rgb or self.as_coded:
            return
        if frame.color_primaries == _BT2020:
            frame.colorspace = _BT2020
        elif frame.width >= 1280 or frame.height > 576:
            frame.colorspace = _BT709

    def _convert(self, frame: VideoFrame, width: int, height: int, form: str) -> VideoFrame:
        scaled = (frame.width, frame.height) != (width, height)
        smooth = Interpolation.BICUBIC if scaled else None
        try:
            return self._reformatter.reformat(frame, width, height, form, interpolation=smooth, threads=self.threads)
        except (av.error.FFmpegError, ValueError):  # a matrix that FFmpeg does not know, such as YCgCo or ICtCp
            wide = frame.color_primaries == _BT2020
        matrix = "BT2020" if wide else "ITU709"
        try:
            shown = self._reformatter.reformat(
                frame, width, height, form, src_colorspace=matrix, dst_colorspace=matrix, threads=self.threads
            )
        except (av.error.FFmpegError, ValueError) as error:
            reason = f"{frame.format.name}: {getattr(error, 'strerror', None) or error}"
            raise VideoError(f"frames of {self.name} cannot be converted ({reason}); convert it to mp4") from error
        name = "BT.2020" if wide else "BT.709"
        self.notes["matrix"] = f"{self.name} has an unsupported colour matrix ({frame.colorspace}); {name} is used"
        return shown

    def _note(self, frame: VideoFrame, time: float) -> None:
        found = self.measure(frame)
        if found != self.size and "size" not in self.notes:
            self.notes["size"] = (
                f"{self.name} changes from {self.size[1]}x{self.size[0]} to {found[1]}x{found[0]} at {time:.2f} s"
                "; later frames are resized to the first size"
            )
        self._note_format(frame.color_trc, frame.interlaced_frame)

    def _note_format(self, transfer: int, interlaced: bool) -> None:
        if transfer in _HDR and "hdr" not in self.notes:
            self.notes["hdr"] = (
                f"{self.name} is HDR ({_HDR[transfer]}); it is converted without tone mapping and looks pale"
            )
        if interlaced and "interlaced" not in self.notes:
            self.notes["interlaced"] = (
                f"{self.name} is interlaced; its frames are not deinterlaced, so moving edges have comb artefacts"
            )


def orientation(frame: VideoFrame) -> Orientation:
    """The orientation of the frame's display matrix, to the nearest quarter turn, mirrored or not."""
    # Not `frame.side_data`: that container and the frame would reference each other, and the picture would stay in
    # memory until Python's next garbage collection.
    matrix = SideDataContainer(frame).get(Type.DISPLAYMATRIX)
    return _orientation(None if matrix is None else np.frombuffer(matrix, np.int32)[:5].tolist())


def _orientation(matrix: Sequence[int] | None) -> Orientation:
    """The orientation of the first five values of a display matrix."""
    if matrix is None:
        return Orientation(False, False, False)
    # A point (x, y) of the picture is displayed at (a x + c y, b x + d y), apart from a shift.
    a, b, _, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(True, c < 0, b < 0)
    return Orientation(False, a < 0, d < 0)


def _rows(plane: av.video.plane.VideoPlane) -> np.ndarray:
    """uint8 [rows, bytes of a row], including padding."""
    return np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)


def _on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """uint8 [3, H, W] blended with white; alpha: uint8 [H, W]."""
    if alpha.min() == 255:
        return pixels
    wide = pixels.astype(np.uint16) * alpha + 255 * (255 - alpha.astype(np.uint16))
    return ((wide + 127) // 255).astype(np.uint8)
