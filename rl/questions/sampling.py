"""The questions that a step trains on: a curriculum by accuracy, and further questions in place of flat groups.

A group is flat when all its advantages are zero, so that it has no gradient. Every decision is made from values that
all ranks have gathered, so the ranks draw the same questions and call the rollout engine equally often.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain, islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from keye.errors import CheckpointError
from rl.policy.scoring import Group
from rl.questions.prompts import Prompt, PromptStream, Taken
from rl.rewards import Earned, Judgement, RewardSum
from rl.run.agree import agree, gather

RECENT = 0.5  # weight of the newest accuracy in a question's running accuracy


@dataclass(frozen=True)
class Experience:
    """One rank's share of a step: P prompts with G answers each.

    rewards, advantages: float32 [P, G]. parts: the groups of each mini-batch. blind: float32 [P], accuracy without
    frames, where the step's questions were asked so; NaN for a question without media.
    """

    prompts: list[Prompt]
    groups: list[Group]
    earned: list[list[Earned]]
    rewards: Tensor
    advantages: Tensor
    parts: list[slice]
    blind: Tensor | None = None

    @property
    def flat(self) -> list[int]:
        """The groups without advantage, of 0 … P − 1."""
        return [i for i, row in enumerate(self.advantages) if not row.any()]

    def at(self, places: list[int]) -> Experience:
        """The groups at some places without their pixels, for metrics; of no mini-batch."""
        prompts, earned = ([column[i] for i in places] for column in (self.prompts, self.earned))
        groups = [_without_pixels(self.groups[i]) for i in places]
        blind = None if self.blind is None else self.blind[places]
        return Experience(prompts, groups, earned, self.rewards[places], self.advantages[places], [], blind)

    def with_groups(self, places: list[int], other: Experience) -> Experience:
        """This experience with the groups of `other` at `places`, in order."""
        columns = [list(column) for column in (self.prompts, self.groups, self.earned)]
        rewards, advantages = self.rewards.clone(), self.advantages.clone()
        for column, fresh in zip(columns, (other.prompts, other.groups, other.earned), strict=True):
            for place, value in zip(places, fresh, strict=True):
                column[place] = value
        if places:
            rewards[places], advantages[places] = other.rewards, other.advantages
        blind = None if self.blind is None else self.blind.clone()
        if blind is not None and places:
            blind[places] = other.blind
        return Experience(*columns, rewards, advantages, self.parts, blind)


def _without_pixels(group: Group) -> Group:
    return replace(group, sample=replace(group.sample, pixel_values=None, pixel_values_videos=None))


def judged(reward: RewardSum, asked: list[Taken], groups: list[Group]) -> list[list[Earned]]:
    """The rewards of each group's answers to its question."""
    judgements = [
        Judgement(prompt, text, finished, len(tokens))
        for (prompt, _), group in zip(asked, groups, strict=True)
        for text, finished, tokens in zip(group.texts, group.finished, group.completions, strict=True)
    ]
    earned = iter(reward.all(judgements))
    return [list(islice(earned, len(group.completions))) for group in groups]


def accuracy_of(group: list[Earned]) -> float:
    """Mean accuracy of a group's answers that count; of their total reward, within 0 … 1, if there is no accuracy.

    0 when no answer counts.
    """
    found = [earned.parts.get("accuracy", earned.total) for earned in group if earned.counts]
    return fmean(min(1.0, max(0.0, value)) for value in found) if found else 0.0


def replace_flat(
    experience: Experience,
    places: list[int],
    extra: int,
    stream: PromptStream,
    answer: Callable[[list[Taken]], Experience],
) -> tuple[Experience, list[Experience]]:
    """Replace flat groups by groups of the stream's next questions; collective.

    All ranks run the same number of rounds, and call `answer` once in each, also without a question. The first flat
    places of the step take the next questions, so that the order of questions does not depend on the number of ranks.

    Args:
        places: this rank's place of each group, of 0 … `gspo.prompts` − 1.
        extra: questions that all ranks together may draw at most. 0: nothing is drawn and nothing is gathered.
        answer: answers the questions of this rank; without a collective.

    Returns:
        The experience, with the groups that are still flat, and the groups of this rank that were replaced.
    """
    replaced: list[Experience] = []
    while extra > 0:
        own = {places[i]: i for i in experience.flat}
        wanted = sorted(chain.from_iterable(gather(list(own))))[:extra]
        if not wanted:
            break
        extra -= len(wanted)
        mine = [position for position, place in enumerate(wanted) if place in own]
        drawn = stream.take(len(wanted), mine, gather)
        fresh = agree(lambda drawn=drawn: answer(drawn))
        groups = [own[wanted[position]] for position in mine]
        replaced.append(experience.at(groups))
        experience = experience.with_groups(groups, fresh)
    return experience, replaced


class Curriculum:
    """Asks a question with a probability that follows its running accuracy.

    The probability is 1 for a question that was never answered, floor + (1 − floor) · 4 a (1 − a) for one with the
    running accuracy a: 1 where half the answers are right, `floor` where all or none are. The draw depends on (seed,
    epoch, question) only. The state is 4 bytes of host memory for each question, and nothing for `floor` = 1.

    Args:
        questions: of the manifest. floor: above 0, at most 1; 1 asks every question.
    """

    def __init__(self, questions: int, floor: float = 1.0, seed: int = 0) -> None:
        self.floor, self.seed = floor, seed
        self.accuracy = torch.full((questions if self.active else 0,), math.nan)

    @property
    def active(self) -> bool:
        """Whether it leaves out any question."""
        return self.floor < 1

    def asks(self, index: int, epoch: int) -> bool:
        """Whether the question is asked at its turn in this epoch."""
        if not self.active:
            return True
        draw = random.Random(f"curriculum/{self.seed}/{epoch}/{index}").random()
        return draw < self.probability(index)

    def probability(self, index: int) -> float:
        """Probability that the question is asked at its turn."""
        accuracy = float(self.accuracy[index]) if self.active else math.nan
        return 1.0 if math.isnan(accuracy) else self.floor + (1 - self.floor) * 4 * accuracy * (1 - accuracy)

    def observe(self, found: Iterable[tuple[int, float]]) -> None:
        """Record (question, accuracy) of all ranks' groups of a step, in any order."""
        answered: dict[int, list[float]] = defaultdict(list)
        for index, accuracy in found:
            answered[index].append(accuracy)
        for index, values in answered.items():
            before, now = float(self.accuracy[index]), fmean(values)  # fmean is exact in any order of its values
            self.accuracy[index] = now if math.isnan(before) else before + RECENT * (now - before)

    def observe_step(self, experiences: list[Experience]) -> None:
        """Record this rank's groups of a step together with those of the other ranks; collective where it is active."""
        if not self.active:
            return
        mine = [
            (prompt.index, accuracy_of(group))
            for experience in experiences
            for prompt, group in zip(experience.prompts, experience.earned, strict=True)
            if any(earned.counts for earned in group)
        ]
        self.observe(chain.from_iterable(gather(mine)))

    def state_dict(self) -> dict[str, Any]:
        """The running accuracies float32 [questions], NaN where there is none; empty where it is not active."""
        return {"accuracy": self.accuracy.clone()} if self.active else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            CheckpointError: the state is of another number of questions.
        """
        if not self.active:
            return
        if (found := state.get("accuracy")) is None or found.shape != self.accuracy.shape:
            raise CheckpointError(
                f"the checkpoint has no running accuracy of these {len(self.accuracy)} questions; put the manifest and "
                "gspo.curriculum_floor back as they were, or train again with another --out"
            )
        self.accuracy.copy_(found)
