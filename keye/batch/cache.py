"""Plans and encoded videos on disk, found again by what the video holds and how it is encoded.

An entry's key is the BLAKE2b of the file's bytes (not its name), of the encoder's settings, of the arguments and of the
code, so a renamed file is found and a changed one is not, and no entry outlives a change of a measure. A folder of
entries serves any number of processes without locks: an entry is written beside its place and moved there whole.
Nothing is ever unpickled: plans are JSON, pictures safetensors, both with a checksum.

    cache = Cache("~/.cache/keye", max_bytes=50 << 30)
    plan = cache.plan(encoder, "clip.mp4")
    video = cache.encode(encoder, "clip.mp4")
"""

import contextlib
import copy
import functools
import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
from PIL import Image

import keye
from keye.batch.packed import blake, pack, unpack
from keye.batch.protocol import Encoder
from keye.encoded import EncodedVideo, split_options
from keye.errors import KeyeError
from keye.slowfast.plan import VideoPlan
from keye.video.fetch import scheme_of
from keye.video.frame_objects import unwrapped
from keye.video.images import load_image

FORMAT = 2
"""Of the entries; raised when older ones are to be left alone."""

_BLOCK = 4096  # bytes; entries are counted in whole blocks, as file systems do
_FRESH = 2 * 10**9  # ns; a file younger than this may change again without its time changing
_END, _PLACES = 64 << 10, 16  # bytes at each end of a file, and parts between which a block is sampled
_ABANDONED = 3600  # s; then a part belongs to a process that died
_HERE = "\0source\0"  # stands for the clip's name inside warnings


