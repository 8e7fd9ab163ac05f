"""Merging experts with a sweep: each mixture of weights is merged, evaluated and deleted, and the best is kept.

Each mixture's report is written as soon as it is known, so that a sweep that was stopped resumes. The best is chosen on
the evaluation set, whose score is therefore biased: report the score on another set.
"""

import csv
import itertools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keye.checkpoint.shards import read_json
from keye.errors import CheckpointError, writing
from keye.evaluation import Report
from keye.files import write_atomically
from keye.visualize.figures import save_figure
from stages.merge import Weights, check_compatible, combine

MAX_MIXTURES = 1000  # of one sweep


@dataclass(frozen=True)
class Mixture:
    """Weights of the experts, in their order, and the report of the model they make."""

    weights: tuple[float, ...]
    report: Report

    @property
    def accuracy(self) -> float:
        return self.report.overall.accuracy


def grid(text: str) -> list[float]:
    """ "0:1:0.25" → [0, 0.25, 0.5, 0.75, 1].

    Raises:
        CheckpointError: not three numbers, or numbers that do not make a grid.
    """
    try:
        first, last, step = map(float, text.split(":"))
    except ValueError:
        raise CheckpointError(f"--sweep {text} is not first:last:step; write 0:1:0.25") from None
    if not (step > 0 and last >= first and (last - first) / step < MAX_MIXTURES):
        raise CheckpointError(f"--sweep {text} is not a grid; its step must be above 0 and lead from first to last")
    return [round(first + i * step, 9) for i in range(int((last - first) / step + 1e-9) + 1)]


def mixtures(values: Sequence[float], experts: int, free: bool) -> list[tuple[float, ...]]:
    """All weights of `experts` models on a grid.

    Args:
        free: the weights are independent; otherwise they add up to 1, and the last is the remainder.

    Raises:
        CheckpointError: there is none, or there are more than `MAX_MIXTURES`.
    """
    count = experts if free else experts - 1
    if len(values) ** count > MAX_MIXTURES:
        raise CheckpointError(f"{len(values)} ** {count} mixtures are more than {MAX_MIXTURES}; sweep in larger steps")
    found = list(itertools.product(values, repeat=count))
    if not free:
        found = [(*w, round(1 - sum(w), 9)) for w in found if sum(w) <= 1 + 1e-9 and min(w) >= 0]
    if not found:
        raise CheckpointError("the sweep has no mixture whose weights are 0 or more and add up to 1; sweep 0:1:0.25")
    return found


