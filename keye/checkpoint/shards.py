"""Checkpoints as streams: the tensors of a safetensors directory, read, changed and written one at a time.

A file is eight bytes of header length, a JSON header (dtype, shape and offsets of each tensor) and the bytes. Headers
are read first, so that every error is found before anything is written. Then each tensor is copied alone, in pieces of
16 MiB if it does not change. Peak memory is that of the largest tensor that is computed or cast, and a renamed tensor
keeps its bytes. safetensors' own writer needs all tensors of a file in memory (docs/decisions.md).
"""

import json
import mmap
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from keye.errors import CheckpointError, writing

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PIECE = 16 << 20  # bytes per read and write
MAX_SHARD = 5_000_000_000  # bytes of a shard, as in transformers
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}

Progress = Callable[[int, int], None]
"""Called with (bytes written, total bytes) after every piece."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file. code: its dtype there; start, size: of its bytes in the file."""

    path: Path
    code: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None for dtypes that can only be copied (8-bit floats)."""
        return DTYPES.get(self.code)

    @property
    def known_dtype(self) -> torch.dtype:
        """`dtype`; CheckpointError for one that can only be copied."""
        if self.dtype is None:
            raise CheckpointError(
                f"{self.path}: a tensor of dtype {self.code} can be copied but not changed; save the model in bfloat16"
            )
        return self.dtype

    def pieces(self) -> Iterator[bytes]:
        """The tensor's bytes, unchanged."""
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(self.start)
            left = self.size
            while left:
                piece = file.read(min(left, PIECE))
                if not piece:
                    raise self._changed()
                left -= len(piece)
                yield piece

    def read(self) -> Tensor:
        """The tensor, in its own memory."""
        dtype = self.known_dtype
        raw = torch.empty(self.size, dtype=torch.uint8)
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(self.start)
            if file.readinto(raw.numpy()) != self.size:
                raise self._changed()
        return raw.view(dtype).reshape(self.shape)

    def mapped(self) -> Tensor:
        """The tensor as pages of its file: read on access, and in memory once for all processes of a machine.

        Writing to it changes neither the file nor the tensor in other processes.
        """
        dtype = self.known_dtype
        count = self.size // dtype.itemsize
        if not count:
            return torch.empty(self.shape, dtype=dtype)
        first = self.start - self.start % mmap.ALLOCATIONGRANULARITY
        with _reading(self.path), self.path.open("rb") as file:
            size = self.start - first + self.size
            if os.fstat(file.fileno()).st_size < self.start + self.size:
                raise self._changed()
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=first)
        return torch.frombuffer(pages, dtype=dtype, count=count, offset=self.start - first).reshape(self.shape)

    def _changed(self) -> CheckpointError:
        return CheckpointError(f"{self.path}: truncated, it changed while it was read; save or download it again")

    def to(self, dtype: torch.dtype | None) -> "Stored | Computed":
        """The same tensor in another floating dtype; itself if it has that dtype or is not floating."""
        if dtype in (None, self.dtype) or self.dtype is None or not self.dtype.is_floating_point:
            return self
        return Computed(self.shape, dtype, lambda: self.read().to(dtype))


