"""Encode many videos with one encoder: in several processes, in bounded memory, and continuing after failures."""

import contextlib
import os
import pickle
import queue
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from keye.batch.cache import Cache, add_features, named_settings, without_tower
from keye.batch.packed import unpack
from keye.batch.protocol import Encoder
from keye.batch.results import Done, Failure, Results, sentence
from keye.batch.worker import Limits, Work, Worker
from keye.checks import integer
from keye.encoded import check_options, refuse_one_path, split_options
from keye.errors import KeyeError
from keye.slowfast.pixels import Output, PixelFormat
from keye.slowfast.plan import VideoPlan

__all__ = ["Done", "Failure", "Results", "encode_many", "iter_many", "progress_bar"]

MOST_WORKERS = 8
"""The most workers by default; each decodes with threads of its own."""

_SENDABLE = str | os.PathLike | bytes | np.ndarray | torch.Tensor
_OPEN = (
    "max_seconds and max_memory apply to worker processes, to which an open source cannot be sent; give a path or bytes"
)


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
    """Plan (or with `pixels` encode) every source. Use `iter_many` where the pixels of all sources exceed memory.

    Args:
        encoder: the encoder; its measure and policy must be importable by other processes.
        sources: videos or pictures, see `open_clip`.
        workers: number of processes; 0 or 1 works in this process; None takes one per CPU core, at most 8 and at most
            one for every four sources.
        cache: a Cache, or a folder for one.
        pixels: return `EncodedVideo`s instead of plans.
        progress: show a bar on stderr; None shows it where stderr is a terminal.
        on_error: "collect" continues after a failure, "raise" raises the first one.
        max_seconds, max_memory: limits of one video, in seconds and in resident bytes of the process that reads it,
            including about 0.3 GB of imports. A video that exceeds one is a failure; its process is replaced. Memory is
            checked 50 times a second, so shorter peaks are missed. With limits, all videos are read in worker processes
            (at least one), and a source that is open in this process is a failure.
        options: `start`, `end`, `num_frames`, … as for `encoder.plan`; with `pixels` also `dtype`, `device`, `mean` and
            `std`.

    Returns:
        The results in the order of the sources, None for failed ones, and the failures.

    Raises:
        KeyeError: an argument is impossible, or the encoder cannot be sent to other processes or cached.
        VideoError: a video failed, with on_error="raise".
    """
    if on_error not in ("collect", "raise"):
        raise KeyeError(f'on_error={on_error!r} is not known; use "collect" or "raise"')
    check_options(options, pixels, encode_many.__kwdefaults__)
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

    At most two sources per worker are in progress, so memory does not grow with their number. Features of an encoder
    with a vision tower are computed in this process.
    """
    check_options(options, pixels, iter_many.__kwdefaults__)
    refuse_one_path(sources, "the videos are one path or bytes; give a list of videos: [path]")
    workers = None if workers is None else integer("workers", workers, 0)
    limits = Limits.of(max_seconds, max_memory)
    cache = cache if cache is None or isinstance(cache, Cache) else Cache(cache)
    if cache is not None:
        named_settings(encoder)  # raises an error that would occur for every video
    count = max(_count(workers, sources), bool(limits))
    alone = count < 2 and not limits
    unsendable = None if alone else _unsendable(encoder)
    if unsendable and (workers is not None or limits):
        raise KeyeError(f"{unsendable}, so other processes cannot use it; give workers=0 and no limits")
    if alone or unsendable:
        return _here(Work(encoder, cache, pixels, options), sources)
    output, sampling = split_options(options)
    PixelFormat.of(output)  # raises an error that would occur for every video
    sampling |= {"dtype": torch.uint8} if pixels else {}  # a quarter of the bytes to transfer
    work = Work(without_tower(encoder), cache, pixels, sampling)
    return _elsewhere(Work(encoder, cache, pixels, options), work, output, limits, sources, count)


def _count(workers: int | None, sources: Iterable[object]) -> int:
    if workers is not None:
        return workers
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    worth = len(sources) // 4 if hasattr(sources, "__len__") else MOST_WORKERS  # starting one takes seconds
    return min(processors, MOST_WORKERS, worth)


def _unsendable(encoder: Encoder) -> str | None:
    """Why an encoder cannot be sent to another process; None when it can."""
    if encoder.tower is not None and hasattr(encoder.measure, "attach"):
        return f"the measure {getattr(encoder.measure, 'name', '')!r} uses the vision tower in this process"
    for kind in ("measure", "policy"):
        cls = type(getattr(encoder, kind))
        if cls.__module__ == "__main__":
            return f"the {kind} {cls.__name__} is defined in the script itself, not in a module"
    try:
        pickle.dumps(without_tower(encoder))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        return f"the encoder cannot be pickled ({error})"
    return None


def _here(work: Work, sources: Iterable[object], first: int = 0) -> Iterator[Done]:
    for index, source in enumerate(sources, first):
        try:
            yield Done(index, source, work(source), None)
        except Exception as error:  # noqa: BLE001 - one bad video must not end the others
            yield Done(index, source, None, Failure.of(index, source, type(error).__name__, sentence(error)))


def _elsewhere(
    here: Work, work: Work, output: Output, limits: Limits, sources: Iterable[object], count: int
) -> Iterator[Done]:
    """Distribute sources to `count` workers, each supervised by a thread that restarts it when it dies.

    here: the work in this process, for a source that cannot be sent. output: the final format of the workers' pixels.
    """
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    results: queue.SimpleQueue = queue.SimpleQueue()
    folder = Path(tempfile.mkdtemp(prefix="keye-"))
    workers = [Worker(work, folder, jobs, results, limits) for _ in range(count)]
    try:
        for worker in workers:
            worker.start()
        waiting, pending = iter(enumerate(sources)), {}
        while True:
            for index, source in waiting:
                if not _sendable(source):
                    if limits:
                        yield Done(index, source, None, Failure.of(index, source, "VideoError", _OPEN))
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
    """Whether a source can be sent to another process; open files, decoders' frames and generators cannot."""
    if isinstance(source, list | tuple):
        return all(isinstance(part, _SENDABLE | Image.Image | int | float) or _sendable(part) for part in source)
    if isinstance(source, dict):
        return all(part is None or _sendable(part) for part in source.values())
    return isinstance(source, _SENDABLE)


def _finished(encoder: Encoder, output: Output, index: int, source: object, kind: str, answer: str) -> Done:
    if kind == "plan":
        return Done(index, source, VideoPlan.from_json(answer), None)
    if kind == "pixels":
        video = unpack(answer)
        os.unlink(answer)
        return Done(index, source, add_features(encoder, video.to(**output)), None)
    return Done(index, source, None, Failure.of(index, source, kind, answer))


@contextlib.contextmanager
def progress_bar(total: int | None, shown: bool) -> Iterator[Callable[[Done], None]]:
    """Show progress and remaining time on stderr if `shown`; yields a function to call with each finished source."""
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
            if not console.is_terminal and total:  # ten lines in a log
                ready = int(progress.tasks[0].completed)
                if ready * 10 // total > (ready - 1) * 10 // total:
                    seconds = (time.monotonic() - began) * (total - ready) / ready
                    print(f"{ready} of {total} videos, {failed} failed, {seconds:.0f} s left", file=sys.stderr)

        yield advance
