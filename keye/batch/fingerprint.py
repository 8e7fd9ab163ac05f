"""Fingerprints of sources and code, by which the cache finds its entries."""

import contextlib
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch

import keye
from keye.batch.packed import blake
from keye.video.fetch import scheme_of

_END = 64 << 10  # bytes that are sampled at each end of a file
_SAMPLE, _PLACES = 4096, 16  # bytes that are sampled between parts of a file, and the number of parts


def stamp(source: object) -> object:
    """Sizes and times that change when a file, or a file of a folder or list, changes; None for other sources."""
    if isinstance(source, Mapping):
        source = source.get("path")
    if isinstance(source, list | tuple):
        return [stamp(part) for part in source]
    with contextlib.suppress(OSError, ValueError):
        if isinstance(source, str | os.PathLike) and not scheme_of(source):
            path = Path(source)
            inside = sorted(path.iterdir()) if path.is_dir() else []
            return [marks(path.stat()), *((part.name, marks(part.stat())) for part in inside)]
    return None


def marks(about: os.stat_result) -> tuple[int, ...]:
    """Metadata of a file that change with its content: a write sets ctime, which programs cannot set themselves."""
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def samples(file: BinaryIO, size: int) -> bytes:
    """The ends of a file and places spread evenly between them."""
    parts = [file.read(_END)]
    for place in range(1, _PLACES):
        file.seek(size * place // _PLACES)
        parts.append(file.read(_SAMPLE))
    file.seek(max(0, size - _END))
    parts.append(file.read(_END))
    return b"".join(parts)


def lasting_name(source: object) -> list[str] | None:
    """The parts of a plan's name that belong to the key; plans of paths are renamed on each use."""
    if isinstance(source, str | os.PathLike):
        return None
    parts = source if isinstance(source, list | tuple) else ()
    inside = [str(part) for part in parts if isinstance(part, str | os.PathLike)]
    return [type(source).__name__, str(getattr(source, "name", "")), *inside]


def array_content(array: np.ndarray) -> str:
    data = memoryview(np.ascontiguousarray(array)).cast("B") if array.size else b""
    return hash_of(data, array.dtype, array.shape)


def hash_of(data: bytes | memoryview, *about: object) -> str:
    digest = blake("|".join(map(str, about)).encode())
    digest.update(data)
    return digest.hexdigest()


@functools.cache
def code_hash(*modules: str) -> str:
    """Hash of the code that makes plans and pixels, and of the versions of its libraries."""
    package, here = Path(keye.__file__).parent, Path(__file__).parent
    files = {package / "encoder.py", package / "encoded.py", here / "packed.py"}
    files |= {*(package / "slowfast").rglob("*.py"), *(package / "video").rglob("*.py")}
    files |= {Path(sys.modules[name].__file__) for name in modules if getattr(sys.modules.get(name), "__file__", None)}
    codes = [path.read_bytes() for path in sorted(files, key=lambda path: (path.name, path)) if path.is_file()]
    under = [library.__version__.partition("+")[0] for library in (keye, torch, av)]
    return hash_of(b"".join(codes), *map(len, codes), *under)


def plain_value(value: object) -> object:
    """Options as JSON values: tensors, arrays and sequences as lists, other numbers as floats."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain_value(part) for part in value]
    return float(value) if isinstance(value, Real) and not isinstance(value, int) else value
