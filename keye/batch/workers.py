"""Many videos through one encoder: in several processes, in bounded memory, and past the videos that fail.

A worker is a Python of its own that reads one clip at a time from its standard input's pipe, so a script needs no
`if __name__ == "__main__"`, and a codec that brings its process down costs that one clip. Plans come back as JSON,
pixels as a file of uint8 patches that is read and removed as soon as it is wanted.
"""

import contextlib
import math
import os
import pickle
import queue
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image

from keye import errors
from keye.batch.cache import Cache, add_features, named_settings, without_tower
from keye.batch.packed import pack, unpack
from keye.batch.protocol import Encoder
from keye.checks import integer, rate
from keye.encoded import EncodedVideo, split_options
from keye.slowfast.pixels import Output, PixelFormat
from keye.slowfast.plan import VideoPlan

MOST_WORKERS = 8
"""By default; each decodes with threads of its own."""

_SERVE = "from keye.batch.workers import serve; serve()"
_SENT = str | os.PathLike | bytes | dict | np.ndarray | torch.Tensor  # a file object stays where it is open


_OPEN = "max_seconds and max_memory hold in other processes, where what is open here cannot go; give a path or bytes"
_LOOK = 0.02  # seconds between two looks at a worker's memory


@dataclass(frozen=True)
class Failure:
    """A video that could not be encoded: its place among the sources, its name, and a sentence that says why."""

    index: int
    source: str
    reason: str
    kind: str = "VideoError"

    def raise_(self) -> None:
        """Raise it as the KeyeError that it was; anything else than a KeyeError is raised as a VideoError."""
        kind = getattr(errors, self.kind, None)
        known = isinstance(kind, type) and issubclass(kind, errors.KeyeError)
        raise (kind if known else errors.VideoError)(self.reason)


class Done(NamedTuple):
    """One source that is finished: a result or a failure."""

    index: int
    source: object
    result: VideoPlan | EncodedVideo | None
    failure: Failure | None


@dataclass(frozen=True)
class Results(Sequence):
    """The result of every source in their order, None where it failed; `failures` says why, in the same order."""

    items: list[VideoPlan | EncodedVideo | None]
    failures: list[Failure]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    @property
    def succeeded(self) -> list[VideoPlan | EncodedVideo]:
        """The results without the failed ones, no longer in step with the sources."""
        return [item for item in self.items if item is not None]

    def summary(self) -> str:
        """What came out in plain text: a line on all, then a line for each failure."""
        plans = [item if isinstance(item, VideoPlan) else item.plan for item in self.succeeded]
        line = f"{len(plans)} of {len(self)} videos, {sum(plan.tokens for plan in plans):,} tokens"
        failed = [f"failed: {failure.source}: {failure.reason}" for failure in self.failures]
        return "\n".join([line, *failed])


def encode_many(
    encoder: Encoder,
    sources: Iterable[object],
    *,
    workers: int | None = None,
    cache: Cache | str | os.PathLike | None = None,
    pixels: bool = False,
    progress: bool | None = None,
    on_error: str = "collect",
    max_seconds: float | None = None,
    max_memory: int | None = None,
    **options: object,
) -> Results:
    """Plan (or with `pixels` encode) every source; results in the order of the sources, failures at the end.

    workers: processes; 0 or 1 works in this one; None takes as many as there are processors, at most 8 and one for
    every four sources. cache: a Cache or a folder for one. progress: a bar on stderr; None shows it where stderr is a
    terminal. on_error: "collect" goes on past a bad video, "raise" stops at the first. options: `start`, `end`,
    `num_frames`… as for `encoder.plan`, with `pixels` also `dtype`, `device`, `mean` and `std`. For more videos than
    fit into memory as pixels take `iter_many`.

    max_seconds, max_memory: what one video may take, in time and in resident bytes of the process that reads it (its
    imports, about 0.3 GB, included). One that takes more is a failure and the others go on: its process is ended and
    another one started. Memory is looked at 50 times a second, so a peak between two looks may pass. Videos are then
    read in worker processes only, at least one; a source that is open in this one is a failure.
    """
    if on_error not in ("collect", "raise"):
        raise errors.KeyeError(f'on_error={on_error!r} is not known; use "collect" or "raise"')
    total = len(sources) if hasattr(sources, "__len__") else None
    shown = sys.stderr.isatty() if progress is None else progress
    found: dict[int, Done] = {}
    limits = {"max_seconds": max_seconds, "max_memory": max_memory}
    running = iter_many(encoder, sources, workers=workers, cache=cache, pixels=pixels, **limits, **options)
    with contextlib.closing(running), progress_bar(total, shown) as advance:
        for done in running:
            if done.failure and on_error == "raise":
                done.failure.raise_()
            found[done.index] = done
            advance(done)
    ordered = [found[index] for index in range(len(found))]
    return Results([done.result for done in ordered], [done.failure for done in ordered if done.failure])


