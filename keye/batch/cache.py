"""A cache of plans and encoded videos on disk, by the video's content and the encoder's settings.

An entry's key is the BLAKE2b of the file's bytes (not its name), the encoder's settings, the arguments and the code. A
renamed file is therefore found, a changed one is not, and entries become invalid when a measure changes. Any number of
processes share a folder without locks: entries are written under a temporary name and renamed. Nothing is unpickled:
plans are JSON, pictures safetensors, both with a checksum.

    cache = Cache("~/.cache/keye", max_bytes=50 << 30)
    plan = cache.plan(encoder, "clip.mp4")
    video = cache.encode(encoder, "clip.mp4")
"""

import contextlib
import copy
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from keye.aggregation.plans import plan_features
from keye.batch.fingerprint import array_content, code_hash, hash_of, lasting_name, marks, plain_value, samples, stamp
from keye.batch.packed import blake, pack, unpack
from keye.batch.protocol import Encoder
from keye.checks import integer
from keye.encoded import EncodedVideo, split_options
from keye.errors import KeyeError
from keye.slowfast.plan import VideoPlan
from keye.video.fetch import scheme_of
from keye.video.frame_objects import unwrapped
from keye.video.images import load_image

FORMAT = 2
"""Version of the entries; a new version ignores older entries."""

_BLOCK = 4096  # bytes; sizes of entries are rounded up to blocks, as in file systems
_FRESH = 2 * 10**9  # ns; a file younger than this may change again without a change of its time
_ABANDONED = 3600  # seconds; older temporary files belong to processes that died
_NAME = "\0source\0"  # placeholder of the clip's name in warnings


