"""A worker process that encodes one clip at a time, and the thread that supervises it.

A worker is a Python process of its own that reads sources from a pipe on its standard input. A user's script therefore
needs no `if __name__ == "__main__"`, and a codec that crashes its process costs one clip. Plans are returned as JSON,
pixels as a file of uint8 patches, which the reader deletes.
"""

import contextlib
import math
import os
import pickle
import queue
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from keye import errors
from keye.batch.cache import Cache
from keye.batch.packed import pack
from keye.batch.protocol import Encoder
from keye.batch.results import sentence
from keye.checks import integer, rate
from keye.encoded import EncodedVideo
from keye.slowfast.plan import VideoPlan

_SERVE = "from keye.batch.worker import serve; serve()"
_MEMORY_INTERVAL = 0.02  # seconds between two checks of a worker's memory

Answer = tuple[str, str, tuple[int, ...]]
"""(kind, answer, (hits, misses, rebuilt) of the cache); kind: "plan", "pixels" or an error's class."""


@dataclass(frozen=True)
class Limits:
    """Limits of one video in a worker. seconds: wall clock. memory: resident bytes of the worker's process."""

    seconds: float | None = None
    memory: int | None = None

    @classmethod
    def of(cls, max_seconds: float | None, max_memory: int | None) -> "Limits":
        """Checked limits; KeyeError where one is impossible or cannot be measured on this system."""
        seconds = None if max_seconds is None else rate("max_seconds", max_seconds)
        memory = None if max_memory is None else integer("max_memory", max_memory)
        if memory is not None and _resident(os.getpid()) is None:
            raise errors.KeyeError("max_memory needs /proc, which this system does not have; leave it out")
        return cls(seconds, memory)

    def __bool__(self) -> bool:
        return self.seconds is not None or self.memory is not None


def _resident(process: int) -> int | None:
    """Resident bytes of a process, from Linux's /proc; None where that is not available."""
    try:
        with open(f"/proc/{process}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


@dataclass(frozen=True)
class Work:
    """What to do with each source: plan it, or encode it where `pixels` is true, through the cache if there is one."""

    encoder: Encoder
    cache: Cache | None
    pixels: bool
    options: dict

    def __call__(self, source: object) -> VideoPlan | EncodedVideo:
        if self.cache is not None:
            return (self.cache.encode if self.pixels else self.cache.plan)(self.encoder, source, **self.options)
        return (self.encoder if self.pixels else self.encoder.plan)(source, **self.options)


class Worker(threading.Thread):
    """A thread that sends jobs to one process, one at a time, and forwards its answers.

    jobs: (index, source), or None to end. results: (index, `Answer`, or an exception). folder: for files of pixels.
    """

    def __init__(self, work: Work, folder: Path, jobs: queue.SimpleQueue, results: queue.SimpleQueue, limits: Limits):
        super().__init__(daemon=True)
        self.work, self.folder, self.jobs, self.results, self.limits = work, folder, jobs, results, limits
        self.process: subprocess.Popen | None = None
        self.stopped = threading.Event()
        self.lock = threading.Lock()  # between starting a process and stopping it

    def run(self) -> None:
        while (job := self.jobs.get()) is not None:
            index, source = job
            try:
                answer = self._ask(source)
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for the answer
                answer = error
            if self.stopped.is_set():
                return
            self.results.put((index, answer))

    def stop(self) -> None:
        """Kill the process immediately, and end the thread."""
        with self.lock:
            self.stopped.set()
            if self.process:
                self.process.kill()
        self.jobs.put(None)

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        if self.process:
            with contextlib.suppress(OSError):  # unsent data in the pipe
                self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()

    def _ask(self, source: object) -> Answer:
        """The answer of the process, which is started if none is running."""
        try:
            question = pickle.dumps(source, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # noqa: BLE001 - objects raise any exception when they are pickled
            why = f"it cannot be sent to another process ({sentence(error)}); give a path or bytes, or workers=0"
            return "VideoError", why, ()
        if self.process is None or self.process.poll() is not None:
            self._start()
        try:
            _write(self.process.stdin, question)
            if excess := self._excess():
                self.process.kill()
                self.process.wait()
                return "VideoError", excess, ()
            return _receive(self.process.stdout)
        except (EOFError, OSError):
            code = self.process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return "VideoError", f"the process that read it died ({how}); convert the video, or leave it out", ()

    def _excess(self) -> str | None:
        """Wait until the process answers or dies; a sentence if it exceeds a limit before."""
        seconds, memory = self.limits.seconds, self.limits.memory
        until = None if seconds is None else time.monotonic() + seconds
        while self.limits:
            left = math.inf if until is None else until - time.monotonic()
            if left <= 0:
                return f"it takes longer than max_seconds={seconds:g}; leave it out or raise the limit"
            if memory is not None and (_resident(self.process.pid) or 0) > memory:
                return f"the process that reads it needs more than max_memory={memory}; leave it out or raise the limit"
            wait = min(left, _MEMORY_INTERVAL if memory is not None else 1.0)
            if select.select([self.process.stdout], [], [], wait)[0]:
                return None
        return None

    def _start(self) -> None:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with self.lock:
            if self.stopped.is_set():
                raise EOFError
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SERVE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                process_group=0,  # Ctrl-C reaches the terminal's group; this process stops its workers itself
            )
        with contextlib.suppress(EOFError, OSError):  # it died; `_ask` reports that
            _send(self.process.stdin, (self.work, str(self.folder)))
            _receive(self.process.stdout)  # "ready", so that imports do not count as the first video's time


def _send(pipe: BinaryIO, value: object) -> None:
    _write(pipe, pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))


def _write(pipe: BinaryIO, data: bytes) -> None:
    pipe.write(len(data).to_bytes(8, "little"))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: BinaryIO) -> object:
    length = pipe.read(8)
    if len(length) < 8:
        raise EOFError
    data = pipe.read(int.from_bytes(length, "little"))
    return pickle.loads(data)


def serve() -> None:
    """Run a worker process: read the work, then answer one source after another until the pipe ends."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that the output of libraries does not mix with the answers
    torch.set_num_threads(1)
    try:
        try:
            work, folder = _receive(questions)
        except (ImportError, AttributeError) as error:  # a user's class that cannot be imported here
            work, folder = error, ""
        _send(answers, "ready")
        while True:
            _send(answers, _answer(work, _receive(questions), folder))
    except (EOFError, BrokenPipeError):
        return


def _answer(work: Work | Exception, source: object, folder: str) -> Answer:
    if isinstance(work, Exception):
        return "KeyeError", f"a worker process cannot build the encoder ({work}); give workers=0", ()
    before = work.cache.counts if work.cache else ()
    try:
        result = work(source)
        if isinstance(result, VideoPlan):
            kind, answer = "plan", result.to_json()
        else:
            kind, answer = "pixels", str(Path(folder) / f"{secrets.token_hex(8)}.safetensors")
            pack(result, answer)
    except Exception as error:  # noqa: BLE001 - one bad video must not end the others
        kind, answer = type(error).__name__, sentence(error)
    after = work.cache.counts if work.cache else ()
    return kind, answer, tuple(new - old for new, old in zip(after, before, strict=True))