@dataclass(frozen=True)
class Computed:
    """A tensor that is computed when it is written; its shape and dtype are known before."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def code(self) -> str:
        """The dtype in a safetensors file; CheckpointError for one that is not written."""
        if self.dtype not in CODES:
            raise CheckpointError(f"a tensor of dtype {self.dtype} cannot be written; save the model in bfloat16")
        return CODES[self.dtype]

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        return self.make()

    def pieces(self) -> Iterator[memoryview]:
        tensor = self.make().detach().to("cpu", self.dtype).contiguous()
        if tensor.shape != self.shape:
            raise ValueError(f"expected a tensor of shape {self.shape}, got {tuple(tensor.shape)}")
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        for at in range(0, len(raw), PIECE):
            yield memoryview(raw[at : at + PIECE])


Tensors = Mapping[str, Stored | Computed]


def in_memory(tensor: Tensor) -> Computed:
    """A tensor in memory as a `Computed`."""
    return Computed(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def open_checkpoint(directory: str | Path) -> dict[str, Stored]:
    """All tensors of a directory's safetensors files, by name; only headers are read.

    The files are those that transformers loads: `model.safetensors`, else the shards of the index. Without either they
    are all safetensors files.

    Raises:
        CheckpointError: no such directory, no safetensors in it, a missing shard of the index, or a file that is
            truncated, damaged or cannot be read.
    """
    directory = Path(directory)
    with _reading(directory):
        files = _files(directory)
    found: dict[str, Stored] = {}
    for path in files:
        with _reading(path):
            found |= _header(path)
    return found


def _files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; name one with config.json and safetensors files")
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    index = directory / INDEX
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
            raise CheckpointError(
                f"{index}: weight_map is {places!r:.80}, not a file name for each tensor; download or save it again"
            )
        files = [directory / name for name in sorted(set(places.values()))]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        if any(directory.glob("*.bin")):
            raise CheckpointError(f"{directory}: only pickled weights (*.bin); save the model as safetensors first")
        raise CheckpointError(f"{directory}: no safetensors files; name a directory that a model was saved to")
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise CheckpointError(
            f"{directory}: {missing[0]} is missing ({len(missing)} of {len(files)} shards); download it again"
        )
    return files


def _header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        begin = 8 + length
        found = {
            name: Stored(
                path, entry["dtype"], tuple(entry["shape"]), begin + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }  # fmt: skip
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file or damaged; download or save it again") from error
    end = max((t.start + t.size for t in found.values()), default=begin)
    if end > size:
        raise CheckpointError(f"{path}: truncated, {size:,} bytes of {end:,}; download it again")
    try:
        with safe_open(path, "np"):  # checks dtypes, shapes and offsets against each other, and reads no tensor
            return found
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged ({error}); download or save it again") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as a CheckpointError that names `path`."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; name a directory that a model was saved to") from None
    except OSError as error:
        why = error.strerror or str(error)
        raise CheckpointError(f"{path}: cannot be read ({why}); check its type and permissions") from error


def write_shards(
    tensors: Tensors, out: Path, max_shard: int = MAX_SHARD, progress: Progress | None = None
) -> list[str]:
    """Write tensors as `model.safetensors`, or as numbered shards with an index.

    Args:
        tensors: name → tensor, one or more. A file has its tensors in this order. A tensor larger than `max_shard` is
            computed and written before smaller ones that precede it and do not fill a shard.
        out: an existing directory.
        max_shard: bytes of a shard; only a tensor that is larger than this gives a larger shard, of its own.
        progress: called with (bytes written, total bytes) after every piece.

    Returns:
        The names of the files.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard,
    )
    done = 0
    for file, names in split.filename_to_tensors.items():
        for written in _write({name: tensors[name] for name in names}, out / file):
            done += written
            if progress is not None:
                progress(done, split.metadata["total_size"])
    if split.is_sharded:
        write_json(
            out / INDEX, {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        )
    return list(split.filename_to_tensors)


def _write(tensors: Tensors, path: Path) -> Iterator[int]:
    """One safetensors file; yields the bytes of each piece written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.size]}
        at += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of eight
    with writing(path, "the weights", CheckpointError), path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for piece in tensor.pieces():
                yield file.write(piece)
                del piece  # a view of its tensor, which must be freed before the next is computed


@contextmanager
def atomic_directory(out: str | Path) -> Iterator[Path]:
    """A directory that appears under its name only when it is complete, and is removed after an error.

    Raises:
        CheckpointError: `out` exists and is not empty, or cannot be made.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; name a new directory or remove it first")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    with writing(out, "the directory", CheckpointError):
        part.mkdir(parents=True)
    try:
        yield part
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_json(path: Path, remedy: str = "download or save it again") -> dict:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, cannot be read, or does not hold a JSON object (the message ends with
            `remedy`).
    """
    try:
        with _reading(path):
            values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object but of type {type(values).__name__}; {remedy}")
    return values


def write_json(path: Path, values: object) -> None:
    """Write a JSON file, indented as transformers does."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
