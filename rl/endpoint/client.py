"""The client: concurrent requests with retries, time limits, a cache and a cost ceiling, for synchronous callers."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from keye.errors import KeyeError
from rl.endpoint.ask import Answer, Ask
from rl.endpoint.cache import AnswerCache
from rl.endpoint.cost import Ledger, Price
from rl.endpoint.errors import EndpointError, RefusedRequest, TransientError
from rl.endpoint.local import LocalModel
from rl.endpoint.remote import RemoteModel


class Backend(Protocol):
    """A model that answers; `name` identifies it in the keys of the cache."""

    name: str

    async def complete(self, ask: Ask, seconds: float) -> Answer: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Limits:
    """Limits of requests.

    concurrency: requests at a time. seconds: until an attempt's answer is complete. patience: seconds from the first
    attempt of a request until no further one is made; while an endpoint limits the rate, from its latest answer.
    invalid: attempts that give no usable answer, such as one that is not JSON, until the request is refused.
    first_wait, longest_wait: seconds between two attempts; the wait doubles from one to the other.
    """

    concurrency: int = 16
    seconds: float = 300.0
    patience: float = 1800.0
    invalid: int = 4
    first_wait: float = 1.0
    longest_wait: float = 60.0

    def __post_init__(self) -> None:
        for name in ("concurrency", "seconds", "patience", "invalid", "first_wait", "longest_wait"):
            if not getattr(self, name) > 0:
                raise KeyeError(f"the limit {name} is {getattr(self, name)}; give a number above 0")


FREE, DEFAULTS = Price(), Limits()
QUIET = 30.0
"""Least seconds between two sentences that attempts fail; a busy endpoint fails and answers by turns."""


class Client:
    """Asks one model; safe for threads. Close it, or use it as a context manager.

    Args:
        backend: a `RemoteModel` or `LocalModel`.
        cache: folder of the answers.
        price: of tokens, with the ceiling; free by default.
        limits: of requests.
        log: receives a sentence when attempts begin to fail and when they succeed again.
    """

    def __init__(
        self,
        backend: Backend,
        cache: str | Path,
        price: Price = FREE,
        limits: Limits = DEFAULTS,
        log: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.backend, self.limits, self.log = backend, limits, log
        self.cache = AnswerCache(cache)
        self.ledger = Ledger(price, self.cache)
        self.hits = self.retries = 0
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._running: dict[str, asyncio.Task[Answer]] = {}
        self._failing = self._closing = False
        self._answered, self._said = 0.0, -QUIET  # time of the latest answer, and of the latest sentence
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="keye-endpoint", daemon=True)
        self._thread.start()

    @classmethod
    def from_environment(
        cls,
        role: str,
        cache: str | Path,
        price: Price = FREE,
        limits: Limits = DEFAULTS,
        log: Callable[[str], object] = lambda text: None,
    ) -> Client:
        """A client of the model that the variables KEYE_<ROLE>_URL, KEYE_<ROLE>_MODEL and KEYE_<ROLE>_KEY name.

        Without a URL, KEYE_<ROLE>_MODEL is a local model directory.

        Raises:
            KeyeError: a variable is missing, or the local model cannot be loaded.
        """
        prefix = f"KEYE_{role.upper()}"
        model = os.environ.get(f"{prefix}_MODEL", "").strip()
        if model and not os.environ.get(f"{prefix}_URL", "").strip() and Path(model).is_dir():
            return cls(LocalModel(model), cache, price, limits, log)
        return cls(RemoteModel.from_environment(prefix), cache, price, limits, log)

    def submit(self, ask: Ask) -> Future[Answer]:
        """Send a request in the background.

        Raises:
            EndpointError: the client is closed.
        """
        if not self._thread.is_alive() or self._closing:
            raise EndpointError(f"the client of {self.backend!r} is closed; make another one")
        return asyncio.run_coroutine_threadsafe(self._ask(ask), self._loop)

    def ask(self, ask: Ask) -> Answer:
        """The answer to a request.

        Raises:
            RefusedRequest: it gets no answer. EndpointError: no request gets one, or the cost ceiling is reached.
        """
        return self.submit(ask).result()

    def ask_many(self, asks: Iterable[Ask]) -> list[Answer]:
        """The answers to several requests, in their order; raises the first error as `ask` does."""
        futures = [self.submit(ask) for ask in asks]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Cancel what is running and close the connections; stored answers stay."""
        if self._closing:
            return
        self._closing = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.cache.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- in the thread of the event loop

    async def _end(self) -> None:
        for task in (others := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]):
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.backend.close()

    async def _ask(self, ask: Ask) -> Answer:
        key = ask.key(self.backend.name)
        found = self.cache.get(key)
        if found is not None:
            self.hits += 1
            return found
        task = self._running.get(key)
        if task is None:  # the same request may come from several threads at the same time
            task = self._running[key] = asyncio.create_task(self._send(ask, key))
            task.add_done_callback(lambda done: self._finish(key, done))
        return await asyncio.shield(task)

    def _finish(self, key: str, task: asyncio.Task[Answer]) -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()  # its callers may have stopped waiting; asyncio would log an error that nobody retrieved

    async def _send(self, ask: Ask, key: str) -> Answer:
        async with self._slots:
            attempt, invalid, wait, started = 1, 0, self.limits.first_wait, time.monotonic()
            while True:
                reserved = await self.ledger.reserve(ask)
                try:
                    answer = await self._attempt(ask)
                except TransientError as error:
                    await self.ledger.lose(reserved, error.charged)
                    invalid += "not a chat completion" in str(error)
                    # Others are answered: the endpoint is not gone, and this request waits for its turn.
                    self._check(error, attempt, invalid, max(started, self._answered) if error.busy else started)
                    pause = self._pause(error, wait)
                except BaseException as error:
                    cancelled = isinstance(error, asyncio.CancelledError)  # it is sent, and may be billed
                    await asyncio.shield(self.ledger.lose(reserved, charged=cancelled))
                    raise
                else:
                    self._report(None)
                    self._answered = time.monotonic()
                    return await self.ledger.settle(reserved, ask, key, answer)
                attempt, wait, self.retries = attempt + 1, min(wait * 2, self.limits.longest_wait), self.retries + 1
                await asyncio.sleep(pause)

    def _pause(self, error: TransientError, wait: float) -> float:
        """Seconds until the next attempt: those that the endpoint asks for, else `wait`, which doubles."""
        if error.wait is None:
            return wait * random.uniform(0.5, 1.0)
        asked = min(error.wait, self.limits.longest_wait) * random.uniform(1.0, 1.5)
        return max(self.limits.first_wait * random.uniform(0.5, 1.0), asked)

    async def _attempt(self, ask: Ask) -> Answer:
        """One attempt within the time limit, which also ends an answer that comes byte by byte."""
        seconds = self.limits.seconds
        try:
            async with asyncio.timeout(seconds):
                return await self.backend.complete(ask, seconds)
        except TimeoutError as error:
            raise TransientError(f"no complete answer within {seconds:g} s", charged=True) from error

    def _check(self, error: TransientError, attempt: int, invalid: int, started: float) -> None:
        """Raise the error that ends a request, or report that it is repeated."""
        if invalid >= self.limits.invalid:
            raise RefusedRequest(f"{self.backend!r} gave no usable answer in {invalid} attempts ({error})") from error
        if time.monotonic() - started >= self.limits.patience:
            raise EndpointError(
                f"{self.backend!r} gave no answer in {attempt} attempts over {time.monotonic() - started:.0f} s "
                f"({error}); check it and run the same command again, which keeps all answers"
            ) from error
        self._report(error)

    def _report(self, error: TransientError | None) -> None:
        """Say that attempts begin to fail, at most twice a minute, and that they succeed again."""
        now = time.monotonic()
        if error is not None and not self._failing and now - self._said >= QUIET:
            self.log(f"{self.backend!r}: {error}; the request is repeated for up to {self.limits.patience:g} s")
            self._failing, self._said = True, now
        if error is None and self._failing:
            self.log(f"{self.backend!r} answers again")
            self._failing = False
