"""Requests → answers of one model, for a bounded number of requests at a time; no HTTP."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address

from keye.errors import KeyeError
from keye.inference.answering import Answering, BatchedAnswering
from keye.inference.batching import BatchEngine
from keye.inference.openai_format import Request, RequestError
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    with contextlib.suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


class Answerer:
    """The model, its processor, and the places for requests.

    Args:
        model, processor: of one directory.
        name: of the model in requests.
        most_tokens: of one answer.
        batch: number of answers generated together.
        waiting: number of further requests that may wait; one more gets status 429.

    Raises:
        KeyeError: a batch below 1 or a negative queue.
    """

    def __init__(
        self,
        model: KeyeForConditionalGeneration,
        processor: KeyeProcessor,
        name: str,
        most_tokens: int = 4096,
        batch: int = 8,
        waiting: int = 16,
    ) -> None:
        if batch < 1 or waiting < 0:
            raise KeyeError(f"--batch {batch} must be at least 1 and --queue {waiting} at least 0")
        self.model, self.processor, self.name, self.most_tokens = model, processor, name, most_tokens
        self.batch, self.places, self.created = batch, batch + waiting, int(time.time())
        self.context = model.config.text_config.max_position_embeddings
        self._taken, self._lock = 0, threading.Lock()
        self._engine: BatchEngine | None = None

    @contextlib.contextmanager
    def place(self) -> Iterator[Callable[[], None]]:
        """Take one of the places for requests, before the body is read; RequestError if all are taken.

        Yields a function that frees the place early, when the answer is generated.
        """
        with self._lock:
            if self._taken >= self.places:
                raise RequestError(f"{self.places} requests are in progress; try again later", 429, "busy")
            self._taken += 1
        freed = False

        def release() -> None:
            nonlocal freed
            with self._lock:
                self._taken -= not freed
                freed = True

        try:
            yield release
        finally:
            release()

    def start(self, request: Request) -> Answering:
        """The answer to a request, for iteration; clips that are too long for the context are made smaller."""
        if request.model not in (None, "", self.name):
            raise RequestError(f"there is no model {request.model!r} here, only {self.name}", 404, "model_not_found")
        wanted = min(request.sampling.max_new_tokens, max(1, self.context // 2))
        sample = self.processor.sample(
            request.messages,
            add_generation_prompt=True,
            thinking=request.thinking,
            max_length=self.context - wanted,
        )
        inputs = self.processor.collate([sample])
        inputs.pop("labels")
        room = min(request.sampling.max_new_tokens, self.context - len(sample))
        sampling = replace(request.sampling, max_new_tokens=room)
        scores = [] if request.logprobs or request.token_ids else None
        return BatchedAnswering(
            self.model, self.processor.tokenizer, inputs, sampling, engine=self.engine, logprobs=scores
        )

    @property
    def engine(self) -> BatchEngine:
        """The engine that generates, started with the first request."""
        with self._lock:
            if self._engine is None:
                self._engine = BatchEngine(self.model, self.batch)
            return self._engine

    def close(self) -> None:
        """Stop generating."""
        if self._engine is not None:
            self._engine.close()


def message_for_client(error: KeyeError) -> str:
    """The error's message with a remedy for the sender of a request, instead of one that names Python arguments."""
    if isinstance(error, RequestError):
        return str(error)
    fault = str(error).split("; ")[0]
    return f"{fault}; send another clip or image, a shorter part (start, end) or fewer frames a second (fps)"