class Cache:
    """Plans and encoded videos in `directory`, at most about `max_bytes` of them, the least recently used go first.

    hits, misses: how often an entry was there; rebuilt: how many of the misses were damaged entries. A URL's content
    is not known before it is fetched, so URLs pass through uncached. A measure of your own must be registered, and is
    known by its name and by the file that it is defined in.

    verify: how a file is known to be the one of an entry. "full": all its bytes are hashed each time. "quick": a file's
    hash is remembered under its path, size, inode, times of change (mtime and ctime) and a sample of its bytes (its
    ends and places between, at most 200 kB), and computed when any of them differs. A change that leaves all of these
    as they were goes unseen: on local file systems one made with the system's clock set back or beneath the file
    system, and only in bytes that are not sampled; file systems without ctime have the sample alone.
    """

    def __init__(self, directory: str | os.PathLike, max_bytes: int = 10 << 30, verify: str = "quick"):
        if verify not in ("quick", "full"):
            raise KeyeError(f'verify={verify!r} is not known; use "quick" or "full"')
        self.verify = verify
        if max_bytes < _BLOCK:
            raise KeyeError(f"max_bytes={max_bytes} holds no entry; give {_BLOCK} or more")
        self.directory, self.max_bytes = Path(directory).expanduser().resolve(), max_bytes
        self.hits = self.misses = self.rebuilt = 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KeyeError(f"{directory} cannot hold a cache ({error.strerror}); give a folder to write in") from error
        if not self._usage.exists():
            self._evict()

    def plan(self, encoder: Encoder, source: object, **options: object) -> VideoPlan:
        """`encoder.plan(source, **options)`, remembered. KeyeError when the encoder's settings do not say what it is.

        The plan's `source` is the name asked for now, whatever the file was called when the plan was made.
        """
        key, stamp = self._key(encoder, source, options), _stamp(source)
        if key is None:
            return encoder.plan(source, **options)
        plan = self._found(self._path("plans", key), _read_plan)
        if plan is None:
            plan = encoder.plan(source, **options)
            if _stamp(source) == stamp:
                self._store_plan(key, plan)
        return _renamed(plan, source)

    def encode(self, encoder: Encoder, source: object, **options: object) -> EncodedVideo:
        """`encoder(source, **options)`, remembered bit for bit (as uint8 pictures); `features` are computed anew."""
        output, sampling = split_options(options)
        key, stamp = self._key(encoder, source, sampling), _stamp(source)
        if key is None:
            return encoder(source, **options)
        video = self._found(self._path("frames", key), unpack)
        if video is None:
            video = without_tower(encoder)(source, **sampling, dtype=torch.uint8)
            if _stamp(source) == stamp:
                self._store(self._path("frames", key), lambda path: pack(video, path))
                self._store_plan(key, video.plan)
        return add_features(encoder, replace(video, plan=_renamed(video.plan, source)).to(**output))

    @property
    def counts(self) -> tuple[int, int, int]:
        """(hits, misses, rebuilt) so far."""
        return self.hits, self.misses, self.rebuilt

    def count(self, hits: int = 0, misses: int = 0, rebuilt: int = 0) -> None:
        """Add what another process counted on the same cache."""
        self.hits, self.misses, self.rebuilt = self.hits + hits, self.misses + misses, self.rebuilt + rebuilt

    @property
    def bytes(self) -> int:
        """About how many bytes the entries take; exact after each eviction."""
        with contextlib.suppress(OSError):
            return self._usage.stat().st_size * _BLOCK
        return 0

    @property
    def _usage(self) -> Path:
        """A sparse file whose length is the number of blocks in use: appending to it adds, in any process."""
        return self.directory / "usage"

    def _path(self, kind: str, key: str) -> Path:
        return self.directory / kind / key[:2] / (key + (".safetensors" if kind == "frames" else ".json"))

    def _key(self, encoder: Encoder, source: object, options: dict) -> str | None:
        settings = named_settings(encoder)
        content = self._content(source)
        if content is None:
            return None
        given = {name: _plain(value) for name, value in options.items() if value is not None and name != "urls"}
        code = _code(type(encoder.measure).__module__, type(encoder.policy).__module__)
        what = [FORMAT, code, content, _lasting_name(source), settings, given]
        return _hash(json.dumps(what, sort_keys=True).encode())

    def _content(self, source: object) -> str | None:
        """Hash of what a source holds; None for a URL or for what nobody here can read without using it up."""
        if isinstance(source, Mapping):
            source = unwrapped(source)
        if isinstance(source, str | os.PathLike):
            return None if scheme_of(source) else self._path_content(Path(source))
        if isinstance(source, bytes | bytearray | memoryview):
            return _hash(source)
        if isinstance(source, torch.Tensor | np.ndarray):
            return _array_content(np.asarray(source))
        if isinstance(source, list | tuple):
            parts = [self._content(part) for part in source]
            return None if None in parts else _hash(json.dumps(["list", *parts]).encode())
        if isinstance(source, Image.Image) and getattr(source, "n_frames", 1) == 1:
            return _array_content(load_image(source).numpy())
        if hasattr(source, "seekable") and source.seekable():
            start = source.tell()
            source.seek(0)  # where the encoder begins, too
            content = hashlib.file_digest(source, blake).hexdigest()
            source.seek(start)
            return content
        return None

    def _path_content(self, path: Path) -> str | None:
        try:
            if path.is_dir():
                inside = sorted(part for part in path.iterdir() if part.is_file())
                return _hash(json.dumps(["folder", *((one.name, self._path_content(one)) for one in inside)]).encode())
            about = path.stat()
            with path.open("rb") as file:
                if self.verify == "full":
                    return hashlib.file_digest(file, blake).hexdigest()
                samples = _samples(file, about.st_size)
                known = self._path("files", _hash(samples, path.absolute(), *_marks(about)))
                content = self._found(known, _read_text, counted=False)
                if content is None:
                    file.seek(0)
                    content = hashlib.file_digest(file, blake).hexdigest()
                    if time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) > _FRESH:
                        self._store(known, lambda to: _write_json(to, content))
        except OSError:
            return None  # the encoder says what is wrong with it
        return content

    def _found(self, path: Path, read: Callable[[Path], object], counted: bool = True) -> object | None:
        """What `read` makes of an entry, or None when it is missing or damaged."""
        found, damaged = None, False
        try:
            found = read(path)
            now = time.time_ns()
            os.utime(path, ns=(now, now))
        except FileNotFoundError:
            pass
        except OSError:
            pass  # a read-only cache still serves: what was read before its time could not be set is good
        except Exception:  # noqa: BLE001 - whatever a damaged file makes its reader say
            damaged = True
        if counted:
            self.count(found is not None, found is None, damaged)
        return found

    def _store_plan(self, key: str, plan: VideoPlan) -> None:
        anywhere = tuple(text.replace(plan.source, _HERE) for text in plan.warnings) if plan.source else plan.warnings
        values = replace(plan, warnings=anywhere).to_dict()
        self._store(self._path("plans", key), lambda path: _write_json(path, values))

    def _store(self, path: Path, write: Callable[[Path], None]) -> None:
        """Put an entry in its place whole; a full or read-only disk means that it is not remembered, no more."""
        part = path.with_name(f"{secrets.token_hex(8)}.part")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write(part)
                size = _blocks(part.stat().st_size)
                if size * _BLOCK > self.max_bytes // 2:
                    return  # it would drive out everything else
                now = time.time_ns()
                os.utime(part, ns=(now, now))
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
            with open(self._usage, "ab") as usage:
                usage.write(bytes(size))
                usage.flush()
                used = usage.tell()
            if used * _BLOCK > self.max_bytes:
                self._evict()

    def _evict(self) -> None:
        """Count what is there and remove the least recently used down to 90 % of the limit.

        Run once in so many writes as make a tenth of the limit, so its cost per write does not grow with the cache.
        Two processes may do it at once: both remove the same entries.
        """
        entries = sorted(self._entries())
        used = sum(blocks for _, blocks, _ in entries)
        for _, blocks, path in entries:
            if used * _BLOCK <= 0.9 * self.max_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            used -= blocks
        with contextlib.suppress(OSError):
            part = self.directory / f"{secrets.token_hex(8)}.part"
            with part.open("wb") as usage:
                usage.truncate(used)
            os.replace(part, self._usage)

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(when last used in ns, blocks, path) of every entry; what dead processes left is removed on the way."""
        for path in self.directory.glob("*/??/*"):
            with contextlib.suppress(OSError):
                about = path.stat()
                if path.suffix == ".part":
                    if time.time() - about.st_mtime > _ABANDONED:
                        path.unlink()
                    continue
                yield about.st_mtime_ns, _blocks(about.st_size), path


def named_settings(encoder: Encoder) -> dict:
    """The settings that build this encoder again; KeyeError when it holds an object that no name brings back."""
    for kind, label in (("measure", "name"), ("policy", "spec")):
        if not isinstance(getattr(getattr(encoder, kind), label, None), str):
            raise KeyeError(f"the encoder's {kind} has no {label}, so its plans cannot be cached; give it one")
    if encoder.tower is not None and hasattr(encoder.measure, "attach"):
        raise KeyeError(
            f"the measure {encoder.measure.name!r} depends on the vision tower's weights, which a cache cannot tell"
            " apart; use another measure, or no cache"
        )
    settings = encoder.settings
    try:
        again = type(encoder)(**settings)
    except KeyeError as error:
        raise KeyeError(f"the encoder cannot be cached, since its settings do not build it: {error}") from error
    for kind, name in (("measure", settings["measure"]), ("policy", settings["policy"])):
        if not _alike(getattr(again, kind), getattr(encoder, kind)):
            raise KeyeError(
                f"the encoder's {kind} is not the one that the name {name!r} stands for, so its plans cannot be cached;"
                " register it under a name of its own"
            )
    return settings


def _alike(one: object, other: object) -> bool:
    if type(one) is not type(other):
        return False
    try:
        return bool(getattr(one, "__dict__", None) == getattr(other, "__dict__", None))
    except (RuntimeError, ValueError):  # tensors and arrays have no single truth
        return False


def without_tower(encoder: Encoder) -> Encoder:
    """The same encoder, yielding pixels only."""
    if encoder.tower is None:
        return encoder
    bare = copy.copy(encoder)
    bare.tower = None
    return bare


def add_features(encoder: Encoder, video: EncodedVideo) -> EncodedVideo:
    """The video with the features of the encoder's tower, if it holds one."""
    if encoder.tower is None:
        return video
    with torch.inference_mode():
        return replace(video, features=encoder.tower(video.pixel_values, video.grid_thw))


