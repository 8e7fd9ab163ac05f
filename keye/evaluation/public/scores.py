"""Predictions of a public benchmark, their files, and the tables of their scores."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from keye.errors import KeyeError, writing
from keye.evaluation import report
from keye.evaluation.public.question import PublicBenchmark
from keye.files import atomic_file

Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Prediction:
    """The reply to a question and what the official rule makes of it.

    Attributes:
        id: of the question.
        clip: path of the clip; questions about one clip are not independent.
        reply: the reply, with the first words that the prompt gives it.
        answer: the correct option.
        choice: the option that the rule reads, "" if none.
        correct: by the rule; None if there is no rule.
        chance: probability that a uniform guess is correct.
        majority: whether the most frequent answer of the family is correct.
        slices: the groups of the question.
        slow, fast, tokens: frames of the clip and their visual tokens.
        error: why the clip could not be used; such a question counts as wrong.
    """

    id: str
    clip: str
    reply: str
    answer: str
    choice: str
    correct: bool | None
    chance: float
    majority: bool
    slices: Mapping[str, str] = field(default_factory=dict)
    slow: int = 0
    fast: int = 0
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class PublicScore(report.Score):
    """A score with the figures of the official script, shares from 0 to 1.

    Attributes:
        low, high: 95 % interval of `accuracy`.
        official: accuracy as the official script computes it.
        unread: share of replies in which the rule reads no option.
    """

    low: float
    high: float
    official: float
    unread: float


def score(predictions: Sequence[Prediction], drops_unread: bool = False) -> PublicScore:
    """The score of predictions with a rule; drops_unread: the official accuracy leaves out unread replies."""
    common, read = report.score(predictions), sum(bool(one.choice) for one in predictions)
    low, high = interval(predictions)
    official = common.accuracy
    if drops_unread:
        official = common.accuracy * common.n / read if read else 0.0
    return PublicScore(**asdict(common), low=low, high=high, official=official, unread=1 - read / common.n)


def interval(predictions: Sequence[Prediction]) -> tuple[float, float]:
    """The 95 % Wilson score interval of the accuracy, widened by the design effect of questions that share a clip.

    The design effect is the variance of the mean with clips as clusters over that of independent questions, at least 1.
    """
    n = len(predictions)
    mean = sum(bool(one.correct) for one in predictions) / n
    clusters: dict[str, float] = {}
    for one in predictions:
        clusters[one.clip] = clusters.get(one.clip, 0.0) + bool(one.correct) - mean
    count = len(clusters)
    if 0 < mean < 1 and count > 1:  # variances of the mean, both with Bessel's correction
        clustered = sum(total**2 for total in clusters.values()) * count / (count - 1)
        n = n / max(1.0, clustered / (mean * (1 - mean) * n * n / (n - 1)))
    centre = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def scores(predictions: Sequence[Prediction], drops_unread: bool = False) -> dict[str, dict[str, PublicScore]]:
    """Grouping → group → score of the predictions with a rule; `all` of the grouping `all` is the total."""
    judged = [one for one in predictions if one.correct is not None]
    groups = {"all": {"all": judged}, **report.by_slice(judged)} if judged else {}
    return {
        grouping: {group: score(members, drops_unread) for group, members in found.items()}
        for grouping, found in groups.items()
    }


def table(title: str, rows: Iterable[tuple[str, PublicScore]]) -> str:
    """Plain-text table in per cent, one line a group."""
    rows = list(rows)
    width = max([len(title), *(len(name) for name, _ in rows)])
    head = f"{title:<{width}}{'n':>7}{'accuracy':>10}{'95 % interval':>16}{'official':>10}{'unread':>8}"
    lines = [f"{head}{'chance':>8}{'majority':>10}"]
    for name, row in rows:
        figures = f"{row.n:>7}{100 * row.accuracy:>10.1f}{f'[{100 * row.low:.1f}, {100 * row.high:.1f}]':>16}"
        figures += f"{100 * row.official:>10.1f}{100 * row.unread:>8.1f}{100 * row.chance:>8.1f}"
        figures += f"{100 * row.majority:>10.1f}"
        lines.append(f"{name:<{width}}{figures}")
    return "\n".join(lines)


def summary(benchmark: PublicBenchmark, runs: Mapping[str, Sequence[Prediction]]) -> str:
    """The tables of a benchmark: every grouping of the first run, and a row for each control if there are several."""
    control, predictions = next(iter(runs.items()))
    groups = scores(predictions, benchmark.drops_unread)
    title = benchmark.name if control == "none" else f"{benchmark.name}, {control}"
    rows = [row for grouping, found in groups.items() if grouping != "all" for row in _named(grouping, found)]
    lines = [table(title, [*rows, *groups.get("all", {}).items()])]
    if len(runs) > 1:
        totals = {name: scores(made, benchmark.drops_unread).get("all") for name, made in runs.items()}
        lines += ["", table("control", [(name, found["all"]) for name, found in totals.items() if found])]
    unscored = sum(one.correct is None for one in predictions)
    failed = [one for one in predictions if one.error]
    if unscored:
        lines.append(f"{unscored} replies have no rule and are not scored")
    if failed:
        lines.append(f"{len(failed)} questions failed and count as wrong, the first, {failed[0].id}: {failed[0].error}")
    if benchmark.left_out:
        lines.append(f"{benchmark.left_out} questions are left out: their clips do not exist")
    return "\n".join(lines)


def _named(grouping: str, found: Mapping[str, PublicScore]) -> Iterator[tuple[str, PublicScore]]:
    for group, row in found.items():
        yield f"{grouping}: {group}" if ":" not in group else group, row


def save_scores(out: Path, benchmark: PublicBenchmark, runs: Mapping[str, Sequence[Prediction]]) -> Path:
    """Write control → grouping → group → score as `scores.json`; returns its path."""
    values = {
        control: {
            grouping: {group: asdict(row) for group, row in found.items()}
            for grouping, found in scores(predictions, benchmark.drops_unread).items()
        }
        for control, predictions in runs.items()
    }
    path = out / "scores.json"
    with writing(path, "the scores"), atomic_file(path) as part:
        part.write_text(json.dumps({"benchmark": benchmark.name, "scores": values}, indent=1) + "\n", encoding="utf-8")
    return path


class PredictionFile:
    """The predictions of one run in a folder, written as they are made, so that a stopped run can continue.

    Every process has its own file of JSON lines, which begins with the settings. An incomplete last line, which a
    killed process leaves, is dropped.

    Args:
        folder: of the run.
        settings: JSON values that determine the predictions.
        rank: of this process.

    Raises:
        KeyeError: the folder has predictions of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], rank: int = 0) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        folder.mkdir(parents=True, exist_ok=True)
        self.done = {one.id: one for one in self.read()}
        self.path = folder / ("predictions.jsonl" if rank == 0 else f"predictions-{rank}.jsonl")
        own = _lines(self.path)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (own or [{"settings": self.settings}]))
        with atomic_file(self.path) as part:
            part.write_text(text, encoding="utf-8")

    def read(self) -> list[Prediction]:
        """All predictions of the folder."""
        found = []
        for path in sorted(self.folder.glob("predictions*.jsonl")):
            lines = _lines(path)
            before = lines[0].get("settings") if lines else self.settings
            if before != self.settings:
                changed = [name for name in self.settings if (before or {}).get(name) != self.settings[name]]
                raise KeyeError(
                    f"{path} has predictions of other settings ({', '.join(changed) or 'unknown'}); give another --out,"
                    " or delete it"
                )
            found += [Prediction(**line) for line in lines[1:]]
        return found

    def add(self, predictions: Iterable[Prediction]) -> None:
        """Append predictions."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in predictions)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of JSON lines; KeyeError for a damaged line before the last."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise KeyeError(
                f"{path}:{number} is not JSON ({error}); delete that line, or give another --out"
            ) from error
    return found
