"""An encoded video in one file: safetensors with uint8 patches, the plan and a checksum."""

import hashlib
import os
from typing import TYPE_CHECKING

import torch

from keye.slowfast.plan import VideoPlan

if TYPE_CHECKING:
    from keye.encoder import EncodedVideo

_ROWS = 4096  # patches packed at once


def pack(video: "EncodedVideo", path: str | os.PathLike) -> None:
    """Write pixels and plan as safetensors; uint8 where that loses nothing, which is a quarter of the size."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    pixels = video.pixel_values
    codes = torch.empty(pixels.shape, dtype=torch.uint8)
    for start in range(0, len(pixels), _ROWS):
        codes[start : start + _ROWS] = ((pixels[start : start + _ROWS] + 1) * 127.5).round_().clamp_(0, 255)
    exact = pixels.dtype == torch.float32 and torch.equal(_decode(codes), pixels)
    tensors = {"patches": codes if exact else pixels.contiguous(), "grid_thw": video.grid_thw.contiguous()}
    plan = video.plan.to_json()
    try:
        save_file(tensors, path, metadata={"plan": plan, "checksum": _checksum(tensors, plan)})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def unpack(path: str | os.PathLike) -> "EncodedVideo":
    """The video that `pack` wrote, bit for bit; ValueError (or what safetensors raises) when the file is damaged."""
    from safetensors import safe_open

    from keye.encoder import EncodedVideo

    os.stat(path)  # FileNotFoundError as of any other file
    with safe_open(path, "pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in ("patches", "grid_thw")}
    if _checksum(tensors, about["plan"]) != about["checksum"]:
        raise ValueError(f"{path} is damaged")
    pixels = tensors["patches"]
    pixels = _decode(pixels) if pixels.dtype == torch.uint8 else pixels.clone()
    return EncodedVideo(pixels, tensors["grid_thw"].clone(), VideoPlan.from_json(about["plan"]))


def _decode(codes: torch.Tensor) -> torch.Tensor:
    """uint8 as float32 in [-1, 1], by the very operations that the encoder uses."""
    return codes.to(torch.float32).div_(127.5).sub_(1)


def _checksum(tensors: dict[str, torch.Tensor], plan: str) -> str:
    digest = blake(plan.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(memoryview(tensors[name].numpy()).cast("B") if tensors[name].numel() else b"")
    return digest.hexdigest()


def blake(data: bytes | memoryview = b"") -> "hashlib._Hash":
    """The hash that cache and packed files use, 20 bytes."""
    return hashlib.blake2b(data, digest_size=20)
