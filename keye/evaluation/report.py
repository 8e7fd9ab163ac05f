"""What an evaluation found: every reply, and per family the accuracy beside what needs no model at all."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from keye.errors import KeyeError, ManifestError, writing
from keye.evaluation.benchmark import Question
from keye.evaluation.match import match, parse_box

_CANDIDATES = 200
"""So many different answers at most are tried as the constant answer and as the uniform guess."""


@dataclass(frozen=True)
class Outcome:
    """One reply.

    index: the question's place in the benchmark. chance: of a uniform guess at this very question. error: why the clip
    could not be read. finished: False when the token limit cut the reply off, which makes it wrong.
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


@dataclass(frozen=True)
class Score:
    """Shares 0 … 1 over `n` questions. chance: uniform over the options; majority: always the most frequent answer."""

    n: int
    accuracy: float
    stderr: float
    chance: float
    majority: float

    @property
    def baseline(self) -> float:
        """The better of chance and majority: what has to be beaten."""
        return max(self.chance, self.majority)

    @property
    def above(self) -> float:
        """How many standard errors the accuracy lies above the baseline."""
        return (self.accuracy - self.baseline) / self.stderr


def score(outcomes: Sequence[Outcome]) -> Score:
    """Mean over outcomes. The standard error uses (k + 1) / (n + 2), so that all right does not read as certain.

    Raises:
        KeyeError: no outcomes.
    """
    n = len(outcomes)
    if not n:
        raise KeyeError("there are no replies to score; evaluate a manifest with questions (a control needs media)")
    right = sum(outcome.correct for outcome in outcomes)
    smooth = (right + 1) / (n + 2)
    return Score(
        n=n,
        accuracy=right / n,
        stderr=math.sqrt(smooth * (1 - smooth) / n),
        chance=sum(outcome.chance for outcome in outcomes) / n,
        majority=sum(outcome.majority for outcome in outcomes) / n,
    )


@dataclass
class Report:
    """All replies of one evaluation, in the benchmark's order. settings: how it was run; seconds: how long it took."""

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
    def overall(self) -> Score:
        """Score over all questions alike; KeyeError without any."""
        return score(self.outcomes)

    @property
    def failed(self) -> list[Outcome]:
        """Questions whose clip or still could not be read; they count as wrong."""
        return [outcome for outcome in self.outcomes if outcome.error]

    def table(self) -> str:
        """Plain-text table, one line a family, in per cent."""
        lines = [f"{'family':<14}{'n':>6}{'accuracy':>16}{'chance':>9}{'majority':>10}"]
        rows = {**self.families, "all": self.overall} if self.outcomes else {}
        for family, row in rows.items():
            accuracy = f"{100 * row.accuracy:.1f} ± {100 * row.stderr:.1f}"
            lines.append(f"{family:<14}{row.n:>6}{accuracy:>16}{100 * row.chance:>9.1f}{100 * row.majority:>10.1f}")
        if self.failed:
            lines.append(f"{len(self.failed)} could not be read and count as wrong, the first: {self.failed[0].error}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, with the scores spelt out, ready for JSON."""
        return {
            "name": self.name,
            "settings": self.settings,
            "seconds": self.seconds,
            "families": {family: asdict(row) for family, row in self.families.items()},
            "overall": asdict(self.overall) if self.outcomes else None,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        path = Path(path)
        with writing(path, "the report"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read what `save` wrote; ManifestError when it is something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            outcomes = [Outcome(**outcome) for outcome in data["outcomes"]]
            return cls(data["name"], outcomes, data["settings"], data["seconds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ManifestError(f"{path} is not an evaluation report; write one with scripts/evaluate.py") from error


def merge(reports: Iterable[Report]) -> Report:
    """The reports of several ranks as one, ordered by index; a question that two ranks answered counts once."""
    reports = list(reports)
    unique = {outcome.index: outcome for report in reports for outcome in report.outcomes}
    outcomes = [unique[index] for index in sorted(unique)]
    return Report(reports[0].name, outcomes, reports[0].settings, max(report.seconds for report in reports))


class Baselines:
    """What a family's questions yield without a model.

    reference: questions whose answers are known beforehand (the training split), by which the most frequent answer
    is chosen. Where tolerances or boxes make answers overlap, the constant answer is the one that is right most often.
    """

    def __init__(self, reference: Iterable[Question]) -> None:
        self._pools: dict[str, list[Question]] = {}
        for question in reference:
            self._pools.setdefault(question.family, []).append(question)
        self._constants: dict[str, str] = {}
        self._answers: dict[str, list[str]] = {}

    def majority(self, question: Question) -> bool:
        """Whether the family's best constant answer is right here."""
        if question.family not in self._pools:
            return False
        if question.family not in self._constants:
            self._constants[question.family] = self._best(self._pools[question.family])
        return match(self._constants[question.family], question.answer, question.tolerance)

    def chance(self, question: Question) -> float:
        """Of a guess uniform over the options; without options, over the family's different answers."""
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
