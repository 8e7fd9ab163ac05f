"""Progressive hints for questions that fail every rollout (report: RL with progressive hints).

A manifest's line may have `hints`, up to five texts of rising content: concept, strategy, tools or formula, first
steps, complete solution. A question all of whose answers are wrong is asked again with the hint of level 1 after it,
then with that of level 2, and so on. The first level with a right answer is its minimal level, and the answers of this
level update the policy in place of the wrong ones. Only questions whose answer is `trusted` are asked again: where
every answer is wrong, the manifest's may be.

With `update = "hinted"` the policy is updated with the prompt that contains the hint, on policy. With "original" it is
updated with the question alone, so that it learns to answer without the hint. The old log-probabilities are then those
of the question alone: the importance ratio of the loss begins at 1 and does not contain the hint. What the hint changed
is logged as `hints/importance`, the mean over sequences of exp(mean over tokens of log π_old(y | question) − log
π_sampled(y | question, hint)). The loss is not multiplied by it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from keye.processor.processor import KeyeProcessor
from rl.policy.scoring import Group
from rl.questions.prompts import Prompt, Taken
from rl.rewards import Earned
from rl.run.agree import agree, gather
from stages.typed_toml import Need

LEVELS = ("concept or observation", "strategy or method", "tools or formula", "first concrete steps",
          "complete solution")  # fmt: skip
"""What a hint of levels 1 to 5 gives."""
UPDATES = ("off", "hinted", "original")
_SUFFIX = re.compile(r"\s*/(?:no_)?think\s*$")

Answered = tuple[list[Group], list[list[Earned]]]
Answer = Callable[[list[Taken]], Answered]
"""Samples a group of answers to each question and judges them; without a collective of this package."""


@dataclass(frozen=True)
class Hints:
    """Hints for questions that fail every rollout."""

    update: str = "off"
    """"off", or the prompt of the update with answers to a hinted question: "hinted" or "original"."""

    levels: int = 5
    """Highest level that is tried."""

    reward: str = "accuracy"
    """The reward that decides whether an answer is right; without it the weighted sum."""

    right: float = 0.5
    """An answer is right when this reward is at least this."""

    def check(self, need: Need) -> None:
        """Refuse impossible values with a RecipeError."""
        need(self.update in UPDATES, f"hints.update = {self.update!r} must be one of {', '.join(UPDATES)}")
        need(1 <= self.levels <= len(LEVELS), f"hints.levels must be from 1 to {len(LEVELS)}")
        need(self.right > 0, "hints.right must be above 0, because an empty answer earns 0")


def hints_of(prompt: Prompt) -> Sequence[str]:
    """The hints of a prompt whose answer is trusted; empty otherwise."""
    return prompt.extra.get("hints", ()) if prompt.extra.get("trusted") is True else ()


def with_hint(messages: list[dict[str, Any]], hint: str) -> list[dict[str, Any]]:
    """The chat with the hint after the last user turn, before a suffix `/think` or `/no_think`."""
    messages = copy.deepcopy(messages)
    user = next(message for message in reversed(messages) if message["role"] == "user")
    if isinstance(user["content"], str):
        user["content"] = _appended(user["content"], hint)
        return messages
    texts = [part for part in user["content"] if part.get("type") == "text"]
    if texts and texts[-1] is user["content"][-1]:
        texts[-1]["text"] = _appended(texts[-1]["text"], hint)
    else:
        user["content"].append({"type": "text", "text": f"\nHint: {hint}"})
    return messages


def _appended(text: str, hint: str) -> str:
    suffix = _SUFFIX.search(text)
    return f"{text[: suffix.start() if suffix else None]}\nHint: {hint}{suffix[0] if suffix else ''}"


def hinted(processor: KeyeProcessor, taken: Taken, level: int) -> Taken:
    """A question with its hint of `level` (from 1); its media are not read again."""
    prompt, sample = taken
    messages = with_hint(prompt.messages, hints_of(prompt)[level - 1])
    # Another id: the random numbers of a question's answers follow from it.
    asked = replace(prompt, id=f"{prompt.id}/hint-{level}", messages=messages)
    return asked, processor.reworded(sample, messages, prompt.base_dir)


@dataclass
class _Tally:
    """This rank's counts of a step. level, wrong: by level, of the questions that were asked again."""

    groups: int = 0
    failed: int = 0
    tried: int = 0
    level: dict[int, int] = field(default_factory=dict)
    wrong: dict[int, int] = field(default_factory=dict)
    importance: list[float] = field(default_factory=list)


