"""What sources make: encoded samples, a cache of them in RAM, and the list of those that could not be made."""

import glob
import json
import logging
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from keye.processor.processor import Sample
from keye.slowfast.pixels import exact_bytes, normalised

PIXELS = ("pixel_values", "pixel_values_videos")


@dataclass(frozen=True)
class Item:
    """One encoded sample, where it came from (`source`, `index`, `part`: enough to encode it again) and its caption.

    Normalised pixels that came from 8-bit frames are uint8, a quarter of the room: see `from_bytes`.
    """

    sample: Sample
    source: str
    index: int
    kind: str
    caption: str
    part: int = 0  # of a document that was split because it is longer than the context

    @property
    def tokens(self) -> int:
        return len(self.sample.input_ids)

    @property
    def ref(self) -> list[Any]:
        return [self.source, self.index]


class Quarantine:
    """Counts bad samples and writes each once to a JSONL file: file, line, reason. Threads may share it.

    Args:
        path: the file of rank 0; None writes nothing. rank: of this process. Each rank has a file of its own beside
            it (`quarantine-3.jsonl`), because lines that several machines append to one file can be torn.
    """

    def __init__(self, path: str | Path | None = None, rank: int = 0) -> None:
        self.first = Path(path) if path else None
        self.path = self.first
        if self.first is not None and rank:
            self.path = self.first.with_name(f"{self.first.stem}-{rank}{self.first.suffix}")
        self.seen: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        # A resumed run meets the same bad lines again; they may have been mended meanwhile, so only writing is spared.
        self.written = {(row["file"], row["line"]) for row in self.rows()}

    def __len__(self) -> int:
        return len(self.seen)

    def rows(self) -> list[dict[str, Any]]:
        """What all processes have written so far. Lines that a killed process left unfinished are passed over."""
        if self.first is None:
            return []
        others = self.first.parent.glob(f"{glob.escape(self.first.stem)}-*{self.first.suffix}")
        files = [path for path in (self.first, *sorted(others)) if path.exists()]
        lines = [line for path in files for line in path.read_text(encoding="utf-8", errors="replace").split("\n")]
        return [row for row in map(_quarantined, lines) if row is not None]

    def add(self, file: str, line: int, reason: str) -> None:
        """Record one bad sample; `line` counts from 1."""
        with self._lock:
            if (file, line) in self.seen:
                return
            self.seen.add((file, line))
            logging.getLogger("stages").warning("skipped %s line %d: %s", file, line, reason)
            if self.path is not None and (file, line) not in self.written:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab+") as out:
                    if out.tell() and _last_byte(out) != b"\n":  # the last line was torn
                        out.write(b"\n")
                    out.write((json.dumps({"file": file, "line": line, "reason": reason}) + "\n").encode())


def _quarantined(line: str) -> dict[str, Any] | None:
    """A line of the file, or None where it is torn."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and set(row) >= {"file", "line", "reason"} else None


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


class Cache:
    """Encoded samples in RAM up to `limit` bytes, shared by threads; what was used longest ago makes room.

    An entry is what one row gives: an item, or the parts of a document that was split.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.entries: OrderedDict[Any, tuple[list[Item], int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> list[Item] | None:
        with self._lock:
            if key not in self.entries:
                return None
            self.entries.move_to_end(key)
            return self.entries[key][0]

    def put(self, key: Any, items: list[Item]) -> None:
        tensors = [value for item in items for value in vars(item.sample).values() if isinstance(value, Tensor)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        with self._lock:
            if key in self.entries or size > self.limit:
                return
            self.entries[key] = (items, size)
            self.used += size
            while self.used > self.limit:
                self.used -= self.entries.popitem(last=False)[1][1]


def packed(item: Item) -> Item:
    """The item with its pixels as uint8 where that loses nothing."""
    found = {name: getattr(item.sample, name) for name in PIXELS}
    changed = {name: None if pixels is None else exact_bytes(pixels) for name, pixels in found.items()}
    return replace(item, sample=replace(item.sample, **changed))


def from_bytes(pixels: Tensor) -> Tensor:
    """Bytes as the normalised float32 pixels they stand for; floats as they are."""
    return normalised(pixels)