def _read_plan(path: Path) -> VideoPlan:
    return VideoPlan.from_dict(_read_text(path))


def _read_text(path: Path) -> object:
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept["checksum"] != _hash(json.dumps(kept["value"]).encode()):
        raise ValueError(f"{path} is damaged")
    return kept["value"]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps({"checksum": _hash(json.dumps(value).encode()), "value": value}), encoding="utf-8")


def _renamed(plan: VideoPlan, source: object) -> VideoPlan:
    """The plan under the name it is asked for by; what has no name of its own keeps the one it was planned under."""
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else plan.source
    return replace(plan, source=name, warnings=tuple(text.replace(_HERE, name) for text in plan.warnings))


def _stamp(source: object) -> object:
    """What tells that a file, a folder's files or a list's were changed while they were read; None for the rest."""
    if isinstance(source, Mapping):
        source = source.get("path")
    if isinstance(source, list | tuple):
        return [_stamp(part) for part in source]
    with contextlib.suppress(OSError, ValueError):
        if isinstance(source, str | os.PathLike) and not scheme_of(source):
            path = Path(source)
            inside = sorted(path.iterdir()) if path.is_dir() else []
            return [_marks(path.stat()), *((part.name, _marks(part.stat())) for part in inside)]
    return None


def _marks(about: os.stat_result) -> tuple[int, ...]:
    """What the system tells of a file that changes with its content: a write sets ctime, which no program can set."""
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def _samples(file: BinaryIO, size: int) -> bytes:
    """The ends of a file and places spread evenly between them."""
    parts = [file.read(_END)]
    for place in range(1, _PLACES):
        file.seek(size * place // _PLACES)
        parts.append(file.read(_BLOCK))
    file.seek(max(0, size - _END))
    parts.append(file.read(_END))
    return b"".join(parts)


def _lasting_name(source: object) -> list[str] | None:
    """What of the name that a plan gets must be part of the key; paths are named afresh each time."""
    if isinstance(source, str | os.PathLike):
        return None
    parts = source if isinstance(source, list | tuple) else ()
    inside = [str(part) for part in parts if isinstance(part, str | os.PathLike)]
    return [type(source).__name__, str(getattr(source, "name", "")), *inside]


def _array_content(array: np.ndarray) -> str:
    data = memoryview(np.ascontiguousarray(array)).cast("B") if array.size else b""
    return _hash(data, array.dtype, array.shape)


def _hash(data: bytes | memoryview, *about: object) -> str:
    digest = blake("|".join(map(str, about)).encode())
    digest.update(data)
    return digest.hexdigest()


@functools.cache
def _code(*modules: str) -> str:
    """Hash of the code that makes plans and pixels, and of the libraries under it: what changes it changes them."""
    package, here = Path(keye.__file__).parent, Path(__file__).parent
    files = {package / "encoder.py", package / "encoded.py", here / "packed.py"}
    files |= {*(package / "slowfast").rglob("*.py"), *(package / "video").rglob("*.py")}
    files |= {Path(sys.modules[name].__file__) for name in modules if getattr(sys.modules.get(name), "__file__", None)}
    codes = [path.read_bytes() for path in sorted(files, key=lambda path: (path.name, path)) if path.is_file()]
    under = [library.__version__.partition("+")[0] for library in (keye, torch, av)]
    return _hash(b"".join(codes), *map(len, codes), *under)


def _plain(value: object) -> object:
    """Options as JSON takes them: tensors and arrays as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _blocks(size: int) -> int:
    return -(-size // _BLOCK)
