"""Can a question of SlowFastBench v1 be answered without a pixel? A classifier tries, family by family.

It learns from questions of the split "train" and is scored on others, of the split "heldout". Its inputs are the words
of the question and, one after the other: the plan under each measure (types, times, tokens, similarities), the packets
of the file, and nothing else ("text"). A family counts where no input gives more than chance. Two parts: "drawn" has
the benchmark's own mix of backgrounds, and "still" has still backgrounds only, where noise and camera motion do not
hide a change. Choices about families and about the adversary are made with --dev. Needs scikit-learn (the extra
"adversary"). Drawn inputs are cached in .cache/bench/adversary; an interrupted run continues, and --cached judges all
that is there. Results: docs/results/bench_v1.md.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keye.errors import KeyeError, run
from keye.world.slowfastbench.real import REAL_CLIPS
from keye.world.slowfastbench.table import FAMILIES
from scripts.bench.adversary_inputs import CLIPS, INPUTS, MEASURES, Drawn, load, load_cached
from scripts.bench.common.record import ROOT, Claim, Table, arguments, document, out_of, save

EXAMPLES = """examples:
  python -m scripts.bench.adversary                          all families; an hour on one quiet core
  python -m scripts.bench.adversary --cached                 judge what is in the cache and write the record
  python -m scripts.bench.adversary --motion still --train 1600 --test 1600
  python -m scripts.bench.adversary --dev --families turn    while a family is being changed
  python -m scripts.bench.adversary --families find --quick  shows that it runs
  python -m scripts.bench.adversary --draw-only --families find order      fills the cache, for several processes
"""
HEAD = """# SlowFastBench v1: what can be answered without a pixel

