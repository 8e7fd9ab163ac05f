"""Answers on disk, by the content of their requests.

A folder has one log for each process that wrote to it. A line is `key crc32 cost answer`; it is complete before its
answer is used. A line that a killed process cut off, or that does not have its checksum, is a missing answer.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import threading
import zlib
from pathlib import Path
from typing import BinaryIO

from keye.errors import writing
from rl.endpoint.ask import Answer

LOST = "lost"
"""Key of a line that records the cost of a request without an answer."""

_LINE = re.compile(rb"([0-9a-f]{64}|lost) ([0-9a-f]{8}) (\S+) (.*)\n")


class AnswerCache:
    """The answers in a folder; safe for threads, and for processes that use it at the same time.

    The index takes about 250 bytes of memory for an answer; answers are read when they are asked for. A process sees
    what others wrote before it started.

    Attributes:
        spent: cost of all answers and lost requests in the folder, when opened and with this process's since.
        damaged: number of complete lines without their checksum.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.spent, self.damaged = 0.0, 0
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._lock = threading.Lock()
        self._log: BinaryIO | None = None
        with writing(self.folder, "the folder of answers"):
            self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("answers-*.log")):
            self._read(path)

    def __len__(self) -> int:
        return len(self._places)

    def _read(self, path: Path) -> None:
        place = 0
        with path.open("rb") as file:
            for line in file:
                parts = _LINE.fullmatch(line)
                if parts is not None and f"{zlib.crc32(parts[4]):08x}".encode() == parts[2]:
                    self.spent += float(parts[3])
                    if parts[1] != LOST.encode():
                        self._places[bytes.fromhex(parts[1].decode())] = (path, place)
                elif line.endswith(b"\n"):
                    self.damaged += 1
                place += len(line)

    def get(self, key: str) -> Answer | None:
        """The answer of a request with this key."""
        with self._lock:
            found = self._places.get(bytes.fromhex(key))
        if found is None:
            return None
        path, place = found
        with path.open("rb") as file:
            file.seek(place)
            parts = _LINE.fullmatch(file.readline())
        if parts is None or f"{zlib.crc32(parts[4]):08x}".encode() != parts[2]:
            return None
        return Answer.from_json(parts[4].decode())

    def put(self, key: str, answer: Answer) -> None:
        """Store an answer; it survives `kill -9` when this returns.

        Raises:
            KeyeError: the folder cannot be written to.
        """
        self._append(key, answer.cost, answer.to_json())

    def lost(self, cost: float) -> None:
        """Record the cost of a request that may have been billed and gave no answer."""
        if cost:
            self._append(LOST, cost, "{}")

    def _append(self, key: str, cost: float, text: str) -> None:
        data = text.encode("utf-8", "replace")
        with self._lock, writing(self.folder, "an answer"):
            if self._log is None:
                name = f"answers-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}.log"
                self._log = (self.folder / name).open("ab", buffering=0)
            place = self._log.tell()
            self._log.write(f"{key} {zlib.crc32(data):08x} {cost!r} ".encode() + data + b"\n")
            self.spent += cost
            if key != LOST:
                self._places[bytes.fromhex(key)] = (Path(self._log.name), place)

    def close(self) -> None:
        """Close this process's log."""
        with self._lock:
            if self._log is not None:
                self._log.close()
                self._log = None
