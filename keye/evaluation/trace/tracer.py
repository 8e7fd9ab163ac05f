"""Runs of one prompt with interventions: tokens cut off from attention, and states replaced after a block.

Each intervention is one row of a batch, so that many of them share a pass. Plain hooks on the attention modules and on
the blocks do it; the model's code and weights are unchanged, and the hooks are gone after each run.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from keye.errors import KeyeError
from keye.evaluation.trace.anatomy import Anatomy
from keye.evaluation.trace.prompt import Prompt

Readers = Literal["answer", "later"]


@dataclass(frozen=True)
class Cut:
    """Tokens that others cannot attend to.

    Attributes:
        places: positions in the prompt that cannot be read.
        layers: the blocks where they cannot be read, from 0; None: all.
        readers: "answer": the prompt's last token and the answer's tokens do not read them, so what other tokens have
            read from them still reaches the answer. "later": no token outside of `places` reads them, as if the prompt
            did not contain them; the others keep their positions.
    """

    places: tuple[int, ...]
    layers: tuple[int, ...] | None = None
    readers: Readers = "later"

    def at(self, layer: int) -> bool:
        """Whether the cut is made in this block."""
        return self.layers is None or layer in self.layers


@dataclass(frozen=True)
class Patch:
    """States that replace those of the run after a block: `states` `[len(places), hidden]`."""

    layer: int
    places: tuple[int, ...]
    states: Tensor


@dataclass(frozen=True)
class Row:
    """The interventions of one run; none by default."""

    cuts: tuple[Cut, ...] = ()
    patches: tuple[Patch, ...] = ()


@dataclass
class Runs:
    """The results of several rows with an answer of A tokens.

    logits: `[rows, A, vocab]` fp32, of the answer's tokens. log_probs: `[rows, A]`, of the answer's tokens. states:
    `[rows, depth + 1, P, hidden]`, if recorded: embeddings, then the residual stream after each block, at the recorded
    places. attentions: `[rows, depth, heads, A, L + A − 1]` weights of the tokens that predict the answer, if recorded.
    """

    logits: Tensor
    log_probs: Tensor
    states: Tensor | None = None
    attentions: Tensor | None = None

    @property
    def score(self) -> Tensor:
        """`[rows]` log-probability of the complete answer in nats."""
        return self.log_probs.sum(1)


class Tracer:
    """Runs a model with interventions.

    Args:
        model: a `KeyeForConditionalGeneration` or a causal LM of transformers, with an attention that takes masks.
        batch_tokens: most tokens of a pass, prefix included; at least one row runs at a time.

    Raises:
        KeyeError: a model that cannot be traced.
    """

    def __init__(self, model: nn.Module, batch_tokens: int = 16_384) -> None:
        self.anatomy, self.batch_tokens = Anatomy.of(model), batch_tokens
        self.model = model

    @torch.no_grad()
    def run(
        self,
        prompt: Prompt,
        answer: Sequence[int],
        rows: Sequence[Row] = (Row(),),
        record: Sequence[int] | None = None,
        attentions: bool = False,
        cached: bool | None = None,
    ) -> Runs:
        """The answer's log-probabilities under each row's interventions.

        Args:
            prompt: the prompt.
            answer: its tokens, at least one; each is scored after the ones before it.
            rows: the interventions.
            record: places of the prompt whose states are returned.
            attentions: also return attention weights, computed without a fused kernel.
            cached: continue from the keys and values of the prompt, computed once for all rows. That is exact if only
                the answer's tokens are changed, and impossible otherwise. None: whenever it is exact.

        Raises:
            KeyeError: no answer, a place outside of the prompt, or a cache for rows that change earlier tokens.
        """
        self._check(prompt, answer, rows)
        last = len(prompt) - 1
        exact = self.anatomy.cache_is_cropped and last > 0 and set(record or ()) <= {last} and all(
            not row.patches and all(cut.readers == "answer" for cut in row.cuts) for row in rows
        )  # fmt: skip
        if cached and not exact:
            raise KeyeError("these rows change or record tokens before the answer, so no cache fits; leave cached out")
        cached = exact if cached is None else cached
        results = []
        length = len(prompt) + len(answer) - 1
        together = max(1, min(len(rows), self.batch_tokens // length))
        with self._eager() if attentions else contextlib.nullcontext():
            cache = self._prefix(prompt, together) if cached else None
            for start in range(0, len(rows), together):
                part = list(rows[start : start + together])
                missing = together - len(part) if cached else 0  # the cache has a fixed number of rows
                result = self._pass(prompt, answer, part + [Row()] * missing, record, attentions, cache)
                results.append(result if not missing else _first(result, len(part)))
                if cache is not None:
                    cache.crop(-len(answer))
        return _joined(results)

    @torch.no_grad()
    def answer(self, prompt: Prompt, ends: Sequence[int] = (), most: int = 32) -> list[int]:
        """The greedy answer, without the end token, of at most `most` tokens and at least one."""
        ids: list[int] = []
        while len(ids) < most:
            runs = self.run(prompt, [*ids, 0])  # the last token of the answer is only scored, never read
            token = int(runs.logits[0, -1].argmax())
            if token in ends and ids:
                break
            ids.append(token)
            if token in ends:
                break
        return ids

    @torch.no_grad()
    def states(self, prompt: Prompt, places: Sequence[int] | None = None) -> Tensor:
        """States `[depth + 1, P, hidden]` of a prompt at `places` (default: all), see `Runs.states`."""
        places = range(len(prompt)) if places is None else places
        return self.run(prompt, [0], record=list(places), cached=False).states[0]

    def _check(self, prompt: Prompt, answer: Sequence[int], rows: Sequence[Row]) -> None:
        if not len(answer) or not rows:
            raise KeyeError("a run needs an answer of at least one token and at least one row; give them")
        for row in rows:
            for one in (*row.cuts, *row.patches):
                if any(not 0 <= place < len(prompt) for place in one.places):
                    raise KeyeError(f"a place is outside of the prompt's {len(prompt)} tokens; give 0 to its last one")
            for patch in row.patches:
                if not 0 <= patch.layer < self.anatomy.depth or len(patch.states) != len(patch.places):
                    raise KeyeError(
                        f"a patch has {len(patch.states)} states for {len(patch.places)} places after block "
                        f"{patch.layer} of {self.anatomy.depth}; give one state for each place"
                    )

    def _inputs(self, prompt: Prompt, answer: Sequence[int], rows: int, start: int) -> dict[str, Any]:
        """The model's arguments for the tokens from `start` on, with the answer's tokens but the last."""
        more = torch.tensor(list(answer[:-1]), dtype=torch.long, device=prompt.ids.device)
        ids = torch.cat([prompt.ids, more])
        steps = torch.arange(1, len(more) + 1, device=ids.device)
        positions = torch.cat([prompt.positions, prompt.positions[:, -1:] + steps], dim=1)
        three = len(positions) == 3
        inputs: dict[str, Any] = {
            "input_ids": ids[None, start:].expand(rows, -1),
            "attention_mask": ids.new_ones(rows, len(ids)),
            "position_ids": positions[:, None, start:].expand(-1, rows, -1) if three else positions[:, start:],
        }
        config = self.model.config
        placeholders = (config.image_token_id, config.video_token_id) if three else ()
        if set(answer[:-1]) & set(placeholders):
            # A placeholder that the model wrote is a word, as in generate(): no feature takes its place.
            inputs["inputs_embeds"] = self.model.get_input_embeddings()(inputs["input_ids"])
            written = torch.isin(more, torch.tensor(placeholders, device=more.device))
            kept = torch.cat([prompt.ids, more.masked_fill(written, -1)])
            inputs["input_ids"] = kept[None, start:].expand(rows, -1)
        if prompt.features is not None and not start:
            stills, frames = prompt.features[: prompt.stills], prompt.features[prompt.stills :]
            inputs["visual_features"] = torch.cat([stills.repeat(rows, 1), frames.repeat(rows, 1)])
        if self.anatomy.takes_logits_to_keep:
            inputs["logits_to_keep"] = len(answer)
        return inputs

    def _prefix(self, prompt: Prompt, rows: int) -> Any:
        """The cache of the prompt without its last token, for `rows` rows."""
        inputs = self._inputs(prompt, [0], 1, 0)
        length = len(prompt) - 1
        for name in ("input_ids", "attention_mask", "position_ids"):
            inputs[name] = inputs[name][..., :length]
        output = self.model(**inputs, use_cache=True)
        cache = copy.copy(getattr(output, "cache", None) or output.past_key_values)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache

    def _pass(
        self,
        prompt: Prompt,
        answer: Sequence[int],
        rows: list[Row],
        record: Sequence[int] | None,
        attentions: bool,
        cache: Any,
    ) -> Runs:
        start = 0 if cache is None else len(prompt) - 1
        inputs = self._inputs(prompt, answer, len(rows), start)
        length = len(prompt) + len(answer) - 1
        places = None if record is None else [place - start for place in record]
        hooks = _Hooks(self.anatomy, rows, len(prompt), start, length, places)
        options = {"past_key_values": cache, "use_cache": True} if cache is not None else {"use_cache": False}
        with hooks.attached():
            output = self.model(**inputs, **options, **({"output_attentions": True} if attentions else {}))
        logits = output.logits[:, -len(answer) :].float()
        targets = torch.tensor(list(answer), device=logits.device).expand(len(rows), -1)
        log_probs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        weights = None
        if attentions:
            weights = torch.stack([layer[:, :, -len(answer) :].float() for layer in output.attentions], dim=1)
        return Runs(logits, log_probs, hooks.recorded(), weights)

    @contextlib.contextmanager
    def _eager(self) -> Iterator[None]:
        """Attention that returns its weights."""
        before = self.anatomy.decoder_config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)


@dataclass
class _Hooks:
    """The hooks of one pass over the tokens from `start` to `length`."""

    anatomy: Anatomy
    rows: list[Row]
    prompt: int
    start: int
    length: int
    record: list[int] | None
    kept: list[Tensor] = field(default_factory=list)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        handles = []
        for layer, (block, attention) in enumerate(zip(self.anatomy.blocks, self.anatomy.attentions, strict=True)):
            if any(cut.at(layer) for row in self.rows for cut in row.cuts):
                hook = self._mask(layer)
                handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
            if self.record is not None and not layer:
                handles.append(block.register_forward_pre_hook(self._embeddings, with_kwargs=True))
            if self.record is not None or any(patch.layer == layer for row in self.rows for patch in row.patches):
                handles.append(block.register_forward_hook(self._after(layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def recorded(self) -> Tensor | None:
        return None if self.record is None else torch.stack(self.kept, dim=1)

    def _mask(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            if "attention_mask" not in kwargs:
                raise KeyeError(f"{type(module).__name__} gets no attention mask, so no token can be knocked out in it")
            states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            return args, kwargs | {"attention_mask": self._masked(layer, kwargs["attention_mask"], states)}

        return hook

    def _masked(self, layer: int, given: Tensor | None, states: Tensor) -> Tensor:
        """The mask `[rows, 1, queries, keys]` that is added to scores: the block's own, and −inf where a row cuts."""
        device, lowest = states.device, float("-inf")
        queries = torch.arange(self.start, self.length, device=device)
        keys = torch.arange(self.length, device=device)
        if given is not None and given.dtype != torch.bool:  # may contain a bias of the scores
            mask = given.to(states.dtype).expand(len(self.rows), 1, len(queries), len(keys)).clone()
        else:
            allowed = (keys <= queries[:, None])[None, None] if given is None else given
            mask = torch.zeros(len(self.rows), 1, len(queries), len(keys), dtype=states.dtype, device=device)
            mask.masked_fill_(~allowed, lowest)
        for row, interventions in enumerate(self.rows):
            for cut in interventions.cuts:
                if not cut.at(layer):
                    continue
                cut_keys = torch.zeros(len(keys), dtype=torch.bool, device=device)
                cut_keys[list(cut.places)] = True
                reads = queries >= self.prompt - 1 if cut.readers == "answer" else ~cut_keys[queries]
                blocked = reads[:, None] & cut_keys & (keys != queries[:, None])  # a token always reads itself
                mask[row, 0].masked_fill_(blocked, lowest)
        return mask

    def _embeddings(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        self.kept.append(states[:, self.record].detach().clone())

    def _after(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            every = ((row, patch) for row, one in enumerate(self.rows) for patch in one.patches)
            patched = [(row, patch) for row, patch in every if patch.layer == layer]
            if patched:
                states = states.clone()
                for row, patch in patched:
                    states[row, list(patch.places)] = patch.states.to(states)
            if self.record is not None:
                self.kept.append(states[:, self.record].detach().clone())
            if not patched:
                return None
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return hook


def _first(runs: Runs, rows: int) -> Runs:
    parts = (runs.logits, runs.log_probs, runs.states, runs.attentions)
    return Runs(*(None if part is None else part[:rows] for part in parts))


def _joined(results: Sequence[Runs]) -> Runs:
    def join(name: str) -> Tensor | None:
        parts = [getattr(result, name) for result in results]
        return None if parts[0] is None else torch.cat(parts)

    return Runs(*(join(name) for name in ("logits", "log_probs", "states", "attentions")))
