"""Rollouts by servers with OpenAI's API: the prompt with the frames of its plan, checked token by token.

A server must use the same model, tokenizer and template, and return token ids and log-probabilities: `keye serve` does.
`rl.rollout.synchronise` gives it the weights of the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import torch

from keye.errors import KeyeError
from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.stream import END_OF_TEXT, IM_END, IMAGE_PAD, VIDEO_PAD
from rl.policy.scoring import Group
from rl.rollout.connection import Connection, Served, to_stderr
from rl.rollout.engine import Key, stream_of
from rl.rollout.messages import messages_of

__all__ = ["Served", "ServedRollout"]


class ServedRollout:
    """Samples from servers; see `RolloutEngine`.

    Args:
        server: one or several; prompts are sent to them in turn, the answers to a prompt to one.
        processor: of the model.
        log: gets a sentence when a server is down, answers again, or was started again.
        ends: ids that end an answer, in addition to `<|im_end|>` and `<|endoftext|>`.
        first: the server of the first prompt, so that ranks begin with different ones.
    """

    def __init__(
        self,
        server: Served | Sequence[Served],
        processor: KeyeProcessor,
        log: Callable[[str], None] | None = None,
        ends: Collection[int] = (),
        first: int = 0,
    ) -> None:
        servers = [server] if isinstance(server, Served) else server
        self.connections = [Connection(one, log or to_stderr) for one in servers]
        self.processor, self.first = processor, first
        self.ends = {processor.token_id(IM_END), processor.token_id(END_OF_TEXT), *ends}

    def expect(self, version: str) -> None:
        """Accept only answers that were sampled with the weights `version`."""
        for connection in self.connections:
            connection.version = version

    def load(self, version: str) -> None:
        """Let every server load the weights `version`; returns when all have them.

        Raises:
            KeyeError: see `Connection.load`.
        """
        with ThreadPoolExecutor(len(self.connections)) as pool:
            list(pool.map(lambda connection: connection.load(version), self.connections))

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
            KeyeError: a temperature other than 0 and 1; a server that lost frames, gives no token ids or
                log-probabilities, answers with other weights or cuts answers, refuses the request, or is down for
                longer than the patience.
        """
        if temperature not in (0, 1):
            raise KeyeError(
                f"a served rollout at temperature {temperature} has no log-probabilities of that temperature; use 1"
            )
        keys = [(int(torch.randint(1 << 62, (1,))), n) for n in range(len(samples))] if keys is None else keys
        # The values of the model's generation config would cut the distribution.
        whole = {"top_k": 0, "min_p": 0, "stop_token_ids": sorted(self.ends), "return_token_ids": True}
        body = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0, "extra_body": whole}
        with ThreadPoolExecutor(sum(one.server.concurrency for one in self.connections)) as pool:
            waiting = []
            for number, (sample, key) in enumerate(zip(samples, keys, strict=True), self.first):
                connection = self.connections[number % len(self.connections)]
                asked = body | {"messages": messages_of(sample, self.processor)}
                seeds = [int(stream_of(key, place).integers(1 << 62)) for place in range(group_size)]
                rows = [asked | {"seed": seed} for seed in seeds]
                waiting.append([pool.submit(self._answer, connection, sample, row) for row in rows])
            try:
                rows = [[one.result() for one in group] for group in waiting]
            finally:  # after an error the others are not sent
                for one in chain.from_iterable(waiting):
                    one.cancel()
        return [self._group(sample, group) for sample, group in zip(samples, rows, strict=True)]

    def _group(self, sample: Sample, rows: list[tuple[list[int], list[float]]]) -> Group:
        tokens = [torch.tensor(ids) for ids, _ in rows]
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        finished = [ids[-1] in self.ends for ids, _ in rows]
        return Group(sample, tokens, [torch.tensor(scores) for _, scores in rows], finished, texts)

    def _answer(self, connection: Connection, sample: Sample, body: dict[str, Any]) -> tuple[list[int], list[float]]:
        """The ids and log-probabilities of one completion."""
        given, url = connection.complete(body), connection.server.url
        self._check_prompt(url, sample, given.get("prompt_token_ids"))
        choice = given["choices"][0]
        ids, scored = choice.get("token_ids"), (choice.get("logprobs") or {}).get("content")
        if not ids or not scored or len(ids) != len(scored):
            raise KeyeError(f"{url} gave no token ids with log-probabilities; use a server that returns them")
        if choice["finish_reason"] == "length" and len(ids) < body["max_tokens"]:
            raise KeyeError(
                f"{url} ended an answer after {len(ids)} of {body['max_tokens']} tokens; start keye serve with "
                f"--max-new-tokens {body['max_tokens']}, or shorten the prompts, if the model's context is full"
            )
        return ids, [one["logprob"] for one in scored]

    def _check_prompt(self, url: str, sample: Sample, ids: list[int] | None) -> None:
        """Refuse a prompt that differs from the plan's."""
        if ids is None:
            raise KeyeError(f"{url} gave no prompt_token_ids, so lost frames cannot be seen; use another")
        if ids == sample.input_ids.tolist():
            return
        pads = {self.processor.token_id(token) for token in (IMAGE_PAD, VIDEO_PAD)}
        visual = sum(token in pads for token in ids)
        raise KeyeError(
            f"{url} read {len(ids)} tokens with {visual} visual ones, but the plan has {len(sample)} with "
            f"{sample.visual_tokens}: frames were lost or the tokenizer differs; serve the same model with keye serve"
        )
