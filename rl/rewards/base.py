"""The reward protocol, its registry, and the weighted sum that GSPO optimises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from keye.errors import KeyeError, RecipeError
from rl.prompts import Prompt


@dataclass(frozen=True)
class Judgement:
    """The input of a reward: the prompt with its ground truth, the completion's text, and whether it is finished."""

    prompt: Prompt
    text: str
    finished: bool


class Reward(Protocol):
    """A number for a completion, from 0 (worst) to 1 (best)."""

    def __call__(self, judgement: Judgement) -> float: ...


@dataclass(frozen=True)
class Earned:
    """total: the weighted sum. parts: each reward by name, unweighted."""

    total: float
    parts: dict[str, float]


@dataclass(frozen=True)
class RewardSum:
    """Weighted rewards: `terms` maps a name to (weight, reward).

    Raises:
        KeyeError: when called, a reward that is not a finite number, with its name and the question.
    """

    terms: dict[str, tuple[float, Reward]]

    def __call__(self, judgement: Judgement) -> Earned:
        parts = {name: _number(name, reward(judgement), judgement) for name, (_, reward) in self.terms.items()}
        return Earned(sum(self.terms[name][0] * value for name, value in parts.items()), parts)


def _number(name: str, value: Any, judgement: Judgement) -> float:
    """A reward's value, which must be finite: NaN would make all weights NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        prompt, reply = judgement.prompt, judgement.text
        raise KeyeError(
            f"reward {name!r} gave {value!r} for an answer to {prompt.id!r} ({prompt.where}): {reply!r:.80}; let it "
            "return a finite number for every answer"
        )
    return number


_REGISTRY: dict[str, Callable[[], Reward]] = {}


def register(name: str) -> Callable[[Callable[[], Reward]], Callable[[], Reward]]:
    """Class decorator that registers a reward under `name`, for recipes."""

    def add(factory: Callable[[], Reward]) -> Callable[[], Reward]:
        _REGISTRY[name] = factory
        return factory

    return add


def rewards_from(weights: dict[str, float]) -> RewardSum:
    """The rewards that a recipe names, with their weights.

    Raises:
        RecipeError: a name that is not registered, or no rewards.
    """
    unknown = sorted(set(weights) - set(_REGISTRY))
    if unknown or not weights:
        known = ", ".join(sorted(_REGISTRY))
        raise RecipeError(f"[rewards] names {unknown[0] if unknown else 'nothing'!r}: use one or more of {known}")
    return RewardSum({name: (weight, _REGISTRY[name]()) for name, weight in weights.items()})
