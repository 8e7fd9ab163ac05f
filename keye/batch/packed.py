"""An encoded video in one file: safetensors with uint8 patches, the plan and a checksum."""

import hashlib
import os

import torch

from keye.encoded import EncodedVideo
from keye.slowfast.pixels import PixelFormat, as_bytes, normalised
from keye.slowfast.plan import VideoPlan

_ROWS = 4096  # patches that are packed together


def pack(video: EncodedVideo, path: str | os.PathLike) -> None:
    """Write pixels and plan as safetensors; as uint8 where that is lossless, at a quarter of the size.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    pixels, about = video.pixel_values.cpu(), "uint8"
    if pixels.dtype != torch.uint8:
        codes = torch.empty(pixels.shape, dtype=torch.uint8)
        for start in range(0, len(pixels), _ROWS):
            codes[start : start + _ROWS] = as_bytes(pixels[start : start + _ROWS])
        exact = video.format == PixelFormat() and torch.equal(normalised(codes), pixels)
        pixels, about = (codes, "float32") if exact else (pixels.contiguous(), "as it is")
    tensors = {"patches": pixels, "grid_thw": video.grid_thw.contiguous()}
    plan = video.plan.to_json()
    try:
        save_file(tensors, path, metadata={"plan": plan, "pixels": about, "checksum": _checksum(tensors, plan + about)})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def unpack(path: str | os.PathLike) -> EncodedVideo:
    """The video that `pack` wrote, identical to the bit.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is damaged; or an error of safetensors.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in ("patches", "grid_thw")}
    except Exception:
        # safetensors opens the file twice, and the second error of a file that another process has removed meanwhile
        # looks like damage.
        os.stat(path)
        raise
    if _checksum(tensors, about["plan"] + about["pixels"]) != about["checksum"]:
        raise ValueError(f"{path} is damaged")
    pixels = tensors["patches"]
    pixels = normalised(pixels) if about["pixels"] == "float32" else pixels.clone()
    form = PixelFormat(pixels.dtype) if about["pixels"] != "as it is" else PixelFormat()
    return EncodedVideo(pixels, tensors["grid_thw"].clone(), VideoPlan.from_json(about["plan"]), format=form)


def _checksum(tensors: dict[str, torch.Tensor], plan: str) -> str:
    digest = blake(plan.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(memoryview(tensors[name].numpy()).cast("B") if tensors[name].numel() else b"")
    return digest.hexdigest()


def blake(data: bytes | memoryview = b"") -> "hashlib._Hash":
    """The hash of the cache and of packed files, 20 bytes."""
    return hashlib.blake2b(data, digest_size=20)
