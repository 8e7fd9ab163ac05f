"""Continuous batching: one model generates several replies, and a request joins the running batch when there is room.

One thread runs the model. It prefills a new prompt alone, pads the key-value caches on the left to one length, and then
decodes a token for every row per step. A row that ends leaves the batch, and padding that no row needs is removed.
"""

import atexit
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from keye.inference.sampling import Sampling


class Reader(Protocol):
    """The receiver of a reply. All methods are called from the engine's thread."""

    @property
    def stopped(self) -> bool:
        """Whether the reply is no longer needed."""
        ...

    def begin(self, weights: str) -> None:
        """Receive the version of the weights that the complete reply is sampled with."""
        ...

    def emit(self, token: int) -> None:
        """Receive a token of the reply."""
        ...

    def done(self, sequence: Tensor | None, error: BaseException | None) -> None:
        """Receive the end. sequence: ids of prompt and reply `[L]`, None if the prompt was not finished."""
        ...


FIRST = "start"
"""Version of the weights that a model had when its engine was made."""


class _Stopped(Exception):
    """Leaves a prompt whose reader has stopped."""


@dataclass(eq=False)
class _Row:
    """One reply in the batch. position: of the next token; tokens: the reply so far."""

    reader: Reader
    inputs: Mapping[str, Tensor]
    sampling: Sampling
    ends: frozenset[int]
    tokens: list[int]
    processors: LogitsProcessorList
    logprobs: list[float] | None = None
    generator: torch.Generator | None = None
    position: int = 0
    finished: bool = False

    def finish(self, sequence: Tensor | None = None, error: BaseException | None = None) -> None:
        """Report the end to the reader, once."""
        if not self.finished:
            self.finished = True
            self.reader.done(sequence, error)


