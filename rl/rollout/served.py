"""Rollouts by a server with OpenAI's API: the prompt with the frames of its plan, checked token by token.

The server must use the same model, tokenizer and template, and return token ids and log-probabilities: `keye serve`
does. Its weights are those that it was started with.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from keye.errors import KeyeError
from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.stream import END_OF_TEXT, IM_END, IMAGE_PAD, VIDEO_PAD
from rl.policy.scoring import Group
from rl.rollout.engine import Key, stream_of
from rl.rollout.messages import messages_of


@dataclass(frozen=True)
class Served:
    """A server. url: with /v1. model: its name there, "" for its only one. concurrency: requests at a time.

    seconds: until an answer is complete. patience: seconds that a request waits for a server that is down or busy.
    """

    url: str
    model: str = ""
    api_key: str = "none"
    concurrency: int = 16
    seconds: float = 600.0
    patience: float = 1800.0
    longest_wait: float = 30.0


class ServedRollout:
    """Samples from a server; see `RolloutEngine`."""

    def __init__(self, server: Served, processor: KeyeProcessor, log: Callable[[str], None] | None = None) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise KeyeError("served rollouts need openai; install it with pip install 'keye[reasoning]'") from error
        self.server, self.processor = server, processor
        self.log = log or (lambda text: print(text, file=sys.stderr, flush=True))
        self.client = OpenAI(base_url=server.url, api_key=server.api_key, timeout=server.seconds, max_retries=0)
        self.ends = {processor.token_id(IM_END), processor.token_id(END_OF_TEXT)}
        self.down = False

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
            KeyeError: a temperature other than 0 and 1, a server that lost frames, gives no token ids or
                log-probabilities, refuses the request, or is down for longer than the patience.
        """
        if temperature not in (0, 1):
            raise KeyeError(
                f"a served rollout at temperature {temperature} has no log-probabilities of that temperature; use 1"
            )
        keys = [(int(torch.randint(1 << 62, (1,))), n) for n in range(len(samples))] if keys is None else keys
        with ThreadPoolExecutor(self.server.concurrency) as pool:
            waiting = []
            for sample, key in zip(samples, keys, strict=True):
                body = {"messages": messages_of(sample, self.processor), "max_tokens": max_new_tokens}
                seeds = [int(stream_of(key, place).integers(1 << 62)) for place in range(group_size)]
                rows = [{**body, "temperature": temperature, "seed": seed} for seed in seeds]
                waiting.append([pool.submit(self._answer, sample, row) for row in rows])
            rows = [[one.result() for one in group] for group in waiting]
        return [self._group(sample, group) for sample, group in zip(samples, rows, strict=True)]

    def _group(self, sample: Sample, rows: list[tuple[list[int], list[float]]]) -> Group:
        tokens = [torch.tensor(ids) for ids, _ in rows]
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        finished = [ids[-1] in self.ends for ids, _ in rows]
        return Group(sample, tokens, [torch.tensor(scores) for _, scores in rows], finished, texts)

    def _answer(self, sample: Sample, body: dict[str, Any]) -> tuple[list[int], list[float]]:
        """The ids and log-probabilities of one completion."""
        given = self._request(body)
        self._check_prompt(sample, given.get("prompt_token_ids"))
        choice = given["choices"][0]
        ids, scored = choice.get("token_ids"), (choice.get("logprobs") or {}).get("content")
        if not ids or not scored or len(ids) != len(scored):
            raise KeyeError(
                f"{self.server.url} gave no token ids with log-probabilities; use a server that returns them"
            )
        return ids, [one["logprob"] for one in scored]

    def _check_prompt(self, sample: Sample, ids: list[int] | None) -> None:
        """Refuse a prompt that differs from the plan's."""
        if ids is None:
            raise KeyeError(f"{self.server.url} gave no prompt_token_ids, so lost frames cannot be seen; use another")
        if ids == sample.input_ids.tolist():
            return
        pads = {self.processor.token_id(token) for token in (IMAGE_PAD, VIDEO_PAD)}
        visual = sum(token in pads for token in ids)
        raise KeyeError(
            f"{self.server.url} read {len(ids)} tokens with {visual} visual ones, but the plan has {len(sample)} with "
            f"{sample.visual_tokens}: frames were lost or the tokenizer differs; serve the same model with keye serve"
        )

    def _request(self, body: dict[str, Any]) -> dict[str, Any]:
        """The response; waits while the server is down, busy or failing."""
        import openai

        model, extra = self.server.model, {"return_token_ids": True}
        began, wait = time.monotonic(), 0.25
        while True:
            try:
                answer = self.client.chat.completions.create(model=model, logprobs=True, extra_body=extra, **body)
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
                raise KeyeError(f"{self.server.url} refused a rollout: {error.message}") from error
            else:
                self._say(False, f"{self.server.url} answers again")
                return answer.model_dump()

    def _say(self, down: bool, text: str) -> None:
        if self.down != down:
            self.down = down
            self.log(text)
