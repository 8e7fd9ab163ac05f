"""Checkpoints as streams: the tensors of a safetensors directory, read, changed and written one at a time.

A file is eight bytes of header length, a JSON header (dtype, shape and place of each tensor) and the bytes. Headers are
read first, so that everything that is wrong is known before anything is written; then each tensor travels alone, in
pieces of 16 MiB when nothing in it changes. Peak memory is therefore that of the largest tensor that is computed or
cast, far below one shard, and bytes that are only renamed are the same bytes (safetensors' own reader maps a whole
shard, its writer copies one).
"""

import json
import mmap
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from keye.errors import CheckpointError

INDEX = "model.safetensors.index.json"
PIECE = 16 << 20  # bytes read and written at once
MAX_SHARD = 5_000_000_000  # bytes of a shard, transformers' habit
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}

Progress = Callable[[int, int], None]
"""Told (bytes written, bytes in all) after every piece."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: `code` its dtype there, `start` and `size` its bytes' place."""

    path: Path
    code: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None for the dtypes that are only ever copied (8-bit floats)."""
        return DTYPES.get(self.code)

    def pieces(self) -> Iterator[bytes]:
        """The tensor's bytes as they are."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.size
            while left:
                piece = file.read(min(left, PIECE))
                left -= len(piece)
                yield piece

    def read(self) -> Tensor:
        """The tensor itself, in memory of its own."""
        if self.dtype is None:
            raise CheckpointError(f"{self.path}: a tensor of dtype {self.code} can be copied but not changed")
        raw = torch.empty(self.size, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(self.start)
            file.readinto(raw.numpy())
        return raw.view(self.dtype).reshape(self.shape)

    def mapped(self) -> Tensor:
        """The tensor as pages of its file: read when they are touched, and held once for all processes of a machine.

        Writing to it changes neither the file nor what other processes see.
        """
        if self.dtype is None:
            raise CheckpointError(f"{self.path}: a tensor of dtype {self.code} can be copied but not changed")
        count = self.size // self.dtype.itemsize
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        first = self.start - self.start % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            size = self.start - first + self.size
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=first)
        return torch.frombuffer(pages, dtype=self.dtype, count=count, offset=self.start - first).reshape(self.shape)

    def to(self, dtype: torch.dtype | None) -> "Stored | Computed":
        """The same tensor in another floating dtype; itself when that changes nothing."""
        if dtype in (None, self.dtype) or self.dtype is None or not self.dtype.is_floating_point:
            return self
        return Computed(self.shape, dtype, lambda: self.read().to(dtype))


@dataclass(frozen=True)
class Computed:
    """A tensor that is made when its turn comes: shape and dtype are known before."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def code(self) -> str:
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
            raise ValueError(f"promised {self.shape}, made {tuple(tensor.shape)}")
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        for at in range(0, len(raw), PIECE):
            yield memoryview(raw[at : at + PIECE])


Tensors = Mapping[str, Stored | Computed]


def of(tensor: Tensor) -> Computed:
    """A tensor that is already in memory."""
    return Computed(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def open_checkpoint(directory: str | Path) -> dict[str, Stored]:
    """All tensors of a directory's safetensors files, by name; nothing but headers is read.

    Raises:
        CheckpointError: no such directory, no safetensors in it, a shard that the index names but that is not there, or
            a file that is cut short.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; name one that holds config.json and safetensors files")
    index = directory / INDEX
    if index.is_file():
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        files = sorted(path.name for path in directory.glob("*.safetensors"))
    if not files:
        if any(directory.glob("*.bin")):
            raise CheckpointError(f"{directory}: only pickled weights (*.bin); save the model as safetensors first")
        raise CheckpointError(f"{directory}: no safetensors files; name a directory that a model was saved to")
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory}: {missing[0]} is missing ({len(missing)} of {len(files)} shards); download it again"
        )
    found: dict[str, Stored] = {}
    for name in files:
        found |= _header(directory / name)
    return found


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
                path, told["dtype"], tuple(told["shape"]), begin + told["data_offsets"][0],
                told["data_offsets"][1] - told["data_offsets"][0],
            )
            for name, told in header.items()
        }  # fmt: skip
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a safetensors file or damaged; download or save it again") from error
    end = max((t.start + t.size for t in found.values()), default=begin)
    if end > size:
        raise CheckpointError(f"{path}: cut short, {size:,} bytes of {end:,}; download it again")
    return found


