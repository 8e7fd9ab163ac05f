"""What requests cost, and a ceiling that is not exceeded."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace

from keye.errors import KeyeError
from rl.endpoint.ask import Answer, Ask
from rl.endpoint.cache import AnswerCache
from rl.endpoint.errors import EndpointError


class CostCeiling(EndpointError):
    """The next request could cost more than is left."""


@dataclass(frozen=True)
class Price:
    """Price per million tokens of prompts and of answers, in any currency; ceiling: the most to spend, None for no
    limit.

    Raises:
        KeyeError: a negative or infinite price, or a ceiling without a price.
    """

    prompt: float = 0.0
    completion: float = 0.0
    ceiling: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("prompt", self.prompt), ("completion", self.completion), ("ceiling", self.ceiling or 0.0)):
            if not math.isfinite(value) or value < 0:
                raise KeyeError(f"the price {name} is {value}; give a number from 0 on")
        if self.ceiling is not None and not (self.prompt or self.completion):
            raise KeyeError("a cost ceiling needs prices: give the price of a million prompt and completion tokens")

    def of(self, prompt: int, completion: int) -> float:
        """The cost of these numbers of tokens."""
        return (prompt * self.prompt + completion * self.completion) / 1e6

    def bound(self, ask: Ask) -> float:
        """The most that a request can cost."""
        return self.of(ask.most_prompt_tokens, ask.max_tokens)

    def paid(self, ask: Ask, answer: Answer) -> float:
        """The cost of an answer by the reported numbers of tokens; the bound where one is missing."""
        prompt, completion = answer.prompt_tokens, answer.completion_tokens
        if not prompt or completion is None or (not completion and answer.text.strip()):
            return self.bound(ask)
        return self.of(prompt, completion)


class Ledger:
    """Reserves the bound of each request before it is sent, so that the sum of all cannot exceed the ceiling.

    It counts what the answers in the cache have cost, also in earlier runs. All methods are called from one event loop.

    Attributes:
        calls, prompt_tokens, completion_tokens, cost: of this process's new answers.
        lost: number of requests of this process that may be billed and gave no answer.
    """

    def __init__(self, price: Price, cache: AnswerCache) -> None:
        self.price, self.cache = price, cache
        self.calls = self.prompt_tokens = self.completion_tokens = self.lost = 0
        self.cost = self._reserved = 0.0
        self._running = 0
        self._changed = asyncio.Condition()

    async def reserve(self, ask: Ask) -> float:
        """Reserve the most that `ask` can cost, and return it; waits while running requests may turn out cheaper.

        Raises:
            CostCeiling: it could exceed the ceiling.
        """
        bound, ceiling = self.price.bound(ask), self.price.ceiling
        async with self._changed:
            while ceiling is not None and self.cache.spent + self._reserved + bound > ceiling:
                if not self._running:
                    raise CostCeiling(
                        f"{self.cache.spent:.4f} of the cost ceiling {ceiling:g} is spent, and the next request could "
                        f"cost {bound:.4f}; raise --max-cost and run the same command again, which keeps all answers"
                    )
                await self._changed.wait()
            self._reserved += bound
            self._running += 1
        return bound

    async def settle(self, reserved: float, ask: Ask, key: str, answer: Answer) -> Answer:
        """Store an answer with its cost and release its reservation."""
        answer = replace(answer, cost=self.price.paid(ask, answer))
        self.cache.put(key, answer)  # before the release, so that the sum never misses it
        self.calls += 1
        self.prompt_tokens += answer.prompt_tokens or 0
        self.completion_tokens += answer.completion_tokens or 0
        self.cost += answer.cost
        await self._release(reserved)
        return answer

    async def lose(self, reserved: float, charged: bool) -> None:
        """Release the reservation of a request without an answer; if it may be billed, its bound counts as spent."""
        if charged:
            self.cache.lost(reserved)
            self.lost += 1
            self.cost += reserved
        await self._release(reserved)

    async def _release(self, reserved: float) -> None:
        async with self._changed:
            self._running -= 1
            # A sum of floats that should be zero may not be.
            self._reserved = max(0.0, self._reserved - reserved) if self._running else 0.0
            self._changed.notify_all()
