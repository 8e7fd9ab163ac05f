"""One answer of the model as it is written: pieces of text, what of it is thought, and what it took.

`Answering` runs `generate` in a thread of its own, `BatchedAnswering` takes part in a running batch. Whoever reads the
pieces can stop at any time: between two tokens, and during the prompt between two layers.
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
    """A few characters of a reply; thinking: whether they belong to its thought."""

    text: str
    thinking: bool


@dataclass
class Figures:
    """What a reply took.

    prompt_tokens, of which cached_tokens were in the cache already; seconds until the first token (prefill_seconds) and
    from there to the last (decode_seconds). new_tokens: of the reply; where a stop text ended it, up to the token that
    completed the text, though the model may have written a few more. finish: "stop" (the model ended), "length" or
    "interrupted".
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish: str = "stop"

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the first token counts to the prompt's time. NaN for fewer than two."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else float("nan")


class _Counted(Iterator[int]):
    """Counts what is read of an iterator."""

    def __init__(self, items: Iterator[int]) -> None:
        self.items, self.count = items, 0

    def __next__(self) -> int:
        item = next(self.items)
        self.count += 1
        return item


class _Stopped(Exception):
    """Raised inside the model to leave a prompt that nobody waits for."""


@dataclass
class Answering:
    """A reply to `inputs`, drawn while it is iterated over: gives `Piece`s; `text` and `figures` grow meanwhile.

    Closing the iterator, or an exception in its reader, stops the model. Afterwards `sequence` holds the ids of prompt
    and reply; None if the model was stopped within the prompt (then `cache` cannot be used again).

    inputs: a processor's, one row. cache: a transformers cache to go on from; it grows.
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
        read = _Counted(iter(self._tokens.get, None))
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
                f"the device's memory does not hold this chat of {self.figures.prompt_tokens} tokens; use shorter clips"
                " or a smaller budget"
            ) from self._failure
        if self._failure is not None:
            reason = (str(self._failure).splitlines() or [""])[0][:200]
            raise KeyeError(
                f"the model failed on this chat ({type(self._failure).__name__}: {reason}); ask again without its clips"
                " to see whether they are the cause"
            ) from self._failure

    def _start(self) -> Callable[[], object]:
        """Begin to generate; what is returned waits for the end."""
        worker = threading.Thread(target=self._generate, daemon=True, name="keye-answer")
        stop_at_exit(worker, self._stop.set)
        worker.start()
        return worker.join

    def stop(self) -> None:
        """Ask the model to end the reply at the next token; the iterator then ends by itself."""
        self._stop.set()

    def _ended(self) -> bool:
        return self.sequence is not None and int(self.sequence[-1]) in self._ends()

    def _ends(self) -> list[int]:
        """Ids that end a reply: the model's own, and the tokenizer's end of a turn."""
        told = self.model.generation_config.eos_token_id
        told = told if isinstance(told, list) else [told]
        return sorted({end for end in (*told, self.tokenizer.eos_token_id) if end is not None})

    def _generate(self) -> None:
        began = time.perf_counter()
        streamer = _Streamer(self._tokens, self.figures, began)
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
                stopping_criteria=StoppingCriteriaList([_When(self._stop)]),
                eos_token_id=self._ends(),
                pad_token_id=self.tokenizer.pad_token_id,
                **self.sampling.options(),
            )
            self.sequence = rows[0].cpu()
        except _Stopped:
            pass
        except BaseException as error:  # whatever it is, the reader is told
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
    """The same reply from a `BatchEngine`, beside those to other requests; without a cache to go on from."""

    engine: BatchEngine | None = None

    def _start(self) -> Callable[[], object]:
        self._done = threading.Event()
        self._streamer = _Streamer(self._tokens, self.figures, time.perf_counter())
        self._streamer.prompt = False
        self.engine.submit(self, self.inputs, self.sampling, self._ends())
        return self._done.wait

    @property
    def stopped(self) -> bool:
        """Whether the reader has left."""
        return self._stop.is_set()

    def emit(self, token: int) -> None:
        """One more token, from the engine."""
        self._streamer.put(torch.tensor([token]))

    def done(self, sequence: Tensor | None, error: BaseException | None) -> None:
        """The end, from the engine."""
        self.sequence, self._failure = sequence, error
        self._tokens.put(None)
        self._done.set()


class _Streamer(BaseStreamer):
    """Hands on each new token and keeps the time. `generate` gives the prompt first."""

    def __init__(self, tokens: "queue.SimpleQueue[int | None]", figures: Figures, began: float) -> None:
        self.tokens, self.figures, self.began, self.prompt = tokens, figures, began, True

    def put(self, value: Tensor) -> None:
        if self.prompt:
            self.prompt = False
            return
        now, figures = time.perf_counter(), self.figures
        for token in value.flatten().tolist():
            figures.new_tokens += 1
            self.tokens.put(token)
        if figures.new_tokens == 1:
            figures.prefill_seconds = now - self.began
        figures.decode_seconds = now - self.began - figures.prefill_seconds

    def end(self) -> None:
        pass


class _When(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def detokenize(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> Iterator[str]:
    """Token ids, as they come, → their text without special tokens; characters of several tokens come whole."""
    line: list[int] = []
    shown = ""
    for token in ids:
        line.append(token)
        text = tokenizer.decode(line, skip_special_tokens=True)
        if text.endswith("\ufffd") and len(line) < 4096:  # the rest of a character is to come
            continue
        if len(text) > len(shown):
            yield text[len(shown) :]
        # A finished line is let go, so that a long answer is not decoded from its beginning for every token.
        line, shown = ([], "") if text.endswith("\n") else (line, text)
    rest = tokenizer.decode(line, skip_special_tokens=True)
    if len(rest) > len(shown):
        yield rest[len(shown) :]


class StopTexts:
    """Cuts a stream of text before the first of some texts; `found` says afterwards whether there was one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.found = texts, False

    def __call__(self, stream: Iterable[str]) -> Iterator[str]:
        held = ""
        for text in stream:
            held += text
            places = [place for stop in self.texts if (place := held.find(stop)) >= 0]
            if places:
                self.found = True
                held = held[: min(places)]
                break
            kept = _unsure(held, self.texts)
            if out := held[: len(held) - kept]:
                yield out
            held = held[len(held) - kept :]
        if held:
            yield held


class ThoughtSplit:
    """Splits a stream of text at `<think>`, `</think>`, `<answer>` and `</answer>`, which vanish."""

    def __init__(self) -> None:
        self._held, self._thinking, self._begun = "", False, False

    def feed(self, text: str) -> Iterator[Piece]:
        """The pieces that are certain now; what may become a tag waits."""
        self._held += text
        while found := [(place, tag) for tag in TAGS if (place := self._held.find(tag)) >= 0]:
            place, tag = min(found)
            yield from self._say(self._held[:place].rstrip())
            self._held = self._held[place + len(tag) :]
            self._thinking, self._begun = tag == "<think>", False
        # White space before a tag is no part of what is said, and a tag may be about to come.
        kept = _unsure(self._held, TAGS)
        sure = self._held[: len(self._held) - kept].rstrip()
        self._held = self._held[len(sure) :]
        yield from self._say(sure)

    def close(self) -> Iterator[Piece]:
        """What is left when no more text comes."""
        yield from self._say(self._held.rstrip())
        self._held = ""

    def _say(self, text: str) -> Iterator[Piece]:
        text = text if self._begun else text.lstrip()
        if text:
            self._begun = True
            yield Piece(text, self._thinking)


def _unsure(text: str, tags: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of one of the tags."""
    return max((n for tag in tags for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)
