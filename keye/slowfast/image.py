"""A still picture as uint8 RGB [3, H, W], from a path, bytes, a file object, a PIL image or an array."""

import io
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from keye.errors import VideoError

ImageSource = str | os.PathLike | bytes | BinaryIO | Image.Image | torch.Tensor | np.ndarray

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def load_image(source: ImageSource) -> torch.Tensor:
    """The picture as uint8 [3, H, W], turned as its EXIF says, transparency laid on white; VideoError if unreadable."""
    if isinstance(source, torch.Tensor | np.ndarray):
        pixels = torch.as_tensor(source)
        if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != torch.uint8 or 0 in pixels.shape:
            found = f"{str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}"
            raise VideoError(f"an image must be uint8 [3, H, W], not {found}; permute or convert it")
        return pixels
    if isinstance(source, Image.Image):
        return _rgb(source)
    if isinstance(source, str | os.PathLike) and not Path(source).is_file():
        raise VideoError(f"{source} does not exist; check the path")
    name = str(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", "the image"))
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _rgb(image)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{name} is not a readable image; replace it or convert it to png") from error


def _rgb(image: Image.Image) -> torch.Tensor:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
