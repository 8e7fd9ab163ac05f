"""Prefetching in a background thread, and stopping such threads when the program ends.

At exit Python ends daemon threads at any point. A thread inside PyAV or torch is then unwound through C++ code that
forbids it, and the process aborts: "terminate called without an active exception". Therefore, when the interpreter
ends, the threads here are stopped and joined, and other threads that are reading a clip are notified and joined.
"""

import atexit
import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
_open: "weakref.WeakSet[Prefetcher]" = weakref.WeakSet()
_stops: "weakref.WeakKeyDictionary[threading.Thread, Callable[[], object]]" = weakref.WeakKeyDictionary()
_readers: Counter[threading.Thread] = Counter()
_recent: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()  # threads that have read a clip
_lock = threading.Lock()
_ending = threading.Event()
_EXIT_TIMEOUT = 10.0  # seconds: how long the end of the program waits for other threads
_BETWEEN = 0.5  # seconds: how long it waits for threads that have read a clip and may be about to read the next one


class Prefetcher(Iterator[Item]):
    """Iterates `items` in a thread, at most `depth` items ahead; exceptions are raised again in the reader.

    `close` ends it early: it sets `halt`, which slow generators should check, and joins the thread, so that nothing
    uses the generator's resources afterwards. The end, an exception and deleting the object close it, too.
    """

    def __init__(self, items: Generator[Item, None, None], depth: int, halt: threading.Event):
        self._queue: queue.Queue = queue.Queue(depth)
        self._halt = halt
        self._done = self._closed = False
        self._thread = threading.Thread(target=_make, args=(items, self._queue, halt), daemon=True, name="keye-decode")
        self._thread.start()
        _open.add(self)

    def __next__(self) -> Item:
        if self._done:
            raise StopIteration
        item, problem, more = self._queue.get()
        check_ending()
        if more:
            return item
        self.close()
        if problem is not None:
            raise problem
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it, also when another thread is closing it; called again, it does nothing."""
        if self._closed and not self._thread.is_alive():
            return
        self._closed = self._done = True
        self._halt.set()
        _open.discard(self)
        # Every caller waits: what it frees next, such as the container, is in use until the thread has ended.
        while self._thread.is_alive() and self._thread is not threading.current_thread():
            try:  # the thread may be waiting for space in the queue
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)
        try:  # another thread may be waiting for an item
            self._queue.put_nowait((None, None, False))
        except queue.Full:
            pass

    def __del__(self):
        self.close()


def _make(items: Generator[Item, None, None], made: queue.Queue, halt: threading.Event) -> None:
    problem = None
    try:
        for item in items:
            if halt.is_set():
                break
            made.put((item, None, True))
            del item  # release it while the next one is made
        items.close()  # now, and not at interpreter shutdown
    except BaseException as error:
        problem = error
    made.put((None, problem, False))


@contextmanager
def reading() -> Iterator[None]:
    """Mark this thread as reading a clip; the end of the program waits until it leaves the block.

    Between two clips a thread may still be inside torch, which frees the results. The end of the program waits for it
    to begin the next clip, too, but not for long.
    """
    check_ending()
    thread = threading.current_thread()
    with _lock:
        _readers[thread] += 1
        _recent.add(thread)
    try:
        yield
    finally:
        with _lock:
            _readers[thread] -= 1
            if not _readers[thread]:
                del _readers[thread]


def check_ending() -> None:
    """End this thread if the program is ending."""
    if _ending.is_set() and threading.current_thread() is not threading.main_thread():
        raise SystemExit


def stop_at_exit(thread: threading.Thread, stop: Callable[[], object]) -> None:
    """At the end of the program, call `stop`, which asks the daemon `thread` to end, and wait for it."""
    _stops[thread] = stop


@atexit.register
def _end_all() -> None:
    """Runs after non-daemon threads have ended."""
    _ending.set()
    now = time.monotonic()
    deadline, between = now + _EXIT_TIMEOUT, now + _BETWEEN
    stopped = list(_stops.items())
    for _, stop in stopped:
        stop()
    for ahead in list(_open):
        ahead.close()
    main = threading.current_thread()
    while time.monotonic() < deadline:
        with _lock:
            readers = _recent if time.monotonic() < between else _readers
            inside = [thread for thread in readers if thread is not main and thread.is_alive()]
        inside += [thread for thread, _ in stopped if thread.is_alive()]
        if not inside:
            return
        inside[0].join(0.05)
        for ahead in list(_open):  # opened by a thread that had not noticed the end yet
            ahead.close()
