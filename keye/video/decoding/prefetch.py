"""Items made in a background thread, a few ahead of their reader, and what becomes of threads when the program ends.

Python ends daemon threads wherever they are. One that is inside PyAV or torch then is unwound through C++ code that
forbids it, and the process aborts: "terminate called without an active exception". So when the interpreter ends, the
threads here are stopped and waited for, and those of others that are reading a clip are told and waited for, too.
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
_lock = threading.Lock()
_ending = threading.Event()
_PATIENCE = 10.0  # seconds at most that the program's end waits for others' threads


class Prefetcher(Iterator[Item]):
    """Iterates `items` in a thread, at most `depth` items ahead; what is raised there is raised here, in its place.

    `close` ends it early: it sets `halt`, which a maker of slow items should look at, and waits for the thread, so that
    afterwards nothing uses what `items` uses. Reaching the end, an exception and dropping the object close it too.
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
        if self._closed:  # also when the interpreter is taking its modules apart
            return
        self._closed = self._done = True
        self._halt.set()
        _open.discard(self)
        while self._thread.is_alive():
            try:  # a thread that waits for room in the queue
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)
        try:  # another thread may wait for an item that will not come
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
            del item  # not kept while the next is made
        items.close()  # here and now, not when the interpreter takes its modules apart
    except BaseException as error:
        problem = error
    made.put((None, problem, False))


@contextmanager
def reading() -> Iterator[None]:
    """While inside, this thread reads a clip: if it is a daemon, the end of the program waits until it is out of it."""
    check_ending()
    thread = threading.current_thread()
    with _lock:
        _readers[thread] += 1
    try:
        yield
    finally:
        with _lock:
            _readers[thread] -= 1
            if not _readers[thread]:
                del _readers[thread]


def check_ending() -> None:
    """End this thread if the program is ending and has not waited for it to end by itself."""
    if _ending.is_set() and threading.current_thread() is not threading.main_thread():
        raise SystemExit


def stop_at_exit(thread: threading.Thread, stop: Callable[[], object]) -> None:
    """At the end of the program call `stop`, which asks the daemon `thread` to end, and wait until it has."""
    _stops[thread] = stop


@atexit.register
def _end_all() -> None:
    """Runs once threads that are no daemons have ended."""
    _ending.set()
    deadline = time.monotonic() + _PATIENCE
    stopped = list(_stops.items())
    for _, stop in stopped:
        stop()
    for ahead in list(_open):
        ahead.close()
    main = threading.current_thread()
    while time.monotonic() < deadline:
        with _lock:
            inside = [thread for thread in _readers if thread is not main and thread.is_alive()]
        inside += [thread for thread, _ in stopped if thread.is_alive()]
        if not inside:
            return
        inside[0].join(0.05)
        for ahead in list(_open):  # begun by one of them before it saw that it is over
            ahead.close()