def sweep(
    experts: Sequence[str | Path],
    out: str | Path,
    values: Sequence[float],
    score: Callable[[Path], Report],
    about: dict[str, Any],
    base: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Mixture:
    """Try every mixture on the grid `values`, write the best to `out`, and return it.

    Next to `out`, the folder `out.sweep` gets a report for each mixture, sweep.csv and sweep.png. Of mixtures with the
    same accuracy the most even is taken.

    Args:
        score: evaluates a model's directory. about: settings of the evaluation, which identify the sweep when it is
            resumed. base: see `stages.merge.merge`.

    Raises:
        CheckpointError: models that cannot be merged, `out` in use, or another sweep begun there.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out} exists already; name another place or remove it")
    if len(experts) < 2 and base is None:
        raise CheckpointError("one model cannot be mixed; name two or more, or a --base")
    models = [*experts] if base is None else [*experts, base]
    check_compatible([Weights(model) for model in models])
    folder = out.with_name(out.name + ".sweep")
    _begin(folder, {**about, "models": [_mark(model) for model in models], "base": base is not None})
    wanted, found, began, known = mixtures(values, len(experts), base is not None), [], time.monotonic(), 0
    for number, weights in enumerate(wanted, 1):
        known += _path(folder, weights).exists()
        report = _scored(folder, models, _shares(weights, base), weights, score)
        found.append(Mixture(weights, report))
        left = (time.monotonic() - began) / max(1, number - known) * (len(wanted) - number)
        listed = " ".join(f"{weight:g}" for weight in weights)
        scored = f"{report.overall.accuracy:.1%} ± {report.overall.stderr:.1%}"
        say(f"{number}/{len(wanted)}  weights {listed}: {scored}, about {left:.0f} s left")
    write_csv(folder / "sweep.csv", found)
    draw(folder / "sweep.png", found, [Path(expert) for expert in experts])
    best = max(found, key=lambda m: (m.accuracy, -sum(weight**2 for weight in m.weights)))
    combine(models, _shares(best.weights, base), out, progress=False)
    return best


def _shares(weights: Sequence[float], base: str | Path | None) -> list[float]:
    return list(weights) if base is None else [*weights, 1 - sum(weights)]


def _begin(folder: Path, about: dict[str, Any]) -> None:
    """Record in `folder` what is swept.

    Raises:
        CheckpointError: the folder has another sweep.
    """
    about, record = json.loads(json.dumps(about)), folder / "sweep.json"
    before = read_json(record, f"remove {folder} to sweep again") if record.exists() else about
    if before != about:
        key = next(key for key in about if before.get(key) != about[key])
        raise CheckpointError(f"{folder} has a sweep with other {key}; remove it, or name another --out")
    with writing(folder, "the sweep", CheckpointError):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(about, indent=1) + "\n")


def _mark(directory: str | Path) -> list[Any]:
    """A model's directory, and the sizes and times of its files, which change with its weights."""
    files = sorted(Path(directory).glob("*.safetensors"))
    return [str(Path(directory).absolute()), [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]]


def _path(folder: Path, weights: tuple[float, ...]) -> Path:
    return folder / ("_".join(f"{weight:g}" for weight in weights) + ".json")


def _scored(
    folder: Path, models: list[str | Path], shares: list[float], weights: tuple[float, ...],
    score: Callable[[Path], Report],
) -> Report:  # fmt: skip
    """The report of one mixture: read if it was evaluated before."""
    path = _path(folder, weights)
    if not path.exists():
        trial = folder / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        report = score(combine(models, shares, trial, progress=False))
        partial = path.with_suffix(".partial")
        report.save(partial)
        partial.rename(path)
        shutil.rmtree(trial)
    return Report.load(path)


def write_csv(path: Path, found: Sequence[Mixture]) -> None:
    """A row for each mixture: its weights, the accuracy of all questions with standard error, and each family's."""
    families = list(found[0].report.families)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow([*(f"weight_{i + 1}" for i in range(len(found[0].weights))), "accuracy", "stderr", *families])
        for mixture in found:
            overall, scores = mixture.report.overall, mixture.report.families
            numbers = [overall.accuracy, overall.stderr, *(scores[family].accuracy for family in families)]
            rows.writerow([*mixture.weights, *(f"{number:.6f}" for number in numbers)])


def draw(path: Path, found: Sequence[Mixture], experts: Sequence[Path]) -> None:
    """Plot the best accuracy at each weight of the first expert: families thin, all questions thick."""
    from matplotlib.figure import Figure

    best: dict[float, Mixture] = {}
    for mixture in found:
        weight = mixture.weights[0]
        best[weight] = max(best.get(weight, mixture), mixture, key=lambda m: m.accuracy)
    x = sorted(best)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for family in found[0].report.families:
        y = [best[weight].report.families[family].accuracy for weight in x]
        axes.plot(x, y, linewidth=1, alpha=0.6, label=family)
    overall = [best[weight].report.overall for weight in x]
    thick = {"color": "#1d6fb8", "marker": "o", "capsize": 2, "linewidth": 2.4, "label": "all"}
    axes.errorbar(x, [s.accuracy for s in overall], yerr=[s.stderr for s in overall], **thick)
    others = "" if len(experts) == 2 else "; of the others the best"
    axes.set(xlabel=f"weight of {experts[0]}{others}", ylabel="accuracy")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path, dpi=140)