class Cache:
    """A cache of plans and encoded videos in a folder.

    hits, misses: how often an entry was found or not. rebuilt: how many misses were damaged entries. URLs are not
    cached, since their content is unknown before a download. Your own measure must be registered; entries depend on
    its name and on the file that defines it.

    Args:
        directory: the folder; it is created if it does not exist.
        max_bytes: approximate size of the cache; the least recently used entries are removed first.
        verify: how a file is recognised. "full" hashes all its bytes each time. "quick" stores a file's hash under its
            path, size, inode, times of change (mtime and ctime) and a sample of its bytes (both ends and places between
            them, at most 200 kB), and hashes the file again when any of these differs. A change that alters none of
            them is missed: on local file systems a change of bytes that are not sampled, made with the system clock set
            back or below the file system; file systems without ctime rely on mtime and the sample.

    Raises:
        KeyeError: an argument is impossible, or the folder cannot be created.
    """

    def __init__(self, directory: str | os.PathLike, max_bytes: int = 10 << 30, verify: str = "quick"):
        if verify not in ("quick", "full"):
            raise KeyeError(f'verify={verify!r} is not known; use "quick" or "full"')
        self.verify = verify
        self.directory = Path(directory).expanduser().resolve()
        self.max_bytes = integer("max_bytes", max_bytes, _BLOCK)  # at least one entry
        self.hits = self.misses = self.rebuilt = 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KeyeError(
                f"the cache {directory} cannot be created ({error.strerror}); give a folder that you may write to"
            ) from error
        if not self._usage.exists():
            self._evict()

    def plan(self, encoder: Encoder, source: object, **options: object) -> VideoPlan:
        """`encoder.plan(source, **options)`, from the cache if possible.

        The plan's `source` is the name given now, even if the file had another name when it was planned.

        Raises:
            KeyeError: the encoder's settings do not identify it, see `named_settings`.
        """
        key, before = self._key(encoder, source, options), stamp(source)
        if key is None:
            return encoder.plan(source, **options)
        plan = self._found(self._path("plans", key), _read_plan)
        if plan is None:
            plan = encoder.plan(source, **options)
            if stamp(source) == before:
                self._store_plan(key, plan)
        return _renamed(plan, source)

    def encode(self, encoder: Encoder, source: object, **options: object) -> EncodedVideo:
        """`encoder(source, **options)`, from the cache if possible, identical to the bit; `features` are not cached."""
        output, sampling = split_options(options)
        key, before = self._key(encoder, source, sampling), stamp(source)
        if key is None:
            return encoder(source, **options)
        video = self._found(self._path("frames", key), unpack)
        if video is None:
            video = without_tower(encoder)(source, **sampling, dtype=torch.uint8)
            if stamp(source) == before:
                self._store(self._path("frames", key), lambda path: pack(video, path))
                self._store_plan(key, video.plan)
        return add_features(encoder, replace(video, plan=_renamed(video.plan, source)).to(**output))

    @property
    def counts(self) -> tuple[int, int, int]:
        """(hits, misses, rebuilt) so far."""
        return self.hits, self.misses, self.rebuilt

    def count(self, hits: int = 0, misses: int = 0, rebuilt: int = 0) -> None:
        """Add the counts of another process with the same cache."""
        self.hits, self.misses, self.rebuilt = self.hits + hits, self.misses + misses, self.rebuilt + rebuilt

    @property
    def bytes(self) -> int:
        """Approximate size of the entries; exact after each eviction."""
        with contextlib.suppress(OSError):
            return self._usage.stat().st_size * _BLOCK
        return 0

    @property
    def _usage(self) -> Path:
        """A sparse file whose length is the number of blocks in use; any process adds blocks by appending."""
        return self.directory / "usage"

    def _path(self, kind: str, key: str) -> Path:
        return self.directory / kind / key[:2] / (key + (".safetensors" if kind == "frames" else ".json"))

    def _key(self, encoder: Encoder, source: object, options: dict) -> str | None:
        settings = named_settings(encoder)
        content = self._content(source)
        if content is None:
            return None
        given = {name: plain_value(value) for name, value in options.items() if value is not None and name != "urls"}
        code = code_hash(type(encoder.measure).__module__, type(encoder.policy).__module__)
        what = [FORMAT, code, content, lasting_name(source), settings, given]
        return hash_of(json.dumps(what, sort_keys=True).encode())

    def _content(self, source: object) -> str | None:
        """Hash of a source's content; None for a URL and for sources that can be read only once."""
        if isinstance(source, Mapping):
            source = unwrapped(source)
        if isinstance(source, str | os.PathLike):
            return None if scheme_of(source) else self._path_content(Path(source))
        if isinstance(source, bytes | bytearray | memoryview):
            return hash_of(source)
        if isinstance(source, torch.Tensor | np.ndarray):
            return array_content(np.asarray(source))
        if isinstance(source, list | tuple):
            parts = [self._content(part) for part in source]
            return None if None in parts else hash_of(json.dumps(["list", *parts]).encode())
        if isinstance(source, Image.Image) and getattr(source, "n_frames", 1) == 1:
            return array_content(load_image(source).numpy())
        if hasattr(source, "seekable") and source.seekable():
            start = source.tell()
            source.seek(0)  # the encoder reads from the beginning, too
            content = hashlib.file_digest(source, blake).hexdigest()
            source.seek(start)
            return content
        return None

    def _path_content(self, path: Path) -> str | None:
        try:
            if path.is_dir():
                files = sorted(part for part in path.iterdir() if part.is_file())
                inside = [(file.name, self._path_content(file)) for file in files]
                return hash_of(json.dumps(["folder", *inside]).encode())
            about = path.stat()
            with path.open("rb") as file:
                if self.verify == "full":
                    return hashlib.file_digest(file, blake).hexdigest()
                sample = samples(file, about.st_size)
                known = self._path("files", hash_of(sample, path.absolute(), *marks(about)))
                content = self._found(known, _read_text, counted=False)
                if content is None:
                    file.seek(0)
                    content = hashlib.file_digest(file, blake).hexdigest()
                    if time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) > _FRESH:
                        self._store(known, lambda to: _write_json(to, content))
        except OSError:
            return None  # the encoder raises an error that names the problem
        return content

    def _found(self, path: Path, read: Callable[[Path], object], counted: bool = True) -> object | None:
        """The entry as `read` returns it; None if it is missing or damaged."""
        found, damaged = None, False
        try:
            found = read(path)
            now = time.time_ns()
            os.utime(path, ns=(now, now))
        except FileNotFoundError:
            pass
        except OSError:
            pass  # in a read-only cache the time cannot be set, but the entry was read
        except Exception:  # noqa: BLE001 - on damaged files, readers raise almost any exception
            damaged = True
        if counted:
            self.count(found is not None, found is None, damaged)
        return found

    def _store_plan(self, key: str, plan: VideoPlan) -> None:
        anywhere = tuple(text.replace(plan.source, _NAME) for text in plan.warnings) if plan.source else plan.warnings
        values = replace(plan, warnings=anywhere).to_dict()
        self._store(self._path("plans", key), lambda path: _write_json(path, values))

    def _store(self, path: Path, write: Callable[[Path], None]) -> None:
        """Write an entry atomically; on a full or read-only disk, nothing is stored."""
        part = path.with_name(f"{secrets.token_hex(8)}.part")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write(part)
                size = _blocks(part.stat().st_size)
                if size * _BLOCK > self.max_bytes // 2:
                    return  # it would evict most other entries
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
        """Measure the entries and remove the least recently used ones down to 90 % of the limit.

        This runs after writes of about a tenth of the limit, so its cost per write does not grow with the cache. Two
        processes may run it at the same time; both remove the same entries.
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
        """(last use in ns, blocks, path) of every entry; removes temporary files of dead processes."""
        for path in self.directory.glob("*/??/*"):
            with contextlib.suppress(OSError):
                about = path.stat()
                if path.suffix == ".part":
                    if time.time() - about.st_mtime > _ABANDONED:
                        path.unlink()
                    continue
                yield about.st_mtime_ns, _blocks(about.st_size), path


def named_settings(encoder: Encoder) -> dict:
    """The settings that build this encoder again.

    Raises:
        KeyeError: the encoder has a measure or policy that its settings do not identify.
    """
    for kind, label in (("measure", "name"), ("policy", "spec")):
        if not isinstance(getattr(getattr(encoder, kind), label, None), str):
            raise KeyeError(f"the encoder's {kind} has no {label}, so its plans cannot be cached; give it one")
    if encoder.tower is not None and hasattr(encoder.measure, "attach"):
        raise KeyeError(
            f"the measure {encoder.measure.name!r} depends on the vision tower's weights, which a cache does not"
            " distinguish; use another measure, or no cache"
        )
    settings = encoder.settings
    try:
        again = type(encoder)(**settings)
    except KeyeError as error:
        raise KeyeError(f"the encoder cannot be cached, since its settings do not build it: {error}") from error
    for kind, name in (("measure", settings["measure"]), ("policy", settings["policy"])):
        if not _equal(getattr(again, kind), getattr(encoder, kind)):
            raise KeyeError(
                f"the encoder's {kind} is not the one that is registered as {name!r}, so its plans cannot be cached;"
                " register it under a name of its own"
            )
    return settings


def _equal(one: object, other: object) -> bool:
    if type(one) is not type(other):
        return False
    try:
        return bool(getattr(one, "__dict__", None) == getattr(other, "__dict__", None))
    except (RuntimeError, ValueError):  # attributes with tensors or arrays
        return False


def without_tower(encoder: Encoder) -> Encoder:
    """The same encoder without its tower."""
    if encoder.tower is None:
        return encoder
    bare = copy.copy(encoder)
    bare.tower = None
    return bare


def add_features(encoder: Encoder, video: EncodedVideo) -> EncodedVideo:
    """The video with the features of the encoder's tower, if it has one."""
    if encoder.tower is None:
        return video
    with torch.inference_mode():
        return replace(video, features=plan_features(encoder.tower, video.pixel_values, video.grid_thw, video.plan))


def _read_plan(path: Path) -> VideoPlan:
    return VideoPlan.from_dict(_read_text(path))


def _read_text(path: Path) -> object:
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept["checksum"] != hash_of(json.dumps(kept["value"]).encode()):
        raise ValueError(f"{path} is damaged")
    return kept["value"]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps({"checksum": hash_of(json.dumps(value).encode()), "value": value}), encoding="utf-8")


def _renamed(plan: VideoPlan, source: object) -> VideoPlan:
    """The plan with the name of `source`; sources that are not paths keep the name in the plan."""
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else plan.source
    return replace(plan, source=name, warnings=tuple(text.replace(_NAME, name) for text in plan.warnings))


def _blocks(size: int) -> int:
    return -(-size // _BLOCK)
