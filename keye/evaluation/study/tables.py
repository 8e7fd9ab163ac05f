"""Tables of a study from its predictions: accuracy and tokens of each setting, and paired differences.

A row is about one slice of the questions, such as all, a family or a length. Differences are between answers to the
same questions. They are at equal tokens if the sums of tokens differ by at most 2 %.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keye.errors import KeyeError, writing
from keye.evaluation.study.bootstrap import interval
from keye.evaluation.study.clips import WITHIN
from keye.evaluation.study.settings import CEILING, REFERENCE, RIVALS
from keye.files import atomic_file

MEANS = ("entries", "slow", "psnr", "ssim", "events", "event_tokens", "chance")
SLICES = ("family", "length", "height", "motion", "load")
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One setting on one slice.

    Attributes:
        slice, value: such as "length" and "1min"; "all" and "" for all questions.
        by: "observer" or "model".
        setting, policy, budget, changes: the setting; its budget is None without a limit.
        questions, groups, seeds: numbers of questions, of groups of questions, and of seeds of a model.
        tokens: mean tokens of a clip, over the questions.
        ratio: tokens over those of the reference of the same budget; NaN without one.
        equal: whether `ratio` is within 2 % of 1.
        entries: mean number of frames shown.
        slow: share of them that is slow.
        psnr, ssim: detail kept of the frames shown, in dB and at most 1.
        events: share of the events of which a frame is shown.
        event_tokens: mean tokens of the largest frame that is shown of an event.
        chance, accuracy: shares of correct answers by guessing and measured.
        low, high: 95 % interval of `accuracy`.
    """

    slice: str
    value: str
    by: str
    setting: str
    policy: str
    budget: int | None
    changes: str
    questions: int
    groups: int
    seeds: int
    tokens: float
    ratio: float
    equal: bool
    entries: float
    slow: float
    psnr: float
    ssim: float
    events: float
    event_tokens: float
    chance: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Pair:
    """The difference of two settings on one slice.

    Attributes:
        slice, value, by, budget: as in `Row`.
        setting, rival: labels.
        ratio: tokens of the setting over those of the rival.
        equal: whether `ratio` is within 2 % of 1.
        difference, low, high: accuracy of the setting minus that of the rival, with its paired 95 % interval.
    """

    slice: str
    value: str
    by: str
    budget: int | None
    setting: str
    rival: str
    ratio: float
    equal: bool
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "better" or "worse" if the interval excludes 0, else "open"."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "open"


