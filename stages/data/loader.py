"""Loader: what a rank trains on next, made ahead by a thread; its state is that of what was handed out."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist

from stages.parallel import Grid


class Stateful(Protocol):
    """A stream of batches that can say where it is."""

    def next(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Loader:
    """Batches of a stream, `ahead` of them prepared beforehand in a thread.

    In a sequence group only the first rank reads; it hands each batch to the others.

    Args:
        stream: makes the samples of a batch; None on ranks that are handed theirs.
        collate: samples → batch; runs in the thread too.
        grid: this rank's place.
        ahead: batches prepared beforehand.
    """

    def __init__(self, stream: Stateful | None, collate: Callable[[Any], Any], grid: Grid, ahead: int = 2) -> None:
        self.stream, self.collate, self.grid, self.ahead = stream, collate, grid, ahead
        self.stalled = 0.0
        self._state = stream.state_dict() if stream is not None else {}
        self._queue: queue.Queue[Any] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def _reads(self) -> bool:
        return self.grid.sequence_rank == 0

    def next(self) -> Any:
        """The next batch; the same object on every rank of a sequence group. Seconds waited add to `stalled`."""
        started = time.perf_counter()
        made: tuple[Any, Any, BaseException | None] = (None, None, None)
        if self._reads:
            if self._queue is None:
                self._start()
            made = self._queue.get()
        if self.grid.sequence_group is not None:
            box = [(made[0], made[2])]
            first = self.grid.rank - self.grid.sequence_rank
            dist.broadcast_object_list(box, src=first, group=self.grid.sequence_group)
            made = (box[0][0], made[1], box[0][1])
        batch, state, error = made
        self.stalled += time.perf_counter() - started
        if error is not None:
            raise error
        if self._reads:
            self._state = state
        return batch

    def _start(self) -> None:
        self._queue, self._stop = queue.Queue(self.ahead), threading.Event()
        self._thread = threading.Thread(target=self._work, args=(self._queue, self._stop), daemon=True)
        self._thread.start()

    def _work(self, out: "queue.Queue[Any]", stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                made = (self.collate(self.stream.next()), self.stream.state_dict(), None)
            except Exception as error:
                made = (None, None, error)
            while not stop.is_set():
                try:
                    out.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if made[2] is not None:
                return

    def close(self) -> None:
        """Stop the thread and wait for it: one that is decoding while the interpreter ends would abort the process."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def state_dict(self) -> dict[str, Any]:
        """State after the last batch that was handed out."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; call it before the first `next`."""
        if self.stream is not None:
            self.stream.load_state_dict(state)
            self._state = state