def write_shards(
    tensors: Tensors, out: Path, max_shard: int = MAX_SHARD, progress: Progress | None = None
) -> list[str]:
    """Write tensors in the order given as `model.safetensors`, or as numbered shards with an index.

    A shard is closed before the tensor that would take it over `max_shard` bytes. Returns the names of the files.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.size > max_shard:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.size
    total, done = sum(t.size for t in tensors.values()), 0
    files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, groups, strict=True):
        for written in _write({name: tensors[name] for name in names}, out / file):
            done += written
            if progress is not None:
                progress(done, total)
    if len(groups) > 1:
        places = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    return files


def _write(tensors: Tensors, path: Path) -> Iterator[int]:
    """One safetensors file; yields the bytes of each piece written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.size]}
        at += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for piece in tensor.pieces():
                yield file.write(piece)
                del piece  # it is a view of its tensor, which must be gone before the next is made


@contextmanager
def whole_directory(out: str | Path) -> Iterator[Path]:
    """A directory that appears under its name only when it is complete; what was begun is removed after an error.

    Raises:
        CheckpointError: `out` is there already and not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; name a new directory or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        yield part
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_json(path: Path) -> dict:
    """A JSON file; CheckpointError when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; name a directory that a model was saved to") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download or save it again") from error


def write_json(path: Path, values: object) -> None:
    """Indented, as transformers writes them."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass
class Report:
    """How the tensors of a source fit a model; printing it gives one line for each kind of difference.

    missing: the model has them, the source has not. unexpected: the other way round. mismatched: (name, shape in the
    source, shape in the model). left_out: known and not needed, by reason. made: tensors that no source holds and that
    were drawn at random or extended, by reason. notes: sentences on what else is worth knowing.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    made: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    loaded: int = 0

    @property
    def clean(self) -> bool:
        """Nothing missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.mismatched)

    def compare(self, tensors: Tensors, expected: Mapping[str, tuple[int, ...]]) -> "Report":
        """Fill in what differs between tensors and the names and shapes of a model."""
        self.missing = [name for name in expected if name not in tensors]
        self.unexpected = [name for name in tensors if name not in expected]
        both = [name for name in expected if name in tensors]
        self.mismatched = [
            (name, tuple(tensors[name].shape), tuple(expected[name]))
            for name in both
            if tuple(tensors[name].shape) != tuple(expected[name])
        ]
        self.loaded = len(both) - len(self.mismatched)
        return self

    def refuse(self, where: object, allow_missing: bool = False) -> None:
        """CheckpointError unless all fits; `allow_missing` lets the model keep what it has for the missing ones."""
        if self.mismatched:
            name, there, here = self.mismatched[0]
            raise CheckpointError(
                f"{where}: {name} has shape {list(there)}, the model's is {list(here)} ({len(self.mismatched)} such); "
                "config.json and the weights are not of one model"
            )
        if self.missing and not allow_missing:
            raise CheckpointError(
                f"{where}: {len(self.missing)} weights are missing ({', '.join(folded(self.missing)[:3])}); "
                "complete the directory or allow missing weights"
            )

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors fit"]
        for reason, names in self.made.items():
            lines.append(f"{len(names)} made here, {reason}: {', '.join(folded(names)[:4])}")
        for reason, names in self.left_out.items():
            lines.append(f"{len(names)} left out, {reason}: {', '.join(folded(names)[:4])}")
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"{len(names)} {title}: {', '.join(folded(names))}")
        for name, there, here in self.mismatched:
            lines.append(f"another shape: {name} is {list(there)}, the model's is {list(here)}")
        return "\n".join(lines + self.notes)


def folded(names: list[str]) -> list[str]:
    """Names of numbered layers as one: `layers.{0..26}.mlp.fc1.weight`."""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        key = name if number is None else f"{name[: number.start(1)]}#{name[number.end(1) :]}"
        groups.setdefault(key, []).append(-1 if number is None else int(number[1]))
    return [key if numbers == [-1] else key.replace("#", _span(sorted(numbers)), 1) for key, numbers in groups.items()]


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{{{numbers[0]}..{numbers[-1]}}}" if whole else f"{{{','.join(map(str, numbers))}}}"
