"""The reward protocol, the registry of rewards, and what an answer earns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from keye.evaluation.match import extract_answer
from keye.processor.reply import parse_reply
from rl.questions.prompts import Prompt


@dataclass(frozen=True)
class Judgement:
    """The input of a reward: the prompt with its ground truth, the completion's text, and whether it is finished.

    tokens: length of the completion; 0 = not known.
    """

    prompt: Prompt
    text: str
    finished: bool
    tokens: int = 0

    @property
    def answer(self) -> str:
        """The final answer in the text, without thought, tags and math markup; empty for a truncated completion."""
        return extract_answer(self.text) if self.finished else ""

    @property
    def raw_answer(self) -> str:
        """The final answer in the text as written, without thought and tags; empty for a truncated completion."""
        return parse_reply(self.text).answer if self.finished else ""


class Reward(Protocol):
    """A number for a completion, from 0 (worst) to 1 (best).

    A class may also define:

    - `in_process = True`: the reward runs in the training process, without a time limit. Built-in rules whose work is
      bounded do. All others run in a worker process, which the time limit ends, and keep no state between steps.
    - `score(judgements) -> list[Outcome]`: all answers of a step at once, in the training process.
    - `on_failure`: what the recipe's key of that name is by default; "zero" without it.
    - `open(folder)`: called once before the first answer, with the directory of the run.
    - `load()`, `confine()`: called in the worker process before the first answer; `confine` after each restart.
    """

    def __call__(self, judgement: Judgement) -> float: ...


@dataclass(frozen=True)
class Outcome:
    """What a reward gave for an answer. value: None when it failed. cause: why it failed."""

    value: float | None
    cause: str = ""


@dataclass(frozen=True)
class Earned:
    """The rewards of one answer."""

    total: float
    """The weighted sum."""

    parts: dict[str, float]
    """Each reward by name, unweighted; only the rewards that apply to the question's family."""

    failures: dict[str, str] = field(default_factory=dict)
    """Reward → cause, for the rewards that failed and whose part is therefore 0."""

    counts: bool = True
    """False when a reward failed with `on_failure = "skip"`: the answer has no advantage and enters no mean."""


def counted_advantages(earned: list[list[Earned]], advantages: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Rewards and advantages, float32 [P, G], of G answers to each of P prompts.

    An answer that does not count has an advantage of 0, and the advantages of the others are those of a group without
    it. Its reward is the mean of the others, or 0.

    Args:
        advantages: the advantages [P, G] of rewards [P, G].
    """
    rewards = torch.tensor([[one.total for one in group] for group in earned])
    counts = torch.tensor([[one.counts for one in group] for group in earned])
    if counts.all():
        return rewards, advantages(rewards)
    found = torch.zeros_like(rewards)
    for place, mine in enumerate(counts):
        kept = rewards[place, mine]
        rewards[place, ~mine] = kept.mean() if kept.numel() else 0.0
        if kept.numel() > 1:
            found[place, mine] = advantages(kept[None])[0]
    return rewards, found


Factory = TypeVar("Factory", bound=Callable[..., Reward])
REGISTRY: dict[str, Callable[..., Reward]] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Class decorator that registers a reward under `name`, for recipes.

    Other keys of the recipe's table `[rewards.<name>]` are the arguments of the class, checked if it is a dataclass.
    """

    def add(factory: Factory) -> Factory:
        REGISTRY[name] = factory
        return factory

    return add
