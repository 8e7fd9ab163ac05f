"""Quarantine: the bad samples of a run, listed in a file, and the warnings of good ones, logged once for each kind."""

import glob
import json
import logging
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

MAX_KINDS = 20  # of warnings that a source logs; data with more kinds of them would fill the log


class Quarantine:
    """Counts bad samples and writes each once to a JSONL file: file, line, reason. Threads may share it.

    Each rank has a file of its own in the same folder (`quarantine-3.jsonl`), because lines that several machines
    append to one file can be torn.

    Args:
        path: the file of rank 0; None writes nothing.
        rank: of this process.
    """

    def __init__(self, path: str | Path | None = None, rank: int = 0) -> None:
        self.first = Path(path) if path else None
        self.path = self.first
        if self.first is not None and rank:
            self.path = self.first.with_name(f"{self.first.stem}-{rank}{self.first.suffix}")
        self.seen: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        # A resumed run meets the same bad lines again. They are counted again and not written again.
        self.written = {(row["file"], row["line"]) for row in self.rows()}

    def __len__(self) -> int:
        return len(self.seen)

    def rows(self) -> list[dict[str, Any]]:
        """The rows that all processes have written so far, without lines that a killed process left unfinished."""
        if self.first is None:
            return []
        others = self.first.parent.glob(f"{glob.escape(self.first.stem)}-*{self.first.suffix}")
        files = [path for path in (self.first, *sorted(others)) if path.exists()]
        lines = [line for path in files for line in path.read_text(encoding="utf-8", errors="replace").split("\n")]
        return [row for row in map(_row, lines) if row is not None]

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


def _row(line: str) -> dict[str, Any] | None:
    """A line of the file, or None if it is torn."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and set(row) >= {"file", "line", "reason"} else None


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


class WarningLog:
    """Logs the first warning of each kind and no other. Threads may share it."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._lock = threading.Lock()

    def add(self, file: str, line: int, warnings: Iterable[str]) -> None:
        """Log the warnings of one sample; `line` counts from 1."""
        for warning in warnings:
            kind = kind_of_warning(warning)
            with self._lock:
                if kind in self.seen or len(self.seen) >= MAX_KINDS:
                    continue
                self.seen.add(kind)
            message = "%s line %d: %s (the first of its kind; metrics.jsonl counts them)"
            logging.getLogger("stages").warning(message, file, line, warning)


def kind_of_warning(warning: str) -> str:
    """A warning without its paths and numbers, which differ between samples."""
    return re.sub(r"(\S*/\S+|\S+\.[A-Za-z]\w{1,4}\b|\d[\d,.]*)", "…", warning)
