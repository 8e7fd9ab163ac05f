"""Rollouts by the model in this process: each prompt is read once, and its group continues from the same keys.

Prompts are encoded and read in packed passes. A step then computes one token for every row in flight. A row that ends
makes room for the next completion in the queue, so the batch does not wait for its longest completion. Keys and values
are bounded in bytes, and the number of prompts and rows in flight follows from the bound.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from keye.errors import KeyeError
from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.stream import END_OF_TEXT, IM_END
from rl.policy.scoring import Group, banned_tokens, vision_inputs
from rl.rollout.cache import PromptBlock, PromptPass, RolloutCache, compaction, room_for, token_bytes
from rl.rollout.engine import Key, stream_of
from rl.rollout.sampling import TokenSampler

PREFILL_TOKENS = 8192
"""Prompts are read together up to this number of tokens; a longer one is read alone."""
FILLED = 0.8
"""The least share of tokens in the padded keys of prompts that are read together."""


@dataclass
class _Prompt:
    """A prompt in flight. logits: [V] of the first token of every completion. left: rows that have not ended."""

    sample: Sample
    left: int
    following: int = 0
    logits: Tensor | None = None


@dataclass
class _Row:
    """A completion that is being sampled. prompt and place: of the sample and in the group."""

    prompt: int
    place: int
    numbers: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    sampler_log_probs: list[float] = field(default_factory=list)
    finished: bool = False


class InProcessRollout:
    """Continuous batching over a model in this process.

    Args:
        model: `KeyeForConditionalGeneration`, complete on this rank.
        processor: of the model.
        generator: gives the keys of calls without `keys`; with the same seed they sample the same.
        batch: sequences that are decoded together at most.
        cache_bytes: keys and values at most; the number of prompts and sequences in flight follows from it.
        top_p, top_k: see `TokenSampler`.
        stop_tokens: ids that end a completion, in addition to `<|im_end|>`, `<|endoftext|>` and the end tokens of the
            model's generation config.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: KeyeProcessor,
        generator: torch.Generator | None = None,
        batch: int = 256,
        cache_bytes: int = 8 << 30,
        top_p: float = 1.0,
        top_k: int = 0,
        stop_tokens: Sequence[int] = (),
    ) -> None:
        self.model, self.processor = model, processor
        self.generator = torch.Generator() if generator is None else generator
        self.batch, self.cache_bytes = batch, cache_bytes
        self.sampler = TokenSampler(top_p, top_k, banned_tokens(model))
        self.end = processor.token_id(IM_END)
        self.ends = end_tokens(model, processor) | frozenset(stop_tokens)

    @torch.no_grad()
    def generate(
        self,
        samples: list[Sample],
        group_size: int,
        temperature: float,
        max_new_tokens: int,
        keys: Sequence[Key] | None = None,
    ) -> list[Group]:
        """See `RolloutEngine.generate`.

        Raises:
            KeyeError: a prompt with one completion does not fit into `cache_bytes`, or is longer than the decoder's
                sliding window.
        """
        if not samples:
            return []
        if keys is None:
            drawn = int(torch.randint(1 << 62, (1,), generator=self.generator, device=self.generator.device))
            keys = [(drawn, number) for number in range(len(samples))]
        longest = max(map(len, samples))
        self._check_window(longest + max_new_tokens)
        rows = min(self.batch, len(samples) * group_size)
        per_token = token_bytes(self.model)
        room = room_for(longest, group_size, max_new_tokens, rows, self.cache_bytes, per_token)
        layers = self.model.config.text_config.num_hidden_layers
        cache = RolloutCache(layers, room.rows, max_new_tokens)
        with evaluating(self.model):
            run = _Run(self, samples, group_size, temperature, max_new_tokens, keys, cache, room.prompt_tokens)
            done = run.complete()
        return [self._group(sample, done[number]) for number, sample in enumerate(samples)]

    def _group(self, sample: Sample, rows: list[_Row]) -> Group:
        texts = self.processor.tokenizer.batch_decode([row.tokens for row in rows], skip_special_tokens=True)
        return Group(
            sample,
            [torch.tensor(row.tokens) for row in rows],
            [torch.tensor(row.log_probs) for row in rows],
            [row.finished for row in rows],
            texts,
            [torch.tensor(row.sampler_log_probs) for row in rows] if self.sampler.cuts else None,
        )

    def _check_window(self, length: int) -> None:
        text = self.model.config.text_config
        window = getattr(text, "sliding_window", None)
        if window and length > window and "sliding_attention" in (getattr(text, "layer_types", None) or ()):
            raise KeyeError(
                f"text_config.sliding_window = {window} is shorter than a prompt with its answer ({length} tokens), "
                "and rollouts have no window: set it to null, or use shorter prompts"
            )


