"""Loader: what a rank trains on next, made ahead by a thread; its state is that of what was handed out."""

import os
import queue
import threading
import time
from functools import partial
from typing import Any, Protocol

from keye.video.decoding.prefetch import stop_at_exit
from stages.distributed.parallel import ParallelDims

MOST_WORKERS = 16  # threads that encode; beyond, what they do under Python's lock leaves nothing to gain


def encoding_threads(asked: int) -> int:
    """Threads of this process that decode and encode: `asked`, or for 0 the cores that it has for itself less one.

    The cores this process may run on are shared with the other processes of the machine (LOCAL_WORLD_SIZE, as torchrun
    and deepspeed set it). One is left to the training thread, and at least two threads overlap reading and decoding.
    """
    if asked:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(2, min(MOST_WORKERS, own - 1))


class Stream(Protocol):
    """A stream of batches that can say where it is. `next` may be collective, then every rank calls it as often."""

    def next(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def _end(ending: threading.Event, credits: "queue.SimpleQueue[bool]") -> None:
    """The program ends: no further batch is made, also where other ranks wait for it."""
    ending.set()
    credits.put(False)


class Loader:
    """Batches of a stream, `ahead` of them prepared beforehand in a thread.

    The thread works by credits: `ahead` to begin with, and one more for each batch that is asked for. Ranks that ask
    for as many batches therefore make as many, to the last one, and none is left waiting for another.

    Args:
        stream: makes this rank's batches.
        grid: this rank's place; a process alone need not use up its credits when it closes.
        ahead: batches prepared beforehand.
    """

    def __init__(self, stream: Stream, grid: ParallelDims, ahead: int = 2) -> None:
        self.stream, self.grid, self.ahead = stream, grid, ahead
        self.stalled = 0.0
        self._state = stream.state_dict()
        self._made: queue.SimpleQueue[tuple[Any, Any, BaseException | None]] = queue.SimpleQueue()
        self._credits: queue.SimpleQueue[bool] = queue.SimpleQueue()  # False: no more will come
        self._closing, self._ending = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def next(self) -> Any:
        """The next batch. Seconds waited add to `stalled`."""
        if self._error is not None:
            raise self._error
        started = time.perf_counter()
        if self._thread is None:
            for _ in range(self.ahead):
                self._credits.put(True)
            self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
            stop_at_exit(self._thread, partial(_end, self._ending, self._credits))  # no reference to the thread itself
            self._thread.start()
        self._credits.put(True)
        batch, state, self._error = self._made.get()
        self.stalled += time.perf_counter() - started
        if self._error is not None:
            raise self._error
        self._state = state
        return batch

    def _work(self) -> None:
        while self._credits.get():
            if self._ending.is_set() or self._closing.is_set() and self.grid.world == 1:
                return
            try:
                self._made.put((self.stream.next(), self.stream.state_dict(), None))
            except Exception as error:
                self._made.put((None, None, error))
                return

    def close(self, patience: float | None = None) -> None:
        """Stop the thread and wait for it: one that is decoding while the interpreter ends would abort the process.

        patience: seconds at most, for a rank that failed alone: the rounds it still owes may never be made.
        """
        self._closing.set()
        self._credits.put(False)
        if self._thread is not None:
            self._thread.join(patience)
        if self._thread is None or not self._thread.is_alive():
            self.stream.close()

    def state_dict(self) -> dict[str, Any]:
        """State after the last batch that was handed out."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; call it before the first `next`."""
        self.stream.load_state_dict(state)
        self._state = state
