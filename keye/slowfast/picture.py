"""Decoded frames as RGB pixels: colours as the file tags them, turned as its display matrix says, all of one size."""

import av
import numpy as np
import torch
from av.video.frame import VideoFrame

from keye.errors import VideoError

_HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273
_BT2020 = 9  # its primaries


class Painter:
    """Makes uint8 [3, H, W] of decoded frames, and notes what is lost in it in `notes`, a sentence each.

    The matrix (BT.601, BT.709, BT.2020) and the range of luma are those of the file's tags, BT.601 and limited where
    it has none, as FFmpeg takes them. More than 8 bits are rounded; transparent pixels lie on white, as in images.
    `size`, (height, width) after turning, is that of the first frame; later frames of other sizes are resized to it.
    """

    def __init__(self, name: str, threads: int | None):
        self.name, self.threads = name, threads
        self.size: tuple[int, int] | None = None
        self.notes: dict[str, str] = {}
        self._reformatter = av.video.reformatter.VideoReformatter()

    def measure(self, frame: VideoFrame) -> tuple[int, int]:
        """A frame's (height, width) after turning."""
        return (frame.width, frame.height) if _turns(frame) % 2 else (frame.height, frame.width)

    def paint(self, frame: VideoFrame, time: float) -> torch.Tensor:
        """uint8 [3, H, W] of the frame at `time` seconds, H and W being `size`."""
        self.size = self.size or self.measure(frame)
        self._note(frame, time)
        turns = _turns(frame)
        height, width = self.size[::-1] if turns % 2 else self.size
        see_through = frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)
        if any(part.bits < 8 for part in frame.format.components):  # which FFmpeg spreads to 8 bits only this way
            frame = self._convert(frame, width, height, "rgb24")
        deep = any(part.bits > 8 for part in frame.format.components)
        if see_through or deep or width % 32 == 0:
            # FFmpeg converts to planes faster than to interleaved colours, more than 8 bits also more exactly (0.3 of
            # a level instead of 1.5), and planes are what the measures want.
            shown = self._convert(frame, width, height, "gbrap" if see_through else "gbrp")
            green, blue, red, *alpha = (_rows(plane)[:height, :width] for plane in shown.planes)
            pixels = np.stack([red, green, blue])
            if see_through:
                pixels = _on_white(pixels, alpha[0])
        else:
            # Its fast way from 8-bit yuv420p to planes leaves the last columns of other widths unwritten.
            (plane,) = self._convert(frame, width, height, "rgb24").planes
            rows = _rows(plane)[:height, : 3 * width].reshape(height, width, 3)
            pixels = np.ascontiguousarray(rows.transpose(2, 0, 1))
        if turns:
            pixels = np.ascontiguousarray(np.rot90(pixels, turns, axes=(1, 2)))
        return torch.from_numpy(pixels)

    def _convert(self, frame: VideoFrame, width: int, height: int, form: str) -> VideoFrame:
        try:
            return self._reformatter.reformat(frame, width, height, form, threads=self.threads)
        except (av.error.FFmpegError, ValueError):  # a matrix that FFmpeg does not know, such as YCgCo or ICtCp
            wide = frame.color_primaries == _BT2020
        matrix = "BT2020" if wide else "ITU709"
        try:
            shown = self._reformatter.reformat(
                frame, width, height, form, src_colorspace=matrix, dst_colorspace=matrix, threads=self.threads
            )
        except (av.error.FFmpegError, ValueError) as error:
            reason = f"{frame.format.name}: {getattr(error, 'strerror', None) or error}"
            raise VideoError(f"frames of {self.name} cannot be shown ({reason}); convert it to mp4") from error
        name = "BT.2020" if wide else "BT.709"
        self.notes["matrix"] = f"{self.name} has colours of a rare kind ({frame.colorspace}); they are taken for {name}"
        return shown

    def _note(self, frame: VideoFrame, time: float) -> None:
        found = self.measure(frame)
        if found != self.size and "size" not in self.notes:
            self.notes["size"] = (
                f"{self.name} changes from {self.size[1]}x{self.size[0]} to {found[1]}x{found[0]} at {time:.2f} s"
                "; what follows is resized to the first size"
            )
        if frame.color_trc in _HDR and "hdr" not in self.notes:
            self.notes["hdr"] = (
                f"{self.name} is HDR ({_HDR[frame.color_trc]}); it is shown without tone mapping, too pale"
            )
        if frame.interlaced_frame and "interlaced" not in self.notes:
            self.notes["interlaced"] = (
                f"{self.name} is interlaced; its frames are used whole, with combs where something moves"
            )


def _turns(frame: VideoFrame) -> int:
    """Quarter turns to the left."""
    return round(frame.rotation / 90) % 4


def _rows(plane: av.video.plane.VideoPlane) -> np.ndarray:
    """uint8 [rows, bytes of a row], padding and all."""
    return np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)


def _on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """uint8 [3, H, W] laid on white; alpha: uint8 [H, W]."""
    if alpha.min() == 255:
        return pixels
    wide = pixels.astype(np.uint16) * alpha + 255 * (255 - alpha.astype(np.uint16))
    return ((wide + 127) // 255).astype(np.uint8)
