"""One server of rollouts: requests that wait while it is down or busy, and the weights that its answers must have."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from keye.errors import KeyeError
from keye.inference.batching import FIRST

Result = TypeVar("Result")

LOADS = 3  # of a server that answers with its first weights, for one request


@dataclass(frozen=True)
class Served:
    """A server. url: with /v1. model: its name there, "" for its only one. concurrency: requests at a time.

    seconds: until an answer is complete. patience: seconds that a request waits for a server that is down or busy.
    appears: seconds until the server sees a folder that was written, on a network file system.
    """

    url: str
    model: str = ""
    api_key: str = "none"
    concurrency: int = 16
    seconds: float = 600.0
    patience: float = 1800.0
    longest_wait: float = 30.0
    appears: float = 120.0


def to_stderr(text: str) -> None:
    """Print a sentence of the log."""
    print(text, file=sys.stderr, flush=True)


class Connection:
    """Requests to one server; safe for threads.

    Attributes:
        version: of the weights that answers must have; None accepts any.
    """

    def __init__(self, server: Served, log: Callable[[str], None] = to_stderr) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise KeyeError("served rollouts need openai; install it with pip install 'keye[reasoning]'") from error
        self.server, self.log = server, log
        self.client = OpenAI(base_url=server.url, api_key=server.api_key, timeout=server.seconds, max_retries=0)
        self.version: str | None = None
        self.down = False
        self._loading = threading.Lock()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The response to a chat completion, sampled with the weights `version`.

        A server that was started again has its first weights; it is asked to load `version`, and the request is sent
        again.

        Raises:
            KeyeError: the answer has other weights, the server refuses, or it is down for longer than the patience.
        """
        create, model = self.client.chat.completions.create, self.server.model
        for _ in range(LOADS + 1):
            version = self.version
            answer = self._waiting("a rollout", lambda: create(model=model, logprobs=True, **body)).model_dump()
            found = answer.get("system_fingerprint")
            if version in (None, found):
                return answer
            if found != FIRST:
                break
            if not self._loading.locked():  # said once, not for each request that was in progress
                self.log(f"{self.server.url} was started again; it loads the weights {version}")
            self.load(version)
        cause = "another run uses it" if found != FIRST else "it does not load new ones"
        raise KeyeError(
            f"{self.server.url} answers with the weights {found}, not with {version}: {cause}; give each run a "
            "keye serve of its own"
        )

    def load(self, version: str) -> None:
        """Let the server load weights; it does nothing if it has them.

        Raises:
            KeyeError: it has no such route, does not see the folder, refuses, or is down for longer than the patience.
        """
        with self._loading:  # other threads wait for the same weights
            answer = self._waiting("to load weights", lambda: self._reload(version))
        if not isinstance(answer, dict) or answer.get("version") != version:
            raise KeyeError(f"{self.server.url} did not load the weights {version}; serve the model with keye serve")

    def _reload(self, version: str) -> Any:
        """One request to load weights, repeated while the folder is not there yet."""
        import openai

        began = time.monotonic()
        while True:
            try:
                return self.client.post("/reload", body={"version": version}, cast_to=object)
            except openai.NotFoundError as error:
                if error.code != "no_version":
                    raise KeyeError(
                        f"{self.server.url} cannot load new weights; serve the model with keye serve --allow-reload"
                    ) from error
                if time.monotonic() - began > self.server.appears:
                    raise KeyeError(
                        f"{self.server.url} does not see the weights {version}; give keye serve --allow-reload the "
                        "folder that the run writes them to, on a file system that both share"
                    ) from error
                time.sleep(min(1.0, self.server.appears / 4))

    def _waiting(self, what: str, request: Callable[[], Result]) -> Result:
        """What a request returns; waits while the server is down, busy or failing."""
        import openai

        began, wait = time.monotonic(), 0.25
        while True:
            try:
                answer = request()
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
                if time.monotonic() - began + wait > self.server.patience:
                    raise KeyeError(
                        f"{self.server.url} did not answer for {self.server.patience:g} s ({type(error).__name__}); "
                        "start it again and repeat the command"
                    ) from error
                self._say(True, f"{self.server.url} does not answer ({type(error).__name__}); waiting for it")
                time.sleep(wait)
                wait = min(2 * wait, self.server.longest_wait)
            except openai.APIStatusError as error:
                raise KeyeError(f"{self.server.url} refused {what}: {error.message}") from error
            else:
                self._say(False, f"{self.server.url} answers again")
                return answer

    def _say(self, down: bool, text: str) -> None:
        if self.down != down:
            self.down = down
            self.log(text)
