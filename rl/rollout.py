"""Rollouts: G sampled completions for each prompt, with what the training forward needs to score them.

`RolloutEngine` is the interface; `InProcessRollout` is the default and works wherever the model does. It reads each
prompt once, pixels included, and repeats the key-value cache G times, so a group costs one prompt and G completions.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.stream import IM_END
from rl.policy import Group, banned_tokens, token_log_probs


class RolloutEngine(Protocol):
    """Samples completions: the model in this process, or a served engine (vLLM, SGLang)."""

    def generate(self, samples: list[Sample], group_size: int, temperature: float, max_new_tokens: int) -> list[Group]:
        """One group for each sample; temperature 0 is greedy."""
        ...


class InProcessRollout:
    """Batched sampling with a key-value cache from a model in this process.

    Args:
        model: `KeyeForConditionalGeneration`, complete on this rank (any ZeRO stage except 3).
        generator: random numbers, on the model's device; with the same seed it samples the same.
        batch: sequences that are decoded together.
    """

    def __init__(
        self, model: nn.Module, processor: KeyeProcessor, generator: torch.Generator, batch: int = 256
    ) -> None:
        self.model = model
        self.processor = processor
        self.generator = generator
        self.batch = batch
        self.end = processor.token_id(IM_END)

    @torch.no_grad()
    def generate(self, samples: list[Sample], group_size: int, temperature: float, max_new_tokens: int) -> list[Group]:
        training = self.model.training
        self.model.eval()
        prompts = max(1, self.batch // group_size)
        groups = []
        # Prompts of similar length share a batch, so that little of it is padding.
        order = sorted(range(len(samples)), key=lambda i: len(samples[i].input_ids))
        for begin in range(0, len(order), prompts):
            part = [samples[i] for i in order[begin : begin + prompts]]
            groups += self._generate(part, group_size, temperature, max_new_tokens)
        self.model.train(training)
        return [group for _, group in sorted(zip(order, groups, strict=True), key=lambda pair: pair[0])]

    def _generate(self, samples: list[Sample], group_size: int, temperature: float, max_new_tokens: int) -> list[Group]:
        device = next(self.model.parameters()).device
        batch = {name: x.to(device) for name, x in self.processor.collate(samples, padding_side="left").items()}
        del batch["labels"]
        output = self.model(**batch, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        cache.batch_repeat_interleave(group_size)
        logits = output.logits[:, -1].repeat_interleave(group_size, 0)
        mask = batch["attention_mask"].repeat_interleave(group_size, 0)
        following = torch.tensor([int(s.position_ids.max()) + 1 for s in samples], device=device)
        position = following.repeat_interleave(group_size)
        tokens, log_probs = [], []
        ended = torch.zeros(len(position), dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            token, log_prob = self._draw(logits, temperature)
            tokens.append(token)
            log_probs.append(log_prob)
            ended |= token == self.end
            if ended.all() or len(tokens) == max_new_tokens:
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = self.model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=position[None, :, None].expand(3, -1, -1),
                past_key_values=cache,
                use_cache=True,
            )
            logits, position = output.logits[:, -1], position + 1
        return self._groups(samples, group_size, torch.stack(tokens, 1).cpu(), torch.stack(log_probs, 1).cpu())

    def _draw(self, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Next tokens [B] from logits [B, V] and their log-probabilities float32 [B] (at temperature 1 when greedy)."""
        table = token_log_probs(logits, temperature or 1.0, banned_tokens(self.model))
        if temperature == 0:
            token = table.argmax(-1)
        else:
            token = torch.multinomial(table.exp(), 1, generator=self.generator)[:, 0]
        return token, table.gather(-1, token[:, None])[:, 0]

    def _groups(self, samples: list[Sample], group_size: int, tokens: Tensor, log_probs: Tensor) -> list[Group]:
        """Cut each row of tokens [P·G, T] after its end token and assign the rows to their prompts."""
        reached = tokens == self.end
        finished = reached.any(1)
        lengths = torch.where(finished, reached.int().argmax(1) + 1, tokens.shape[1]).tolist()
        rows = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
        probabilities = [row[:n].clone() for row, n in zip(log_probs, lengths, strict=True)]
        texts = self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
        groups = []
        for p, sample in enumerate(samples):
            own = slice(p * group_size, (p + 1) * group_size)
            groups.append(Group(sample, rows[own], probabilities[own], finished[own].tolist(), texts[own]))
        return groups
