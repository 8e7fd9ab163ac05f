"""One answer of the model while it is generated: pieces of text, split into thought and answer, and its statistics.

`Answering` runs `generate` in its own thread; `BatchedAnswering` joins a running batch. The reader of the pieces can
stop at any time: between two tokens, and during the prompt between two layers.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from keye.errors import KeyeError
from keye.inference.batching import BatchEngine
from keye.inference.sampling import Sampling
from keye.video.decoding.prefetch import stop_at_exit

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


class Piece(NamedTuple):
    """Some text of a reply; thinking: whether it belongs to the thought."""

    text: str
    thinking: bool


@dataclass
class Figures:
    """The statistics of a reply.

    prompt_tokens, of which cached_tokens were in the cache. new_tokens: of the reply; after a stop text, those up to
    the token that completed it. prefill_seconds: until the first token. decode_seconds: from the first token to the
    last. finish: "stop" (an end token or a stop text), "length" or "interrupted".
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish: str = "stop"

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, without the first token, which belongs to the prefill. NaN for fewer than two tokens."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else float("nan")


class _CountingIterator(Iterator[int]):
    """An iterator that counts its items."""

    def __init__(self, items: Iterator[int]) -> None:
        self.items, self.count = items, 0

    def __next__(self) -> int:
        item = next(self.items)
        self.count += 1
        return item


class _Stopped(Exception):
    """Raised inside the model to leave a prompt whose reader has stopped."""


@dataclass
class Answering:
    """A reply to `inputs`. Iterating generates it and gives `Piece`s, while `text` and `figures` are updated.

    Closing the iterator, or an exception in its reader, stops the model. Afterwards `sequence` has the ids of prompt
    and reply `[L]`; None if the model was stopped within the prompt (`cache` cannot be used again then).

    Args:
        model: a `KeyeForConditionalGeneration`.
        tokenizer: the processor's.
        inputs: the processor's, one row.
        sampling: how tokens are chosen.
        cache: a transformers cache to continue from; it grows.

    Raises:
        KeyeError: while iterating, if the model fails.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    inputs: Mapping[str, Tensor]
    sampling: Sampling = Sampling()
    cache: Any = None
    text: str = ""
    figures: Figures = field(default_factory=Figures)
    sequence: Tensor | None = None

    def __post_init__(self) -> None:
        self.figures.prompt_tokens = self.inputs["input_ids"].shape[1]
        self.figures.cached_tokens = 0 if self.cache is None else int(self.cache.get_seq_length())
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    def __iter__(self) -> Iterator[Piece]:
        wait = self._start()
        split, complete, cut = ThoughtSplit(), False, StopTexts(self.sampling.stop)
        read = _CountingIterator(iter(self._tokens.get, None))
        try:
            for text in cut(detokenize(self.tokenizer, read)):
                self.text += text
                yield from split.feed(text)
            yield from split.close()
            complete = True
        finally:
            self._stop.set()
            wait()
            if cut.found:
                self.figures.new_tokens = read.count
            if not complete:
                self.figures.finish = "interrupted"
            elif cut.found or self._ended():
                self.figures.finish = "stop"
            else:
                self.figures.finish = "length"
        if isinstance(self._failure, torch.OutOfMemoryError):
            raise KeyeError(
                f"this chat of {self.figures.prompt_tokens} tokens does not fit into memory; use shorter clips"
                " or a smaller budget"
            ) from self._failure
        if self._failure is not None:
            reason = (str(self._failure).splitlines() or [""])[0][:200]
            raise KeyeError(
                f"the model failed on this chat ({type(self._failure).__name__}: {reason}); try it without its clips"
                " to see whether they are the cause"
            ) from self._failure

    def _start(self) -> Callable[[], object]:
        """Start generation; the returned function waits for its end."""
        worker = threading.Thread(target=self._generate, daemon=True, name="keye-answer")
        stop_at_exit(worker, self._stop.set)
        worker.start()
        return worker.join

    def stop(self) -> None:
        """End the reply at the next token; the iterator then ends by itself."""
        self._stop.set()

    def _ended(self) -> bool:
        return self.sequence is not None and int(self.sequence[-1]) in self._ends()

    def _ends(self) -> list[int]:
        """Ids that end a reply: the model's own, and the tokenizer's end of a turn."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        every = (*ends, self.tokenizer.eos_token_id, *self.sampling.stop_ids)
        return sorted({end for end in every if end is not None})

    def _generate(self) -> None:
        streamer = _Streamer(self._tokens, self.figures)
        hooks = [
            layer.register_forward_pre_hook(self._leave)
            for layers in self.model.modules()
            if isinstance(layers, nn.ModuleList)
            for layer in layers
        ]
        try:
            if self.sampling.seed is not None:
                torch.manual_seed(self.sampling.seed)
            rows = self.model.generate(
                **{name: value.to(self.model.device) for name, value in self.inputs.items()},
                past_key_values=self.cache,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_StopOnEvent(self._stop)]),
                eos_token_id=self._ends(),
                pad_token_id=self.tokenizer.pad_token_id,
                **self.sampling.options(),
            )
            self.sequence = rows[0].cpu()
        except _Stopped:
            pass
        except BaseException as error:  # the reader raises it
            self._failure = error
        finally:
            for hook in hooks:
                hook.remove()
            self._tokens.put(None)

    def _leave(self, *_: object) -> None:
        if self._stop.is_set() and not self.figures.new_tokens:
            raise _Stopped


