"""Runs parts in processes of their own within the time of a call, with a log of each and a bundle of the results.

A machine may end a call at any moment. Rows are on disk when they are measured (`journal.py`), the bundle is made again
every few seconds, and a part ends when its runner does, also if the runner is killed.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from keye.errors import KeyeError
from keye.files import atomic_file, write_atomically
from scripts.bench.common.record import ROOT, Table, save
from scripts.bench.gpu.journal import mark_stopped, say

GRACE = 60.0  # seconds that a part has after its limit, for the row that it is measuring
LONGEST = 180.0  # the same where the call has a time of its own, and later parts can wait
MARGIN = 10.0  # seconds of a call for ending its last part and writing the bundle
LEAST = 30.0  # seconds of a part that are worth its start
PERIOD = 10.0  # seconds between two bundles
LOG = 1 << 19  # bytes of a part's log that one call adds at most, and that are kept of earlier calls


@dataclass
class Call:
    """One call of the runner.

    Attributes:
        out: folder of the results.
        limit: seconds after which a part begins no further row.
        within: seconds of the complete call; None: each part has its own time.
        since: when the call began, in seconds since 1970.
        bundle: a tar of `out`; None: none is made.
        lock: the descriptor of `alone`, which parts keep open, so that the folder is held until their end.
    """

    out: Path
    limit: float
    within: float | None = None
    since: float = field(default_factory=time.time)
    bundle: Path | None = None
    lock: int | None = None
    _bundled: object = None

    def times(self) -> tuple[float, float]:
        """Seconds after which a part that starts now begins no further row, and after which it is stopped."""
        if self.within is None:
            return self.limit, self.limit + GRACE
        left = self.within - (time.time() - self.since) - MARGIN
        return min(self.limit, left - GRACE), min(self.limit + LONGEST, left)

    def has_time(self) -> bool:
        """Whether another part is worth its start."""
        return self.within is None or self.times()[0] >= min(LEAST, self.limit)

    def run(self, name: str, options: Sequence[str]) -> str:
        """Run a part; returns why it failed, or nothing. The reason is also in the part's record."""
        limit, seconds = self.times()
        command = [sys.executable, "-m", f"scripts.bench.gpu.parts.{name}", "--out", str(self.out), *options]
        command += ["--limit", f"{max(0.0, limit):.0f}", "--parent", str(os.getpid())]
        # A group, so that all its processes are stopped together; no session, so that they end with the terminal's.
        environment = dict(os.environ)
        if "cpu" in options:  # libraries would use a GPU that they see
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, process_group=0, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, pass_fds=() if self.lock is None else (self.lock,),
        )  # fmt: skip
        copier = threading.Thread(target=copy_output, args=(process.stdout, self.out / "rows" / f"{name}.log"))
        copier.start()
        reason = "it was stopped before its end"
        try:
            code = self._wait(process, seconds)
            reason = f"its process ended with code {code}; its output says why" if code else ""
            if code is None:
                reason = f"it was stopped after {seconds:.0f} s; the same command continues"
        finally:
            if process.poll() is None:
                stop(process)
                mark_stopped(self.out, name)
            copier.join(timeout=5)
            if reason:
                say(f"{name}: {reason}")
                record_failure(name, "--small" in options, self.out, reason)
            self.write_bundle()
        return reason

    def _wait(self, process: subprocess.Popen, seconds: float) -> int | None:
        """The code with which a part ended; None if it has not after so many seconds. The bundle is kept up to date."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                return process.wait(timeout=min(PERIOD, left))
            except subprocess.TimeoutExpired:
                self.write_bundle()
        return process.poll()

    def write_bundle(self) -> None:
        """Write the bundle if a file of the results has changed: rows, logs, records and document, in folder gpu."""
        if self.bundle is None:
            return
        files = sorted(path for path in self.out.rglob("*") if path.is_file() and not path.name.startswith("."))
        state = [(path, (found := path.stat()).st_mtime_ns, found.st_size) for path in files]
        if state == self._bundled:
            return
        with atomic_file(self.bundle) as part, tarfile.open(part, "w") as archive:
            for path in files:
                archive.add(path, f"gpu/{path.relative_to(self.out)}")
        self._bundled = state


def copy_output(stream: IO[bytes], path: Path) -> None:
    """Copy a part's output to this process's, and to its log up to `LOG` bytes after as many of earlier calls."""
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = path.read_bytes()[-LOG:] if path.exists() else b""
    with path.open("wb") as log:
        log.write(earlier)
        log.write(f"\n--- {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC\n".encode())
        log.flush()
        left = LOG
        while found := os.read(stream.fileno(), 1 << 16):
            sys.stdout.buffer.write(found)
            sys.stdout.buffer.flush()
            log.write(found[:left])
            log.flush()
            left = max(0, left - len(found))


def stop(process: subprocess.Popen) -> None:
    """End a part and the processes that it has started, first politely."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def record_failure(name: str, small: bool, out: Path, reason: str) -> None:
    """Add the reason to the part's record, or write a record that has nothing else."""
    path = out / f"{name}.json"
    sentence = f"Incomplete: {reason}."
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if sentence not in kept["notes"]:
            kept["notes"].insert(0, sentence)
            write_atomically(path, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    else:
        table = Table("Failed or not measured", ("row", "reason"), [("the complete part", f"failed: {reason}")])
        save(out, name, [], [table], seconds=0, quick=small, notes=[sentence])


def open_rows(out: Path, name: str) -> list[str]:
    """The rows of a part's record that failed or were not measured."""
    try:
        record = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return []
    found = next((table for table in record["tables"] if table["title"] == "Failed or not measured"), {"rows": []})
    return [row[0] for row in found["rows"]]


@contextmanager
def alone(out: Path, patience: float = 10.0) -> Iterator[int]:
    """Hold the folder of the results, so that no other call writes to it; the descriptor of the lock.

    Raises:
        KeyeError: another call holds it, and does not end within `patience` seconds.
    """
    path = out / "rows" / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + patience
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise KeyeError(f"another call writes to {out}: wait for its end, or end it") from None
                time.sleep(0.2)
        yield file.fileno()


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Where this process is asked to end (SIGTERM), it leaves its blocks: parts are stopped, the bundle is written."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
