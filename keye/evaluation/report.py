"""Result of an evaluation: every reply, and per family the accuracy and the baselines that need no model."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from keye.errors import KeyeError, ManifestError, writing
from keye.evaluation.benchmark import Question
from keye.evaluation.match import match, parse_box

_CANDIDATES = 200
"""Largest number of different answers that are tried as the constant answer and as the uniform guess."""


class Scored(Protocol):
    """What `score` and `by_slice` read of a reply: an `Outcome`, or a `keye.evaluation.public.scores.Prediction`."""

    @property
    def correct(self) -> bool | None: ...
    @property
    def chance(self) -> float: ...
    @property
    def majority(self) -> bool: ...
    @property
    def slices(self) -> Mapping[str, str]: ...


Reply = TypeVar("Reply", bound=Scored)


@dataclass(frozen=True)
class Outcome:
    """One reply.

    Attributes:
        index: position of the question in the benchmark.
        id: of the question.
        family: of the question.
        prediction: the reply.
        answer: the correct answer.
        correct: whether the reply is correct.
        chance: probability that a uniform guess is correct.
        majority: whether the most frequent answer of the family is correct.
        error: why the clip could not be read, if so.
        finished: False if the token limit cut the reply off, which makes it wrong.
        slices: slice → value of the question, such as {"length": "16s"}.
        group: questions with the same name depend on one another, such as those of a minimal pair.
    """

    index: int
    id: str
    family: str
    prediction: str
    answer: str
    correct: bool
    chance: float
    majority: bool
    error: str | None = None
    finished: bool = True
    slices: dict[str, str] = field(default_factory=dict)
    group: str | None = None


@dataclass(frozen=True)
class Score:
    """Shares from 0 to 1 over `n` questions.

    Attributes:
        n: number of questions.
        accuracy: share of correct replies.
        stderr: standard error of `accuracy`.
        chance: expected accuracy of a uniform guess over the options.
        majority: accuracy of the most frequent answer.
    """

    n: int
    accuracy: float
    stderr: float
    chance: float
    majority: float

    @property
    def baseline(self) -> float:
        """The larger of chance and majority."""
        return max(self.chance, self.majority)

    @property
    def above(self) -> float:
        """Distance of the accuracy from the baseline in standard errors."""
        return (self.accuracy - self.baseline) / self.stderr


def score(outcomes: Sequence[Scored]) -> Score:
    """Mean over outcomes. The standard error uses (k + 1) / (n + 2), so that it is not 0 if all replies are correct.

    Raises:
        KeyeError: `outcomes` is empty.
    """
    n = len(outcomes)
    if not n:
        raise KeyeError("there are no replies to score; evaluate a manifest with questions (a control needs media)")
    correct = sum(bool(outcome.correct) for outcome in outcomes)
    smooth = (correct + 1) / (n + 2)
    return Score(
        n=n,
        accuracy=correct / n,
        stderr=math.sqrt(smooth * (1 - smooth) / n),
        chance=sum(outcome.chance for outcome in outcomes) / n,
        majority=sum(outcome.majority for outcome in outcomes) / n,
    )


def by_slice(outcomes: Iterable[Reply]) -> dict[str, dict[str, list[Reply]]]:
    """Slice → value → the outcomes that have it, in the order of their first appearance."""
    groups: dict[str, dict[str, list[Reply]]] = {}
    for outcome in outcomes:
        for name, value in outcome.slices.items():
            groups.setdefault(name, {}).setdefault(value, []).append(outcome)
    return groups


@dataclass
class Report:
    """All replies of one evaluation.

    Attributes:
        name: of the benchmark.
        outcomes: replies in the order of the benchmark.
        settings: arguments of `evaluate`.
        seconds: duration.
    """

    name: str
    outcomes: list[Outcome]
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def families(self) -> dict[str, Score]:
        """Score per family, in the order in which the families first appear."""
        groups: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            groups.setdefault(outcome.family, []).append(outcome)
        return {family: score(group) for family, group in groups.items()}

    @property
    def slices(self) -> dict[str, dict[str, Score]]:
        """Slice → value → score, such as {"length": {"16s": …}}; empty for questions without slices."""
        groups = by_slice(self.outcomes)
        return {name: {value: score(group) for value, group in values.items()} for name, values in groups.items()}

    @property
    def overall(self) -> Score:
        """Score over all questions; KeyeError if there are none."""
        return score(self.outcomes)

    @property
    def failed(self) -> list[Outcome]:
        """Questions whose clip or still could not be read; they count as wrong."""
        return [outcome for outcome in self.outcomes if outcome.error]

    def table(self) -> str:
        """Plain-text table, one line a family, in per cent."""
        lines = [f"{'family':<14}{'n':>6}{'accuracy':>16}{'chance':>9}{'majority':>10}"]
        by_slice = {f"{name} {value}": row for name, rows in self.slices.items() for value, row in rows.items()}
        rows = {**self.families, **by_slice, "all": self.overall} if self.outcomes else {}
        for family, row in rows.items():
            accuracy = f"{100 * row.accuracy:.1f} ± {100 * row.stderr:.1f}"
            lines.append(f"{family:<14}{row.n:>6}{accuracy:>16}{100 * row.chance:>9.1f}{100 * row.majority:>10.1f}")
        if self.failed:
            lines.append(f"{len(self.failed)} could not be read and count as wrong, the first: {self.failed[0].error}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the computed scores as JSON values."""
        return {
            "name": self.name,
            "settings": self.settings,
            "seconds": self.seconds,
            "families": {family: asdict(row) for family, row in self.families.items()},
            "overall": asdict(self.overall) if self.outcomes else None,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON; KeyeError if the file cannot be written."""
        path = Path(path)
        with writing(path, "the report"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read a report that `save` wrote; ManifestError for any other file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            outcomes = [Outcome(**outcome) for outcome in data["outcomes"]]
            return cls(data["name"], outcomes, data["settings"], data["seconds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ManifestError(f"{path} is not an evaluation report; write one with keye evaluate --out") from error


def control_table(reports: Mapping[str, Report]) -> str:
    """Plain-text table of the same questions under several controls, one line a family, in per cent.

    Args:
        reports: control → report, "none" among them. A control that does not apply to a family shows a dash.
    """
    lines = ["".join(f"{name:>14}" for name in ("family", "chance", "majority", *reports))]
    for family, row in reports["none"].families.items():
        scores = [report.families.get(family) for report in reports.values()]
        cells = [f"{100 * row.chance:.1f}", f"{100 * row.majority:.1f}"]
        cells += ["–" if s is None else f"{100 * s.accuracy:.1f} ± {100 * s.stderr:.1f}" for s in scores]
        lines.append("".join(f"{cell:>14}" for cell in (family, *cells)))
    return "\n".join(lines)


def merge(reports: Iterable[Report]) -> Report:
    """The reports of several ranks as one, ordered by index; a question that two ranks answered counts once."""
    reports = list(reports)
    unique = {outcome.index: outcome for report in reports for outcome in report.outcomes}
    outcomes = [unique[index] for index in sorted(unique)]
    return Report(reports[0].name, outcomes, reports[0].settings, max(report.seconds for report in reports))


class Baselines:
    """Accuracy on a family's questions without a model.

    If tolerances or boxes make answers overlap, the constant answer is the one that is correct most often.

    Args:
        reference: questions of the training split; they give the most frequent answer.
    """

    def __init__(self, reference: Iterable[Question]) -> None:
        self._pools: dict[str, list[Question]] = {}
        for question in reference:
            self._pools.setdefault(question.family, []).append(question)
        self._constants: dict[str, str] = {}
        self._answers: dict[str, list[str]] = {}

    def majority(self, question: Question) -> bool:
        """Whether the family's best constant answer is correct for this question."""
        if question.family not in self._pools:
            return False
        if question.family not in self._constants:
            self._constants[question.family] = self._best(self._pools[question.family])
        return match(self._constants[question.family], question.answer, question.tolerance)

    def chance(self, question: Question) -> float:
        """Probability that a uniform guess over the options is correct; without options, over the family's answers."""
        if question.options:
            return 1 / len(question.options)
        if question.family not in self._answers:
            pool = self._pools.get(question.family, [question])
            self._answers[question.family] = list(dict.fromkeys(other.answer for other in pool))
        answers = self._answers[question.family]
        if not _overlapping(question):
            return (question.answer in answers) / len(answers)
        answers = answers[:_CANDIDATES]
        return sum(match(guess, question.answer, question.tolerance) for guess in answers) / len(answers)

    @staticmethod
    def _best(pool: list[Question]) -> str:
        common = Counter(question.answer for question in pool).most_common(_CANDIDATES)
        if not any(map(_overlapping, pool)):
            return common[0][0]
        some = pool[:_CANDIDATES]
        return max((answer for answer, _ in common), key=lambda a: sum(match(a, q.answer, q.tolerance) for q in some))


def _overlapping(question: Question) -> bool:
    return question.tolerance is not None or parse_box(question.answer) is not None