class _Run:
    """The state of one call of `generate`."""

    def __init__(
        self,
        engine: InProcessRollout,
        samples: list[Sample],
        group_size: int,
        temperature: float,
        max_new_tokens: int,
        keys: Sequence[Key],
        cache: RolloutCache,
        prompt_tokens: int,
    ) -> None:
        self.model, self.sampler, self.ends = engine.model, engine.sampler, engine.ends
        self.samples, self.temperature, self.max_new_tokens = samples, temperature, max_new_tokens
        self.cache, self.prompt_tokens, self.group_size = cache, prompt_tokens, group_size
        self.device = next(self.model.parameters()).device
        longest_first = sorted(range(len(samples)), key=lambda number: -len(samples[number]))
        self.queue = deque(
            _Row(number, place, stream_of(keys[number], place))
            for number in longest_first
            for place in range(group_size)
        )
        self.rows: list[_Row] = []
        self.held: dict[int, _Prompt] = {}
        self.done: list[list[_Row]] = [[] for _ in samples]

    def complete(self) -> list[list[_Row]]:
        """The rows of each sample, in the order of their places."""
        while self.rows or self.queue:
            while new := self._admit():
                self._draw(new, torch.stack([self.held[row.prompt].logits for row in new]))
                self.rows += [row for row in new if not self._leaves(row)]
                self.cache.release(self.held)
            if self.rows:
                self._draw(self.rows, self._forward())
                self._compact([self._leaves(row) for row in self.rows])
        return [sorted(rows, key=lambda row: row.place) for rows in self.done]

    def _admit(self) -> list[_Row]:
        """The next rows of the queue for which there is room; their prompts are read if they are not held."""
        new: list[_Row] = []
        packs: list[list[int]] = []
        while self.queue and len(self.rows) + len(new) < self.cache.rows:
            number = self.queue[0].prompt
            if number not in self.held:
                added = self._packed(packs, number)
                if self.cache.prompt_tokens + sum(map(self._tokens, added)) > self.prompt_tokens:
                    break
                packs = added
                self.held[number] = _Prompt(self.samples[number], self.group_size)
            new.append(self.queue.popleft())
        for pack in packs:
            self._read(pack)
        return new

    def _packed(self, packs: list[list[int]], number: int) -> list[list[int]]:
        """The packs with another prompt: in the last one if it is of similar length and there is room."""
        if packs:
            joined = [*packs[-1], number]
            lengths = [len(self.samples[n]) for n in joined]
            if self._tokens(joined) <= PREFILL_TOKENS and sum(lengths) >= FILLED * self._tokens(joined):
                return [*packs[:-1], joined]
        return [*packs, [number]]

    def _tokens(self, pack: list[int]) -> int:
        """The tokens that a pack holds as a block."""
        return len(pack) * max(len(self.samples[number]) for number in pack)

    def _read(self, numbers: list[int]) -> None:
        """Read prompts in one packed pass."""
        samples = [self.samples[number] for number in numbers]
        lengths = [len(sample) for sample in samples]
        ends = torch.tensor(lengths).cumsum(0)
        keep = PromptPass(lengths, self.model.config.attention)
        logits = self.model(
            input_ids=torch.cat([s.input_ids for s in samples])[None].to(self.device),
            position_ids=torch.cat([s.position_ids for s in samples], 1)[:, None].to(self.device),
            cu_seqlens=torch.cat([ends.new_zeros(1), ends]).int().to(self.device),
            varlen=keep,
            logits_to_keep=(ends - 1).to(self.device),
            **vision_inputs(samples, self.device),
        ).logits[0]
        for place, number in enumerate(numbers):
            prompt = self.held[number]
            prompt.logits, prompt.following = logits[place], int(prompt.sample.position_ids.max()) + 1
        self.cache.add(PromptBlock(numbers, lengths, keep.layers))

    def _draw(self, rows: list[_Row], logits: Tensor) -> None:
        """Add the next token to R rows, from logits [R, V]."""
        uniform = torch.tensor([row.numbers.random() for row in rows], dtype=torch.float64).to(self.device)
        drawn = self.sampler(logits, self.temperature, uniform)
        columns = torch.stack([drawn.tokens.double(), drawn.log_probs.double(), drawn.sampler_log_probs.double()])
        for row, token, log_prob, sampled in zip(rows, *columns.tolist(), strict=True):
            if math.isnan(log_prob):
                raise KeyeError(
                    "the policy gives logits that are not numbers, so its weights have diverged; continue from an "
                    "earlier checkpoint with a lower learning rate"
                )
            row.tokens.append(int(token))
            row.log_probs.append(log_prob)
            row.sampler_log_probs.append(sampled)
            row.finished = row.tokens[-1] in self.ends

    def _leaves(self, row: _Row) -> bool:
        """Whether a row has ended; its prompt is freed if it was the last one."""
        if not row.finished and len(row.tokens) < self.max_new_tokens:
            return False
        self.done[row.prompt].append(row)
        prompt = self.held[row.prompt]
        prompt.left -= 1
        if not prompt.left:
            del self.held[row.prompt]
        return True

    def _compact(self, ended: list[bool]) -> None:
        """Take the rows that have ended out of the batch."""
        if any(ended):
            self.cache.release(self.held)
            order, sources, targets = compaction(ended)
            self.cache.move(sources, targets)
            self.rows = [self.rows[place] for place in order]

    def _forward(self) -> Tensor:
        """Logits [R, V] after the last token of every row."""
        count = len(self.rows)
        written = [len(row.tokens) - 1 for row in self.rows]
        positions = [self.held[row.prompt].following + n for row, n in zip(self.rows, written, strict=True)]
        self.cache.begin([row.prompt for row in self.rows], written, self.device)
        tokens = torch.tensor([[row.tokens[-1] for row in self.rows]]).to(self.device)
        logits = self.model(
            inputs_embeds=self.model.get_input_embeddings()(tokens),  # ids would be searched for placeholders
            position_ids=torch.tensor(positions).to(self.device).expand(3, 1, -1),
            cu_seqlens=torch.arange(count + 1, dtype=torch.int32, device=self.device),
            varlen=self.cache,
        ).logits[0]
        self.cache.check_end()
        return logits


def end_tokens(model: nn.Module, processor: KeyeProcessor) -> frozenset[int]:
    """Ids that end a completion: `<|im_end|>`, `<|endoftext|>`, and those of the model's generation config."""
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    ids = {processor.token_id(IM_END), processor.token_id(END_OF_TEXT), *own}
    return frozenset(id for id in ids if id is not None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards in its former mode, also after an error."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