Command: `python -m scripts.bench.adversary`. How the benchmark is made:
[docs/slowfastbench.md](../slowfastbench.md)."""
CHANGES = "One minus the lowest similarity of a clip, mean ± half the largest difference between two answers"
ACCURACY = "Accuracy of the adversary in per cent"
COLUMNS = ("family", "input", "chance", "learnt from", "questions", "accuracy, 95 % interval", "above",
           "within 1 point")  # fmt: skip
NOTE = """Within 1 point: with 10,000 questions and more, whether the accuracy is at most 1 point above chance. With
fewer: yes, if the upper end of the interval is; no, if the lower end is not; otherwise open. Intervals are over groups
of questions. In a group all answers differ: where the inputs of a group are equal, a classifier gives one choice and is
right exactly once, and the interval has no width."""
COUNTS = """A family counts if no input is above chance by more than a point, and the text and the plans under change
and mse are within a point on 10,000 questions or more."""
NEEDED = ("text", "change", "mse")
POINT = 0.01
"""Largest accepted advantage over chance."""
DECISIVE = 10_000
"""Questions from which on the accuracy decides, and not its interval."""
TEXTS = 4
"""Times as many questions for the text, which needs no drawing."""
YES, NO, OPEN = "yes", "**no**", "open: more questions"


def main() -> None:
    parser = arguments(__doc__, EXAMPLES, results="bench_v1")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), metavar="NAME",
                        help="only these (all; real_… with --motion drawn and .cache/clips)")  # fmt: skip
    parser.add_argument("--motion", choices=("still", "drawn"), default="drawn", help="of the backgrounds (drawn)")
    parser.add_argument("--train", type=int, default=3000, metavar="N", help="questions to learn from (3000)")
    parser.add_argument("--test", type=int, default=10_000, metavar="N", help="other questions (10000)")
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=["change", "mse", "patch_l1"], metavar="NAME",
                        help=f"inputs with all questions, of {', '.join(INPUTS)} (change mse patch_l1)")  # fmt: skip
    parser.add_argument("--some", type=int, default=1000, metavar="N", help="of each for the other inputs (1000)")
    parser.add_argument("--dev", action="store_true",
                        help="score on the split dev, while something is being changed; writes to .cache")  # fmt: skip
    parser.add_argument("--cached", action="store_true", help="judge all questions in the cache and draw no others")
    parser.add_argument("--draw-only", action="store_true", help="fill the cache and stop")
    args = parser.parse_args()
    if not args.draw_only:
        _classifiers()  # refuses before anything is drawn
    if args.dev and not args.out:
        args.out = ROOT / ".cache/bench/dev_bench_v1"
    if args.quick:
        args.train, args.test, args.some = 80, 80, 40
    splits = {"train": "train", "test": "dev" if args.dev else "heldout"}
    real = args.motion == "drawn" and all((CLIPS / name).is_file() for name in REAL_CLIPS)
    families = args.families or [name for name, row in FAMILIES.items() if real or not row.real]
    out, began = out_of(args), time.monotonic()
    # A run of some families keeps what the record says about the others.
    whole = args.quick or (args.cached and not args.families)
    rows, changes = ([], []) if whole else former(out / f"{args.motion}.json")
    for family in families:
        drawn = questions(family, splits, args)
        if drawn is None or args.draw_only:
            continue
        rows = ordered(rows, judge(family, *drawn))
        changes = ordered(changes, [change(family, drawn[1])])
        record(out, args, rows, changes, splits, time.monotonic() - began)
    if not rows and not args.draw_only:
        raise KeyeError(f"the cache has no questions of {', '.join(families)}; leave out --cached to draw them")


def questions(family: str, splits: dict[str, str], args: argparse.Namespace) -> tuple[Drawn, Drawn] | None:
    """The questions to learn from and those to answer; None if the cache lacks them and nothing may be drawn."""
    found = []
    for part, split in splits.items():
        if args.cached:
            found.append(load_cached(family, split, args.motion))
        else:
            number = getattr(args, part)
            numbers = {name: number if name in args.inputs else min(number, args.some) for name in INPUTS}
            numbers["text"] = TEXTS * number
            found.append(load(family, split, {name: count for name, count in numbers.items() if count}, args.motion))
    return None if None in found else tuple(found)


def former(path: Path) -> tuple[list[list[str]], list[list[str]]]:
    """The rows of both tables of a record; empty if there is none, or if it has other columns."""
    tables = json.loads(path.read_text(encoding="utf-8"))["tables"] if path.exists() else []
    expected = [list(COLUMNS), ["family", *MEASURES]]
    return tuple(table["rows"] for table in tables) if [table["columns"] for table in tables] == expected else ([], [])


def ordered(rows: list[list[str]], found: list[list[str]]) -> list[list[str]]:
    """The rows with those of one family replaced or added, in the order of `FAMILIES`."""
    kept = [row for row in rows if row[0] in FAMILIES and row[0] != found[0][0]]
    return sorted([*kept, *found], key=lambda row: list(FAMILIES).index(row[0]))


def record(
    out: Path, args: argparse.Namespace, rows: list[list[str]], changes: list[list[str]], splits: dict[str, str],
    seconds: float,
) -> None:  # fmt: skip
    """Write the record of a part and the document."""
    tables = [Table(ACCURACY, COLUMNS, rows), Table(CHANGES, ["family", *MEASURES], changes)]
    names = list(dict.fromkeys(row[0] for row in rows))
    claims = [claim([row for row in rows if row[0] == name]) for name in names]
    counting = [name for name in names if counts([row for row in rows if row[0] == name])]
    if args.motion == "drawn":
        figure = f"{len(counting)} of {len(FAMILIES)}"
        claims.append(Claim("families that count", "≥ 10", figure, met=len(counting) >= 10))
    missing = [name for name in FAMILIES if name not in names]
    notes = [NOTE, COUNTS + f" These do: {', '.join(counting) or 'none'}."]
    notes += [f"Not measured: {', '.join(missing)}."] if missing else []
    save(out, args.motion, claims, tables, seconds=seconds, quick=args.quick, seeds=splits, notes=notes)
    path = (out if args.quick or args.out else out.parent) / "bench_v1.md"
    path.write_text(document(out, ["drawn", "still"], HEAD), encoding="utf-8")


def claim(rows: list[list[str]]) -> Claim:
    """The claim about a family from its rows: the best input of those with many questions, and the best of the others.

    The best of many inputs with few questions is above chance by noise alone, so that it is given apart.
    """
    figures = []
    for many in (True, False):
        found = [row for row in rows if (_questions(row) >= DECISIVE) == many]
        if found:
            best = max(found, key=lambda row: float(row[5].partition(" ")[0]))
            figures.append(f"{best[5]} % ({best[1]}, {best[4]} questions)")
    verdicts = {row[-1] for row in rows}
    met = False if NO in verdicts else True if verdicts == {YES} else "open"
    return Claim(f"{rows[0][0]}: best input", f"≤ 1 point above {rows[0][2]} %", "; ".join(figures), met=met)


def _questions(row: list[str]) -> int:
    return int(row[4].replace(",", ""))


def counts(rows: list[list[str]]) -> bool:
    """Whether a family counts: no input leaks, and `NEEDED` are within a point on 10,000 questions."""
    decided = {row[1] for row in rows if row[-1] == YES and _questions(row) >= DECISIVE}
    return decided >= set(NEEDED) and not any(row[-1] == NO for row in rows)


def change(family: str, drawn: Drawn) -> list[str]:
    """A row of the table of changes."""
    cells = [family]
    for name in MEASURES:
        if name not in drawn.inputs:
            cells.append("–")
            continue
        drops = 1 - drawn.lowest(name)
        answers = drawn.answers[: len(drops)]
        means = [drops[answers == answer].mean() for answer in np.unique(answers)]
        cells.append(f"{drops.mean():.3f} ± {np.ptp(means) / 2:.4f}")
    return cells


def judge(family: str, train: Drawn, test: Drawn) -> list[list[str]]:
    """A row of the table for each input that both parts have."""
    rows = []
    for name in (name for name in train.inputs if name in test.inputs):
        number = len(test.inputs[name])
        allowed, truth = test.allowed[:number], test.answers[:number]
        chance = float((1 / allowed.sum(1)).mean())
        right = guess(train.inputs[name], train, test.inputs[name], allowed) == truth
        mean, (low, high) = float(right.mean()), interval(right, test.groups[:number])
        rows.append([
            family, name, f"{100 * chance:.1f}", f"{len(train.inputs[name]):,}", f"{number:,}",
            f"{100 * mean:.1f} ({100 * low:.1f}–{100 * high:.1f})", f"{100 * (mean - chance):+.1f}",
            verdict(mean - chance, low - chance, high - chance, number),
        ])  # fmt: skip
        print("      " + " · ".join(rows[-1]), flush=True)
    return rows


def verdict(above: float, low: float, high: float, number: int) -> str:
    """Whether an input is within a point of chance, from its advantage over chance and the ends of the interval."""
    if number >= DECISIVE:
        return YES if above <= POINT else NO
    return YES if high <= POINT else NO if low > POINT else OPEN


def guess(inputs: np.ndarray, train: Drawn, others: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The choices int [N] of the better of two classifiers; groups of a fifth of the training questions decide which.

    Raises:
        KeyeError: scikit-learn is not installed.
    """
    number = len(inputs)
    labels, kept_back = train.answers[:number], train.groups[:number] % 5 == 0
    best: tuple[float, np.ndarray] = (-1.0, np.zeros(len(others), int))
    for model in _classifiers():
        model.fit(inputs[~kept_back], labels[~kept_back])
        score = (_pick(model, inputs[kept_back], train.allowed[:number][kept_back]) == labels[kept_back]).mean()
        if score > best[0]:
            best = float(score), _pick(model, others, allowed)
    return best[1]


def _classifiers() -> tuple[Any, Any]:
    """A linear classifier and one of trees, not trained.

    Raises:
        KeyeError: scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise KeyeError('the adversary needs scikit-learn; install it with pip install "keye[adversary]"') from error
    return (
        make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200)),
        HistGradientBoostingClassifier(max_iter=40, max_leaf_nodes=15, l2_regularization=1.0, random_state=0),
    )


def _pick(model: object, inputs: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    shares = np.zeros(allowed.shape)
    shares[:, model.classes_] = model.predict_proba(inputs)
    return np.where(allowed, shares, -1).argmax(1)


def interval(right: np.ndarray, groups: Sequence[int]) -> tuple[float, float]:
    """The 95 % interval of a mean whose groups are independent, from the spread of their means."""
    _, where = np.unique(groups, return_inverse=True)
    means = np.bincount(where, right) / np.bincount(where)
    mean, half = right.mean(), 1.96 * means.std(ddof=1) / math.sqrt(len(means))
    return mean - half, mean + half


if __name__ == "__main__":
    sys.exit(run(main))
