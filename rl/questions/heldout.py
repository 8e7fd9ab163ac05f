"""The same held-out questions before and after RL, so that the gain has a paired standard error."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from keye.errors import CheckpointError, KeyeError
from keye.files import write_atomically
from keye.processor.processor import Sample
from rl.questions.prompts import Prompt
from rl.rewards import Earned, Judgement, RewardSum
from rl.rollout import RolloutEngine
from rl.rollout.engine import HELDOUT, number_of


@dataclass(frozen=True)
class Answered:
    """The rewards of the answers to one question."""

    id: str
    family: str

    sampled: float
    """Mean reward of the sampled answers."""

    greedy: float
    """Reward of the greedy answer."""

    sampled_accuracy: float | None
    """Mean accuracy of the sampled answers; None when the recipe has no such reward."""

    greedy_accuracy: float | None
    """Accuracy of the greedy answer."""

    text: str
    """The greedy answer."""

    failures: dict[str, str] = field(default_factory=dict)
    """Reward → the first cause why it failed for an answer to this question."""


@dataclass(frozen=True)
class Best:
    """The step whose model has the highest mean held-out reward so far; step 0 when none was measured."""

    step: int = 0
    reward: float = -math.inf

    def beaten_by(self, rows: list[Answered], folder: Path, questions: list[Prompt]) -> bool:
        """Whether outcomes have a higher mean reward than this model's, over the questions that both have.

        A judge that fails leaves out questions, and a mean without the hard ones is higher.

        Args:
            folder: has the outcomes of this model in `heldout`; without them the means are compared.
            questions: the held-out questions.
        """
        mine = read_answers(folder / f"heldout/step-{self.step}.jsonl", questions) if self.step else None
        if mine is None:
            return fmean(row.sampled for row in rows) > self.reward
        earlier = {row.id: row.sampled for row in mine}
        gains = [row.sampled - earlier[row.id] for row in rows if row.id in earlier]
        return math.fsum(gains) > 0

    def write(self, folder: Path, rows: list[Answered]) -> None:
        """Put `model-best.new` in the place of `model-best`, and record its outcomes and `model-best.json`."""
        new, old, last = (folder / f"model-best{end}" for end in (".new", "", ".old"))
        shutil.rmtree(last, ignore_errors=True)
        if old.exists():
            old.rename(last)
        new.rename(old)
        shutil.rmtree(last, ignore_errors=True)
        write_answers(folder / f"heldout/step-{self.step}.jsonl", rows)
        write_atomically(folder / BEST, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path, until: int) -> Best | None:
        """The record in `folder`; None without one, or if it is of a step after `until`, which is taken again."""
        try:
            found = cls(**json.loads((folder / BEST).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return found if isinstance(found.step, int) and found.step <= until else None


BEST = "model-best.json"
BATCH = 32  # questions that are encoded together: with a long video each, they take much host memory


def ask(
    engine: RolloutEngine,
    questions: list[Prompt],
    encode: Callable[[Prompt], Sample],
    reward: RewardSum,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    progress: Callable[[int], None] | None = None,
    seed: int = 0,
) -> tuple[list[Answered], dict[str, str]]:
    """Answer each question `samples` times at `temperature` and once greedily.

    Args:
        progress: called with the number of questions of each finished batch.
        seed: of the sampled answers, which follow from it and the question's id.

    Returns:
        The outcomes, and `file:line` → reason for the questions that `encode` cannot read.
    """
    answered: list[Answered] = []
    rejected: dict[str, str] = {}
    for begin in range(0, len(questions), BATCH):
        part = questions[begin : begin + BATCH]
        read: list[tuple[Prompt, Sample]] = []
        for prompt in part:
            try:
                read.append((prompt, encode(prompt)))
            except KeyeError as error:
                rejected[prompt.where] = str(error)
        inputs = [sample for _, sample in read]
        keys = [(seed, HELDOUT, number_of(prompt.id)) for prompt, _ in read]
        drawn = engine.generate(inputs, samples, temperature, max_new_tokens, keys)
        greedy = engine.generate(inputs, 1, 0.0, max_new_tokens, keys)
        judgements = [
            Judgement(prompt, text, finished, len(tokens))
            for (prompt, _), *both in zip(read, drawn, greedy, strict=True)
            for group in both
            for text, finished, tokens in zip(group.texts, group.finished, group.completions, strict=True)
        ]
        # All answers of the batch at once, because a judge answers many requests at the same time.
        judged = iter(reward.all(judgements))
        for (prompt, _), one in zip(read, greedy, strict=True):
            earned, best = list(islice(judged, samples)), next(judged)
            if best.counts and any(e.counts for e in earned):
                answered.append(_answered(prompt, earned, best, one.texts[0]))
            else:
                causes = (cause for e in [*earned, best] for cause in e.failures.values())
                rejected[prompt.where] = f"its answers were not judged: {next(causes)}"
        if progress:
            progress(len(part))
    return answered, rejected


def _answered(prompt: Prompt, earned: list[Earned], best: Earned, text: str) -> Answered:
    counted = [e for e in earned if e.counts]
    accuracy = [e.parts["accuracy"] for e in counted if "accuracy" in e.parts]
    return Answered(
        prompt.id,
        prompt.family,
        fmean(e.total for e in counted),
        best.total,
        fmean(accuracy) if accuracy else None,
        best.parts.get("accuracy"),
        text,
        {name: cause for e in [best, *reversed(earned)] for name, cause in e.failures.items()},
    )


def write_answers(path: Path, answered: list[Answered]) -> None:
    """Write outcomes as JSON lines; the file appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(asdict(one)) + "\n" for one in answered))


def read_answers(path: Path, questions: list[Prompt]) -> list[Answered] | None:
    """The outcomes in `path`; None if it is missing, damaged, or of other questions than these."""
    if not path.is_file():
        return None
    try:
        rows = [Answered(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError):
        return None
    known = {prompt.id for prompt in questions}
    return rows if rows and all(isinstance(row.id, str) and row.id in known for row in rows) else None


def summary(answered: list[Answered]) -> dict[str, Any]:
    """Means with standard errors over the questions, of all and of each family."""
    families = defaultdict(list)
    for one in answered:
        families[one.family].append(one)
    return _means(answered) | {"families": {name: _means(rows) for name, rows in sorted(families.items())}}


def compare(before: list[Answered], after: list[Answered]) -> dict[str, Any]:
    """The content of `eval.json`: both summaries, and the gain with the standard error of the paired differences.

    Raises:
        CheckpointError: no question was answered both times.
    """
    earlier = {one.id: one for one in before}
    pairs = [(earlier[one.id], one) for one in after if one.id in earlier]
    if not pairs:
        raise CheckpointError(
            "no held-out question was answered both before and after training; give clips that decode"
        )
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
    if failed := Counter(name for row in rows for name in row.failures):
        values |= {f"reward_failures/{name}": count for name, count in sorted(failed.items())}
    return values
