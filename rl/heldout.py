"""Held-out questions before and after RL: the same ones, so that the gain has a paired standard error."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from keye.prompt.processor import Sample
from rl.prompts import Prompt
from rl.rewards import Judgement, RewardSum
from rl.rollout import RolloutEngine


@dataclass(frozen=True)
class Answered:
    """One question's outcome. sampled: mean reward over the drawn answers; greedy: reward of the greedy answer.

    sampled_accuracy, greedy_accuracy: the accuracy alone, without other rewards (None when the recipe has no such
    reward). text: the greedy answer.
    """

    id: str
    family: str
    sampled: float
    greedy: float
    sampled_accuracy: float | None
    greedy_accuracy: float | None
    text: str


def ask(
    engine: RolloutEngine,
    questions: list[tuple[Prompt, Sample]],
    reward: RewardSum,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> list[Answered]:
    """Answer each question `samples` times at `temperature` and once greedily. progress: called with the count done."""
    answered = []
    for begin in range(0, len(questions), 32):
        part = questions[begin : begin + 32]
        inputs = [sample for _, sample in part]
        drawn = engine.generate(inputs, samples, temperature, max_new_tokens)
        greedy = engine.generate(inputs, 1, 0.0, max_new_tokens)
        for (prompt, _), many, one in zip(part, drawn, greedy, strict=True):
            earned = [reward(Judgement(prompt, t, f)) for t, f in zip(many.texts, many.finished, strict=True)]
            best = reward(Judgement(prompt, one.texts[0], one.finished[0]))
            accuracy = [e.parts["accuracy"] for e in earned if "accuracy" in e.parts]
            answered.append(
                Answered(
                    prompt.id,
                    prompt.family,
                    fmean(e.total for e in earned),
                    best.total,
                    fmean(accuracy) if accuracy else None,
                    best.parts.get("accuracy"),
                    one.texts[0],
                )
            )
        if progress:
            progress(len(part))
    return answered


def summary(answered: list[Answered]) -> dict[str, Any]:
    """Means with standard errors over the questions, in all and per family."""
    families = defaultdict(list)
    for one in answered:
        families[one.family].append(one)
    return _means(answered) | {"families": {name: _means(rows) for name, rows in sorted(families.items())}}


def compare(before: list[Answered], after: list[Answered]) -> dict[str, Any]:
    """What `eval.json` holds: both summaries, and the gain with the standard error of the paired differences."""
    earlier = {one.id: one for one in before}
    pairs = [(earlier[one.id], one) for one in after if one.id in earlier]
    sampled = [new.sampled - old.sampled for old, new in pairs]
    greedy = [new.greedy - old.greedy for old, new in pairs]
    return {
        "questions": len(pairs),
        "before": summary([old for old, _ in pairs]),
        "after": summary([new for _, new in pairs]),
        "gain": fmean(sampled),
        "gain_stderr": standard_error(sampled),
        "greedy_gain": fmean(greedy),
        "greedy_gain_stderr": standard_error(greedy),
    }


def standard_error(values: list[float]) -> float:
    """Standard error of the mean, with n − 1; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = fmean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _means(rows: list[Answered]) -> dict[str, float | int]:
    values: dict[str, float | int] = {"n": len(rows)}
    names = {"sampled": "reward", "greedy": "greedy", "sampled_accuracy": "accuracy"}
    for attribute, name in (names | {"greedy_accuracy": "greedy_accuracy"}).items():
        column = [value for row in map(asdict, rows) if (value := row[attribute]) is not None]
        if column:
            values |= {f"{name}_mean": fmean(column), f"{name}_stderr": standard_error(column)}
    return values