def iter_many(
    encoder: Encoder,
    sources: Iterable[object],
    *,
    workers: int | None = None,
    cache: Cache | str | os.PathLike | None = None,
    pixels: bool = False,
    max_seconds: float | None = None,
    max_memory: int | None = None,
    **options: object,
) -> Iterator[Done]:
    """Yield each source as soon as it is finished, in any order; arguments as for `encode_many`.

    At most two sources per worker are under way, however long the iterable and however slow the reader, so memory
    does not grow with their number. Features of an encoder with a vision tower are computed here, not in the workers.
    """
    workers = None if workers is None else integer("workers", workers, 0)
    limits = Limits.of(max_seconds, max_memory)
    cache = cache if cache is None or isinstance(cache, Cache) else Cache(cache)
    if cache is not None:
        named_settings(encoder)  # says at once what would fail for every video
    count = max(_count(workers, sources), bool(limits))
    alone = count < 2 and not limits
    unsendable = None if alone else _unsendable(encoder)
    if unsendable and (workers is not None or limits):
        raise errors.KeyeError(f"{unsendable}, so other processes cannot use it; give workers=0 and no limits")
    if alone or unsendable:
        return _here(_Work(encoder, cache, pixels, options), sources)
    output, sampling = split_options(options)
    PixelFormat.of(output)  # says at once what would fail for every video
    sampling |= {"dtype": torch.uint8} if pixels else {}  # a quarter of the bytes to hand over
    work = _Work(without_tower(encoder), cache, pixels, sampling)
    return _elsewhere(_Work(encoder, cache, pixels, options), work, output, limits, sources, count)


def _count(workers: int | None, sources: Iterable[object]) -> int:
    if workers is not None:
        return workers
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    worth = len(sources) // 4 if hasattr(sources, "__len__") else MOST_WORKERS  # starting one takes seconds
    return min(processors, MOST_WORKERS, worth)


def _unsendable(encoder: Encoder) -> str | None:
    """Why an encoder cannot be sent to another process; None when it can."""
    if encoder.tower is not None and hasattr(encoder.measure, "attach"):
        return f"the measure {getattr(encoder.measure, 'name', '')!r} looks through the vision tower in this process"
    for kind in ("measure", "policy"):
        made_by = type(getattr(encoder, kind))
        if made_by.__module__ == "__main__":
            return f"the {kind} {made_by.__name__} is defined in the script itself, not in a module"
    try:
        pickle.dumps(without_tower(encoder))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        return f"the encoder cannot be pickled ({error})"
    return None


@dataclass(frozen=True)
class Limits:
    """Of one video in a worker. seconds: of wall clock. memory: bytes, resident, of the worker's process in all."""

    seconds: float | None = None
    memory: int | None = None

    @classmethod
    def of(cls, max_seconds: float | None, max_memory: int | None) -> "Limits":
        """The limits that were asked for, checked; KeyeError where one is impossible or cannot be watched here."""
        seconds = None if max_seconds is None else rate("max_seconds", max_seconds)
        memory = None if max_memory is None else integer("max_memory", max_memory)
        if memory is not None and _resident(os.getpid()) is None:
            raise errors.KeyeError("max_memory needs /proc, which this system does not have; leave it out")
        return cls(seconds, memory)

    def __bool__(self) -> bool:
        return self.seconds is not None or self.memory is not None