class Answers:
    """Predictions in arrays by answerer and setting, over the questions that all settings of the answerer have.

    Raises:
        KeyeError: there is no question that all settings have.
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        found: dict[str, dict[str, dict[tuple[int, str], Line]]] = {}
        for line in lines:
            name, _, seed = line["by"].partition("#")
            found.setdefault(name, {}).setdefault(line["setting"], {})[int(seed or 0), line["id"]] = line
        self.by: dict[str, dict[str, list[list[Line]]]] = {}
        self.left_out = 0
        for name, settings in found.items():
            common = set.intersection(*({id for _, id in lines} for lines in settings.values()))
            known = set.union(*({id for _, id in lines} for lines in settings.values()))
            self.left_out += len(known - common)
            if not common:
                raise KeyeError(f"no question has been answered by {name} under every setting; continue the study")
            order = sorted(common)
            self.by[name] = {label: _by_seed(lines, order) for label, lines in settings.items()}

    def rows(self) -> list[Row]:
        """A row for every answerer, slice and setting."""
        found = []
        for by, labels in self.by.items():
            for (slice_, value), places in self.places(by):
                tokens = {label: _mean(lines, places, "tokens") for label, lines in labels.items()}
                for label, lines in labels.items():
                    policy, budget, changes = parts_of(label)
                    ratio = tokens[label] / tokens.get(f"{REFERENCE}@{budget}", math.nan)
                    right, count, groups = _grouped([[line["right"] for line in seed] for seed in lines], lines, places)
                    accuracy, low, high = interval(right, count)
                    means = {name: _mean(lines, places, name) for name in MEANS}
                    found.append(Row(slice_, value, by, label, policy, budget, changes, len(places), groups, len(lines),
                                     tokens[label], ratio, abs(ratio - 1) <= WITHIN, accuracy=accuracy, low=low,
                                     high=high, **means))  # fmt: skip
        return found

    def pairs(self) -> list[Pair]:
        """For every answerer and slice: each setting against the reference, the rivals of its budget, and the ceiling.

        Seeds of two models are paired by their numbers; a model of one seed is compared with each seed of another.
        """
        found = []
        for by, labels in self.by.items():
            for (slice_, value), places in self.places(by):
                for label, lines in labels.items():
                    budget = parts_of(label)[1]
                    others = [f"{name}@{budget}" for name in (REFERENCE, *RIVALS)] + [f"{CEILING}@unlimited"]
                    for other in others:
                        if other != label and other in labels:
                            found.append(_pair((slice_, value, by, budget), (label, lines), (other, labels[other]),
                                               places))  # fmt: skip
        return found

    def places(self, by: str) -> list[tuple[tuple[str, str], list[int]]]:
        """(slice, value) → places of its questions."""
        lines = next(iter(self.by[by].values()))[0]
        found: dict[tuple[str, str], list[int]] = {("all", ""): list(range(len(lines)))}
        for name in SLICES:
            for place, line in enumerate(lines):
                found.setdefault((name, str(line[name])), []).append(place)
        return list(found.items())


def parts_of(label: str) -> tuple[str, int | None, str]:
    """(policy, budget, changes) of a label."""
    head, _, changes = label.partition(" ")
    policy, _, budget = head.rpartition("@")
    return policy, None if budget == "unlimited" else int(budget), changes


def _by_seed(lines: Mapping[tuple[int, str], Line], order: Sequence[str]) -> list[list[Line]]:
    seeds = sorted({seed for seed, _ in lines})
    complete = [seed for seed in seeds if all((seed, name) in lines for name in order)]
    return [[lines[seed, name] for name in order] for seed in complete]


def _mean(lines: Sequence[Sequence[Line]], places: Sequence[int], key: str) -> float:
    return float(np.mean([lines[0][place][key] for place in places]))


def _grouped(
    values: Sequence[Sequence[float]], lines: Sequence[Sequence[Line]], places: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, int]:
    """(sums [S, G], numbers [S, G], G) of values [S][Q] by the group of the question, at some places."""
    names = [lines[0][place]["group"] for place in places]
    groups = {name: number for number, name in enumerate(dict.fromkeys(names))}
    where = [groups[name] for name in names]
    totals = np.stack([np.bincount(where, [float(row[place]) for place in places], len(groups)) for row in values])
    return totals, np.broadcast_to(np.bincount(where, minlength=len(groups)), totals.shape), len(groups)


def _pair(
    head: tuple[str, str, str, int | None],
    one: tuple[str, Sequence[Sequence[Line]]],
    other: tuple[str, Sequence[Sequence[Line]]],
    places: Sequence[int],
) -> Pair:
    (label, lines), (rival, others) = one, other
    seeds = max(len(lines), len(others))
    differences = []
    for seed in range(seeds):
        mine, theirs = lines[seed % len(lines)], others[seed % len(others)]
        differences.append([first["right"] - second["right"] for first, second in zip(mine, theirs, strict=True)])
    total, count, _ = _grouped(differences, lines, places)
    ratio = _mean(lines, places, "tokens") / _mean(others, places, "tokens")
    return Pair(*head, label, rival, ratio, abs(ratio - 1) <= WITHIN, *interval(total, count))


def wins(pairs: Sequence[Pair], label: str, by: str) -> dict[tuple[str, str], str]:
    """Slice → "win", "loss" or "open" of a setting against all `RIVALS` of its budget together.

    A win: better than every rival at equal tokens. A loss: worse than one of them at equal tokens. A slice without all
    rivals at equal tokens is "not equal".
    """
    budget, found = parts_of(label)[1], {}
    names = {f"{name}@{budget}" for name in RIVALS}
    for pair in pairs:
        if pair.setting == label and pair.by == by and pair.rival in names:
            found.setdefault((pair.slice, pair.value), []).append(pair)
    verdicts = {}
    for where, those in found.items():
        given = [pair.verdict for pair in those if pair.equal]
        if len(given) < len(names):
            verdicts[where] = "loss" if "worse" in given else "not equal"
        else:
            verdicts[where] = "win" if set(given) == {"better"} else "loss" if "worse" in given else "open"
    return verdicts


def save_csv(path: Path, rows: Sequence[Row | Pair]) -> None:
    """Write rows as CSV; KeyeError if the file cannot be written."""
    with writing(path, "the table"), atomic_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value
                             for key, value in asdict(row).items()})  # fmt: skip