class HintStage:
    """Finds minimal hints for the failed groups of a step; every rank makes the same number of rollout calls.

    Args:
        config: the recipe's `[hints]`. processor: encodes chats.
        advantages: what P groups earned → rewards and advantages, float32 [P, G] each.
        score: a group → log-probabilities [T] of its completions after its prompt; may be collective.
    """

    def __init__(
        self,
        config: Hints,
        processor: KeyeProcessor,
        advantages: Callable[[list[list[Earned]]], tuple[Tensor, Tensor]],
        score: Callable[[Group], Tensor],
    ) -> None:
        self.config, self.processor, self.advantages, self.score = config, processor, advantages, score
        self.metrics: dict[str, float] = {}

    def apply(
        self,
        prompts: list[Prompt],
        groups: list[Group],
        earned: list[list[Earned]],
        advantages: Tensor,
        answer: Answer,
        factor: Callable[[int, list[Earned]], float] = lambda place, earned: 1.0,
    ) -> tuple[list[Group], Tensor]:
        """The groups and advantages [P, G] of a step's update, with hinted answers where all were wrong; collective.

        `metrics` then has the step's shares, the same on every rank.

        Args:
            prompts, groups, earned, advantages: of this rank's P questions.
            factor: place of a question and what its hinted answers earned → factor on their advantages, such as the
                guard's against blindness.
        """
        if self.config.update == "off":
            return groups, advantages
        found, advantages, tally = list(groups), advantages.clone(), _Tally(len(groups))
        # A reward that failed, such as a judge that is down, says nothing about the answers.
        judged = [not any(one.failures for one in group) for group in earned]
        failed = [i for i in range(len(groups)) if judged[i] and not self._right(earned[i])]
        pending = [i for i in failed if hints_of(prompts[i])]
        tally.failed, tally.tried = len(failed), len(pending)
        solved: list[int] = []
        for level in range(1, self.config.levels + 1):
            pending = [i for i in pending if len(hints_of(prompts[i])) >= level]
            if not sum(gather(len(pending))):
                break
            asked = agree(lambda level=level, pending=pending: self._ask(level, pending, prompts, groups, answer))
            now = [i for i, (_, outcome) in zip(pending, asked, strict=True) if self._right(outcome)]
            for i, (group, outcome) in zip(pending, asked, strict=True):
                if i in now:
                    found[i] = group
                    advantages[i] = self.advantages([outcome])[1][0] * factor(i, outcome)
            solved += now
            pending = [i for i in pending if i not in now]
            tally.level[level], tally.wrong[level] = len(now), tally.tried - len(solved)
        if self.config.update == "original":
            self._to_original(found, groups, solved, tally)
        self.metrics = _shares(gather(tally))
        return found, advantages

    def _right(self, earned: list[Earned]) -> bool:
        """Whether any answer of a group is right."""
        return any(one.parts.get(self.config.reward, one.total) >= self.config.right for one in earned)

    def _ask(
        self, level: int, pending: list[int], prompts: list[Prompt], groups: list[Group], answer: Answer
    ) -> list[tuple[Group, list[Earned]]]:
        """The answers to the pending questions with their hints of a level."""
        asked = [hinted(self.processor, (prompts[i], groups[i].sample), level) for i in pending]
        return list(zip(*answer(asked), strict=True))

    def _to_original(self, found: list[Group], groups: list[Group], solved: list[int], tally: _Tally) -> None:
        """Put the question without its hint before the answers at `solved`; the scoring is in step on all ranks.

        The log-probabilities of these groups become those after the question alone, so that a comparison of sampler and
        trainer does not take the hint for an error of the sampler.
        """
        for turn in range(max(gather(len(solved)), default=0)):
            place = solved[turn] if turn < len(solved) else None
            group = groups[0] if place is None else replace(found[place], sample=groups[place].sample)
            with torch.no_grad():
                scored = self.score(group).float().cpu()
            if place is None:
                continue
            rows = list(scored.split([len(row) for row in group.completions]))
            pairs = zip(rows, found[place].log_probs, strict=False)
            tally.importance += [float((row - sampled.float()).mean().exp()) for row, sampled in pairs]
            found[place] = replace(group, log_probs=rows, sampler_log_probs=None)


def _shares(ranks: list[_Tally]) -> dict[str, float]:
    """The metrics of a step from the counts of all ranks; the levels that no rank tried are left out."""
    groups, failed, tried = (sum(getattr(rank, name) for rank in ranks) for name in ("groups", "failed", "tried"))
    metrics = {"hints/failed": failed / groups, "hints/tried": tried / groups}
    for level in sorted({level for rank in ranks for level in rank.level}) if tried else ():
        # A rank without pending questions counts those that are still wrong there: none.
        metrics[f"hints/level_{level}"] = sum(rank.level.get(level, 0) for rank in ranks) / tried
        metrics[f"hints/wrong_{level}"] = sum(rank.wrong.get(level, 0) for rank in ranks) / tried
    importance = [value for rank in ranks for value in rank.importance]
    return metrics | ({"hints/importance": fmean(importance)} if importance else {})