class BatchEngine:
    """Continuous batching over one model.

    Args:
        model: `KeyeForConditionalGeneration` in eval mode; this engine's thread is the only one that calls it.
        size: the most rows decoded together.

    Attributes:
        weights: version of the model's weights; None while they are replaced, or if that failed.
    """

    def __init__(self, model: nn.Module, size: int = 8) -> None:
        self.model, self.size = model, size
        self._waiting: deque[_Row] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.weights: str | None = FIRST
        self._actions: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._rows: list[_Row] = []
        self._cache: DynamicCache | None = None
        self._mask = torch.empty(0, 0, dtype=torch.long)
        self._logits = torch.empty(0)
        self._thread = threading.Thread(target=self._work, name="keye-batch", daemon=True)
        self._thread.start()
        # A thread inside a library while the interpreter exits aborts the process.
        atexit.register(self.close)

    def submit(
        self,
        reader: Reader,
        inputs: Mapping[str, Tensor],
        sampling: Sampling,
        ends: Sequence[int],
        logprobs: list[float] | None = None,
    ) -> None:
        """Queue a prompt.

        Args:
            reader: receives the reply.
            inputs: one row, as the processor's `collate` returns it.
            sampling: how tokens are chosen.
            ends: ids that end a reply.
            logprobs: gets the log-probability of each token at temperature 1 and without warpers, before `emit`.

        Raises:
            RuntimeError: the engine is closed.
        """
        processors = _processors(sampling, self.model.generation_config)
        row = _Row(reader, inputs, sampling, frozenset(ends), [], processors, logprobs)
        if sampling.seed is not None:
            row.generator = torch.Generator(self.model.device).manual_seed(sampling.seed)
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._waiting.append(row)
            self._changed.notify()

    def between(self, action: Callable[[], None]) -> None:
        """Run an action in the engine's thread when no reply is in progress, and wait for it; new prompts wait too.

        Raises:
            RuntimeError: the engine is closed. Otherwise what the action raises.
        """
        done: Future[None] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._actions.append((action, done))
            self._changed.notify()
        done.result()

    def close(self) -> None:
        """Stop after the current token and wait for the thread; unfinished replies end with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()
        atexit.unregister(self.close)

    # --- the engine's thread

    @torch.no_grad()
    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._rows or self._actions or self._closed):
                    self._changed.wait()
                if self._closed:
                    break
                left = [row for row in self._waiting if row.reader.stopped]
                for row in left:
                    self._waiting.remove(row)
                room = len(self._rows) < self.size and not self._actions
                new = self._waiting.popleft() if self._waiting and room else None
                action = self._actions.popleft() if self._actions and not self._rows else None
            if action is not None:
                _act(*action)
            for row in left:
                row.finish()
            if new is not None:
                self._admit(new)
            if self._rows:
                self._step()
        for row in (*self._rows, *self._waiting):
            row.finish(error=RuntimeError("the engine was closed"))
        for _, done in self._actions:
            done.set_exception(RuntimeError("the engine was closed"))
        self._rows = []

    def _admit(self, row: _Row) -> None:
        """Prefill a prompt alone and add it to the running rows."""
        try:
            if self.weights is None:
                raise RuntimeError("the weights were not loaded completely; load them again")
            row.reader.begin(self.weights)
            logits, cache, mask = self._prefill(row)
            if self._rows and self._cache is not None:
                self._cache, self._mask = _joined(self._cache, self._mask, cache, mask)
                self._logits = torch.cat([self._logits, logits])
            else:
                self._cache, self._mask, self._logits = cache, mask, logits
            self._rows.append(row)
        except _Stopped:
            row.finish()
        except BaseException as error:  # the reader gets it, and the other rows continue
            row.finish(error=error)

    def _prefill(self, row: _Row) -> tuple[Tensor, DynamicCache, Tensor]:
        """Logits `[1, V]` of the first token, the prompt's cache and its attention mask `[1, L]`."""

        def leave(*_: object) -> None:
            if row.reader.stopped or self._closed:
                raise _Stopped

        layers = [m for parts in self.model.modules() if isinstance(parts, nn.ModuleList) for m in parts]
        hooks = [layer.register_forward_pre_hook(leave) for layer in layers]
        try:
            inputs = {name: value.to(self.model.device) for name, value in row.inputs.items()}
            mask = inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
            if inputs.get("position_ids") is None:
                grids = (inputs.get("image_grid_thw"), inputs.get("video_grid_thw"))
                blocks = {"video_blocks": inputs.get("video_blocks")}
                inputs["position_ids"] = self.model.positions(inputs["input_ids"], mask, *grids, **blocks)
            row.position = int(inputs["position_ids"].max()) + 1
            output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        return output.logits[:, -1], output.past_key_values, mask

    def _step(self) -> None:
        """One token for every row; rows that end leave the batch."""
        try:
            kept = [place for place, row in enumerate(self._rows) if self._try_draw(row, self._logits[place])]
            if len(kept) < len(self._rows):
                self._keep(kept)
            if self._rows:
                self._forward()
        except BaseException as error:  # the batch is lost, the server is not
            for row in self._rows:
                row.finish(error=error)
            self._rows, self._cache = [], None

    def _try_draw(self, row: _Row, logits: Tensor) -> bool:
        """`_draw`; a failure ends only this row."""
        try:
            return self._draw(row, logits)
        except Exception as error:
            row.finish(error=error)
            return False

    def _draw(self, row: _Row, logits: Tensor) -> bool:
        """Draw a row's next token from logits `[V]`; returns whether the row continues."""
        if row.reader.stopped:
            row.finish(self._sequence(row))
            return False
        config = self.model.config
        scores = logits.float()[None].clone()
        # A placeholder in a reply would need pixels, and there are none.
        scores[:, [config.image_token_id, config.video_token_id]] = float("-inf")
        if row.sampling.temperature:
            probabilities = row.processors(torch.empty(1, 0, dtype=torch.long), scores).softmax(-1)
            token = int(torch.multinomial(probabilities, 1, generator=row.generator))
        else:
            token = int(scores.argmax())
        row.tokens.append(token)
        if row.logprobs is not None:
            row.logprobs.append(float(scores[0, token] - scores[0].logsumexp(-1)))
        row.reader.emit(token)
        if token in row.ends or len(row.tokens) >= row.sampling.max_new_tokens:
            row.finish(self._sequence(row))
            return False
        return True

    def _keep(self, places: list[int]) -> None:
        """Keep the rows at `places`, and remove padding that none of them needs."""
        self._rows = [self._rows[place] for place in places]
        if not self._rows:
            self._cache = None
            return
        index = torch.tensor(places, device=self._mask.device)
        self._mask = self._mask[index]
        self._cache.batch_select_indices(index)
        lead = int(self._mask.argmax(dim=1).min())
        self._mask = self._mask[:, lead:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[:, :, lead:].contiguous(), layer.values[:, :, lead:].contiguous()

    def _forward(self) -> None:
        device = self.model.device
        tokens = torch.tensor([[row.tokens[-1]] for row in self._rows], device=device)
        positions = torch.tensor([[row.position] for row in self._rows], device=device)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._rows), 1)], dim=1)
        output = self.model(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=positions.expand(3, -1, -1),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._logits = output.logits[:, -1]
        for row in self._rows:
            row.position += 1

    @staticmethod
    def _sequence(row: _Row) -> Tensor:
        return torch.cat([row.inputs["input_ids"][0].cpu(), torch.tensor(row.tokens, dtype=torch.long)])


def _act(action: Callable[[], None], done: Future[None]) -> None:
    try:
        action()
        done.set_result(None)
    except BaseException as error:  # raised in the thread that waits
        done.set_exception(error)


def _processors(sampling: Sampling, defaults: Any) -> LogitsProcessorList:
    """The warpers of `generate` in its order; the generation config gives the defaults."""
    top_k = sampling.top_k if sampling.top_k is not None else defaults.top_k
    top_p = sampling.top_p if sampling.top_p is not None else defaults.top_p
    min_p = sampling.min_p if sampling.min_p is not None else defaults.min_p
    found = LogitsProcessorList()
    if sampling.temperature not in (0, 1):
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if top_k:
        found.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        found.append(TopPLogitsWarper(top_p))
    if min_p:
        found.append(MinPLogitsWarper(min_p))
    return found


def _joined(cache: DynamicCache, mask: Tensor, other: DynamicCache, other_mask: Tensor) -> tuple[DynamicCache, Tensor]:
    """Two caches `[B, H, L, D]` and masks `[B, L]` as one batch, the shorter padded on the left; `cache` is changed."""
    length = max(mask.shape[1], other_mask.shape[1])
    mask = torch.cat([pad(m, (length - m.shape[1], 0)) for m in (mask, other_mask)])
    joined = []
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        if type(mine) is not DynamicLayer or type(theirs) is not DynamicLayer:
            raise NotImplementedError(f"{type(mine).__name__} cannot be batched; start the server with --batch 1")
        pairs = ((mine.keys, theirs.keys), (mine.values, theirs.values))
        joined.append([torch.cat([pad(p, (0, 0, length - p.shape[-2], 0)) for p in pair]) for pair in pairs])
    for mine, (keys, values) in zip(
        cache.layers, joined, strict=True
    ):  # all layers or none: the running rows use this cache
        mine.keys, mine.values = keys, values
    return cache, mask
