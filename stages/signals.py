"""Requests to a training run by signals: SIGTERM stops it after a checkpoint, SIGUSR1 saves one."""

import signal
from types import TracebackType
from typing import Any

REQUESTS = {signal.SIGTERM: "stop", signal.SIGUSR1: "save"}


class SignalRequests:
    """Collects the requests that reach this process while it is used as a context.

    Signals reach the ranks at different times. So the trainer exchanges `pending` at the end of each step, and all
    ranks save or stop after the same one.

    Attributes:
        pending: "stop" and "save", from signals that were not answered yet.
    """

    def __init__(self) -> None:
        self.pending: set[str] = set()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SignalRequests":
        self._before = {number: signal.signal(number, self._receive) for number in REQUESTS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        self.pending.add(REQUESTS[signal.Signals(number)])