@dataclass
class BatchedAnswering(Answering):
    """The same reply from a `BatchEngine`, in a batch with other requests; without a cache to continue from.

    logprobs: an empty list gets the log-probability of each token, at temperature 1. weights: version of the model's
    weights, known with the first token.
    """

    engine: BatchEngine | None = None
    logprobs: list[float] | None = None
    weights: str | None = None

    def _start(self) -> Callable[[], object]:
        self._done = threading.Event()
        self._streamer = _Streamer(self._tokens, self.figures)
        self._streamer.prompt = False
        self.engine.submit(self, self.inputs, self.sampling, self._ends(), self.logprobs)
        return self._done.wait

    def scored(self) -> list[tuple[int, float]]:
        """(id, log-probability) of the reply's tokens, up to the one that completed a stop text."""
        if self.sequence is None or self.logprobs is None:
            return []
        ids = self.sequence[self.figures.prompt_tokens :].tolist()
        return list(zip(ids, self.logprobs, strict=False))[: self.figures.new_tokens]

    @property
    def stopped(self) -> bool:
        """Whether the reader has stopped."""
        return self._stop.is_set()

    def begin(self, weights: str) -> None:
        """Receive the version of the weights from the engine."""
        self.weights = weights

    def emit(self, token: int) -> None:
        """Receive a token from the engine."""
        self._streamer.put(torch.tensor([token]))

    def done(self, sequence: Tensor | None, error: BaseException | None) -> None:
        """Receive the end from the engine: the ids `[L]` of prompt and reply, or an error."""
        self.sequence, self._failure = sequence, error
        self._tokens.put(None)
        self._done.set()


class _Streamer(BaseStreamer):
    """Forwards each new token and measures time. `generate` gives the prompt first."""

    def __init__(self, tokens: "queue.SimpleQueue[int | None]", figures: Figures) -> None:
        self.tokens, self.figures, self.prompt = tokens, figures, True
        self.started = time.perf_counter()

    def put(self, value: Tensor) -> None:
        if self.prompt:
            self.prompt = False
            return
        now, figures = time.perf_counter(), self.figures
        for token in value.flatten().tolist():
            figures.new_tokens += 1
            self.tokens.put(token)
        if figures.new_tokens == 1:
            figures.prefill_seconds = now - self.started
        figures.decode_seconds = now - self.started - figures.prefill_seconds

    def end(self) -> None:
        pass


class _StopOnEvent(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def detokenize(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> Iterator[str]:
    """Token ids → their text without special tokens, as soon as all tokens of a character are there."""
    line: list[int] = []
    emitted = ""
    for token in ids:
        line.append(token)
        text = tokenizer.decode(line, skip_special_tokens=True)
        if text.endswith("\ufffd") and len(line) < 4096:  # the rest of a character is to come
            continue
        if len(text) > len(emitted):
            yield text[len(emitted) :]
        # A finished line is dropped, so that a long answer is not decoded from its beginning for every token.
        line, emitted = ([], "") if text.endswith("\n") else (line, text)
    rest = tokenizer.decode(line, skip_special_tokens=True)
    if len(rest) > len(emitted):
        yield rest[len(emitted) :]


class StopTexts:
    """Ends a stream of text before the first stop text; afterwards `found` tells whether there was one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.found = texts, False

    def __call__(self, stream: Iterable[str]) -> Iterator[str]:
        pending = ""
        for text in stream:
            pending += text
            places = [place for stop in self.texts if (place := pending.find(stop)) >= 0]
            if places:
                self.found = True
                pending = pending[: min(places)]
                break
            certain = len(pending) - _partial_match(pending, self.texts)
            if certain:
                yield pending[:certain]
            pending = pending[certain:]
        if pending:
            yield pending


class ThoughtSplit:
    """Splits a stream of text at `<think>`, `</think>`, `<answer>` and `</answer>`, and removes these tags."""

    def __init__(self) -> None:
        self._pending, self._thinking, self._started = "", False, False

    def feed(self, text: str) -> Iterator[Piece]:
        """The pieces that are certain; text that may become a tag is kept back."""
        self._pending += text
        while found := [(place, tag) for tag in TAGS if (place := self._pending.find(tag)) >= 0]:
            place, tag = min(found)
            yield from self._piece(self._pending[:place].rstrip())
            self._pending = self._pending[place + len(tag) :]
            self._thinking, self._started = tag == "<think>", False
        # White space before a tag is dropped, and a tag may follow.
        certain = self._pending[: len(self._pending) - _partial_match(self._pending, TAGS)].rstrip()
        self._pending = self._pending[len(certain) :]
        yield from self._piece(certain)

    def close(self) -> Iterator[Piece]:
        """The rest, at the end of the text."""
        yield from self._piece(self._pending.rstrip())
        self._pending = ""

    def _piece(self, text: str) -> Iterator[Piece]:
        text = text if self._started else text.lstrip()
        if text:
            self._started = True
            yield Piece(text, self._thinking)


def _partial_match(text: str, tags: Sequence[str]) -> int:
    """The number of characters at the end of the text that may be the start of a tag."""
    return max((n for tag in tags for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)