def _resident(process: int) -> int | None:
    """Bytes of memory that a process holds, by Linux's /proc; None where that is not to be had."""
    try:
        with open(f"/proc/{process}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


@dataclass(frozen=True)
class _Work:
    """What is to be done with each source."""

    encoder: Encoder
    cache: Cache | None
    pixels: bool
    options: dict

    def __call__(self, source: object) -> VideoPlan | EncodedVideo:
        if self.cache is not None:
            return (self.cache.encode if self.pixels else self.cache.plan)(self.encoder, source, **self.options)
        return (self.encoder if self.pixels else self.encoder.plan)(source, **self.options)


def _here(work: _Work, sources: Iterable[object], first: int = 0) -> Iterator[Done]:
    for index, source in enumerate(sources, first):
        try:
            yield Done(index, source, work(source), None)
        except Exception as error:  # noqa: BLE001 - one bad video must not end the others
            yield Done(index, source, None, _failure(index, source, type(error).__name__, _sentence(error)))


def _elsewhere(
    here: _Work, work: _Work, output: Output, limits: Limits, sources: Iterable[object], count: int
) -> Iterator[Done]:
    """Hand sources to `count` workers, each supervised by a thread that restarts it when it dies.

    here: what is done with a source that cannot be sent; output: what is made here of the pixels that workers send.
    """
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    results: queue.SimpleQueue = queue.SimpleQueue()
    folder = Path(tempfile.mkdtemp(prefix="keye-"))
    workers = [_Worker(work, folder, jobs, results, limits) for _ in range(count)]
    try:
        for worker in workers:
            worker.start()
        waiting, pending = iter(enumerate(sources)), {}
        while True:
            for index, source in waiting:
                if not _sendable(source):
                    if limits:
                        yield Done(index, source, None, _failure(index, source, "VideoError", _OPEN))
                    else:
                        yield from _here(here, [source], index)
                    continue
                pending[index] = source
                jobs.put((index, source))
                if len(pending) >= 2 * count:
                    break
            if not pending:
                return
            index, answer = results.get()
            source = pending.pop(index)
            if isinstance(answer, BaseException):
                raise answer
            kind, value, counts = answer
            if work.cache is not None:
                work.cache.count(*counts)
            yield _finished(here.encoder, output, index, source, kind, value)
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join()
        shutil.rmtree(folder, ignore_errors=True)


def _sendable(source: object) -> bool:
    """Whether a source can go to another process: not what is open here (files, decoders' frames, generators)."""
    if isinstance(source, list | tuple):
        return all(isinstance(part, _SENT | Image.Image | int | float) or _sendable(part) for part in source)
    return isinstance(source, _SENT)


def _finished(encoder: Encoder, output: Output, index: int, source: object, kind: str, answer: str) -> Done:
    if kind == "plan":
        return Done(index, source, VideoPlan.from_json(answer), None)
    if kind == "pixels":
        video = unpack(answer)
        os.unlink(answer)
        return Done(index, source, add_features(encoder, video.to(**output)), None)
    return Done(index, source, None, _failure(index, source, kind, answer))


def _failure(index: int, source: object, kind: str, reason: str) -> Failure:
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else f"source {index} ({type(source).__name__})"
    return Failure(index, name, reason, kind)


def _sentence(error: BaseException) -> str:
    if isinstance(error, errors.KeyeError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Worker(threading.Thread):
    """A thread that feeds one process with jobs, one at a time, and passes its answers on."""

    def __init__(self, work: _Work, folder: Path, jobs: queue.SimpleQueue, results: queue.SimpleQueue, limits: Limits):
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
        """End the process at once, whatever it is doing, and the thread after it."""
        with self.lock:
            self.stopped.set()
            if self.process:
                self.process.kill()
        self.jobs.put(None)

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        if self.process:
            with contextlib.suppress(OSError):  # what was not sent any more
                self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()

    def _ask(self, source: object) -> tuple[str, str, tuple[int, ...]]:
        """(kind of answer, answer, what the cache counted) of the process, which is started if there is none."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        try:
            _send(self.process.stdin, source)
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
        """Wait until the process answers or dies; a sentence if it takes too long or too much before."""
        seconds, memory = self.limits.seconds, self.limits.memory
        until = None if seconds is None else time.monotonic() + seconds
        while self.limits:
            left = math.inf if until is None else until - time.monotonic()
            if left <= 0:
                return f"it takes longer than max_seconds={seconds:g}; leave it out or raise the limit"
            if memory is not None and (_resident(self.process.pid) or 0) > memory:
                return f"the process that reads it needs more than max_memory={memory}; leave it out or raise the limit"
            look = min(left, _LOOK if memory is not None else 1.0)
            if select.select([self.process.stdout], [], [], look)[0]:
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
                process_group=0,  # Ctrl-C reaches the group of the terminal; this process ends its workers itself
            )
        with contextlib.suppress(EOFError, OSError):  # it died already: the question after this finds out
            _send(self.process.stdin, (self.work, str(self.folder)))
            _receive(self.process.stdout)  # that it is ready: what it imports is not on the first video's time


def _send(pipe: BinaryIO, value: object) -> None:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
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
    """A worker's life: read the work, then answer one source after another until the pipe ends."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not fall among the answers
    torch.set_num_threads(1)
    try:
        try:
            work, folder = _receive(questions)
        except (ImportError, AttributeError) as error:  # a class of the user's that is not to be found here
            work, folder = error, ""
        _send(answers, "ready")
        while True:
            _send(answers, _answer(work, _receive(questions), folder))
    except (EOFError, BrokenPipeError):
        return


def _answer(work: _Work | Exception, source: object, folder: str) -> tuple[str, str, tuple[int, ...]]:
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
        kind, answer = type(error).__name__, _sentence(error)
    after = work.cache.counts if work.cache else ()
    return kind, answer, tuple(new - old for new, old in zip(after, before, strict=True))


@contextlib.contextmanager
def progress_bar(total: int | None, shown: bool) -> Iterator[Callable[[Done], None]]:
    """How far it is and how long it takes, on stderr, or nothing; yields what to call with each finished source."""
    if not shown:
        yield lambda done: None
        return
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    left = (bars.TextColumn("left"), bars.TimeRemainingColumn(), bars.TextColumn("{task.fields[failed]}", style="red"))
    columns = (bars.TextColumn("videos"), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeElapsedColumn(), *left)
    with bars.Progress(*columns, console=console, transient=True) as progress:
        task, failed = progress.add_task("", total=total, failed=""), 0
        began = time.monotonic()

        def advance(done: Done) -> None:
            nonlocal failed
            failed += done.failure is not None
            progress.update(task, advance=1, failed=f"{failed} failed" if failed else "")
            if not console.is_terminal and total:  # a log gets ten lines
                ready = int(progress.tasks[0].completed)
                if ready * 10 // total > (ready - 1) * 10 // total:
                    seconds = (time.monotonic() - began) * (total - ready) / ready
                    print(f"{ready} of {total} videos, {failed} failed, {seconds:.0f} s left", file=sys.stderr)

        yield advance
