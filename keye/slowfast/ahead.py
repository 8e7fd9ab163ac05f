"""Items made in a background thread, a few ahead of their reader."""

import atexit
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")
_open: "weakref.WeakSet[Ahead]" = weakref.WeakSet()


class Ahead(Iterator[Item]):
    """Iterates `items` in a thread, at most `depth` items ahead; what is raised there is raised here, in its place.

    `close` ends it early: it sets `halt`, which a maker of slow items should look at, and waits for the thread, so that
    afterwards nothing uses what `items` uses. Reaching the end, an exception and dropping the object close it too.
    """

    def __init__(self, items: Iterator[Item], depth: int, halt: threading.Event):
        self._queue: queue.Queue = queue.Queue(depth)
        self._halt = halt
        self._done = False
        self._thread = threading.Thread(target=_make, args=(items, self._queue, halt), daemon=True, name="keye-decode")
        self._thread.start()
        _open.add(self)

    def __next__(self) -> Item:
        if self._done:
            raise StopIteration
        item, problem, more = self._queue.get()
        if more:
            return item
        self.close()
        if problem is not None:
            raise problem
        raise StopIteration

    def close(self) -> None:
        self._done = True
        self._halt.set()
        _open.discard(self)
        while self._thread.is_alive():
            try:  # a thread that waits for room in the queue
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def __del__(self):
        self.close()


def _make(items: Iterator[Item], made: queue.Queue, halt: threading.Event) -> None:
    problem = None
    try:
        for item in items:
            if halt.is_set():
                break
            made.put((item, None, True))
            del item  # not kept while the next is made
    except BaseException as error:
        problem = error
    made.put((None, problem, False))


@atexit.register
def _close_all() -> None:
    """A thread that is inside the decoder while the interpreter ends would abort the process."""
    for ahead in list(_open):
        ahead.close()
