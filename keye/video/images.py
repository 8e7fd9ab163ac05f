"""A still picture as uint8 RGB [3, H, W], from a path, a URL, bytes, a file object, a PIL image or an array."""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps

from keye.errors import VideoError
from keye.video.arrays import as_picture
from keye.video.fetch import UrlRules, data_bytes, download, file_path, path_name, scheme_of, url_name
from keye.video.frame_objects import picture_of, unwrapped

ImageSource = str | os.PathLike | bytes | BinaryIO | Image.Image | torch.Tensor | np.ndarray

IMAGE_SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"),
}
BACKGROUND = "white"  # behind transparent pixels

# The formats that Pillow may read; JPEG includes MPO. Of the other forty or so, EPS runs another program (Ghostscript)
# and most are read by rarely used code.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000")
MAX_PIXELS = 65_000_000  # of one picture: those of the 64-megapixel cameras of phones; 195 MB as uint8


def load_image(source: ImageSource, urls: UrlRules | None = None) -> torch.Tensor:
    """The picture as uint8 [3, H, W], rotated by its EXIF orientation, transparency blended with white.

    Args:
        source: a path, a URL (`file:`, `data:`; `http(s):` if `urls` allows), bytes, a binary file object, a PIL image,
            values [3, H, W], [H, W, 3] or [H, W] (see `as_picture`), a frame of PyAV or torchcodec, or {"path",
            "bytes"} of `datasets`. Of an animation the first picture is taken. Files must be in one of `FORMATS` and
            have at most `MAX_PIXELS` pixels; PIL images and values are not limited.
        urls: what may be downloaded; None refuses `http(s):` URLs.

    Raises:
        VideoError: the picture cannot be read.
    """
    source = unwrapped(picture_of(source))
    if isinstance(source, torch.Tensor | np.ndarray):
        return as_picture(source)
    if isinstance(source, Image.Image):
        with _plain_errors("the image"):
            return rgb(source)
    with ExitStack() as stack:
        name, opened = _open(source, urls, stack)
        with open_image(opened, name) as image, _plain_errors(name):
            return rgb(image)


def open_image(opened: str | os.PathLike | BinaryIO, name: str) -> Image.Image:
    """Open a picture file, called `name` in messages, with Pillow, without reading its pixels.

    Raises:
        VideoError: the format is not in `FORMATS`, or the picture has more than `MAX_PIXELS` pixels.
    """
    with _plain_errors(name):
        image = Image.open(opened, formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            image.close()
            raise VideoError(
                f"{name} has {width}x{height} pixels, and at most {MAX_PIXELS:,} are allowed; make it smaller, or open"
                " it yourself and give its values"
            )
        return image


def _open(source: ImageSource, urls: UrlRules | None, stack: ExitStack) -> tuple[str, str | os.PathLike | BinaryIO]:
    """(the image's name, the path or file for Pillow)"""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"the image of {len(source)} bytes", io.BytesIO(source)
    if hasattr(source, "read"):
        return path_name(str(getattr(source, "name", "the image"))), source
    scheme = scheme_of(source)
    if scheme == "data":
        return url_name(source), io.BytesIO(data_bytes(source))
    if scheme not in (None, "file"):
        return url_name(source), stack.enter_context(download(source, urls))
    if not isinstance(source, str | os.PathLike):
        raise VideoError(f"the image is a {type(source).__name__}; give a path, bytes or uint8 values")
    if not os.fspath(source):
        raise VideoError("an image names no file; give a path, a URL or bytes")
    path = file_path(source) if scheme else Path(source)
    if not os.path.isfile(path):
        raise VideoError(f"{path_name(source)} does not exist; check the path")
    return path_name(source), path


@contextmanager
def _plain_errors(name: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # A warning only, for pictures below twice Pillow's limit; above that Pillow raises an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except VideoError:
        raise
    except Exception as error:  # on damaged files, Pillow's readers raise almost any exception
        raise VideoError(
            f"{name} is not a readable image ({reason(error)}); replace it or convert it to png"
        ) from error


def reason(error: Exception) -> str:
    """The reason of an error in a few words."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "no known format"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:120]


def rgb(image: Image.Image) -> torch.Tensor:
    """A PIL image's current frame as uint8 [3, H, W], by its EXIF orientation, transparency blended with white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip values above 255 to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
