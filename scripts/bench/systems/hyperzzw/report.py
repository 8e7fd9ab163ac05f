"""The claims, tables and notes of the runs there are."""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import getitem
from typing import Any

import numpy as np

from scripts.bench.common.intervals import paired_interval
from scripts.bench.common.record import Claim, Table
from scripts.bench.systems.hyperzzw.curve import HEADS, MLP, WIDTH
from scripts.bench.systems.hyperzzw.towers import ARMS, FAMILIES, RATE, TOKENS

Runs = Mapping[str, dict[str, Any]]
Written = tuple[list[Claim], list[Table]]


def written(runs: Runs, names: Sequence[str], steps: int) -> tuple[list[Claim], list[Table], list[str]]:
    """Claims, tables and notes; a part with no runs is left out, and the last note names missing runs."""
    claims, tables = list[Claim](), list[Table]()
    for part in (_curve(runs), _nets(runs, steps), _towers(runs)):
        claims += part[0]
        tables += part[1]
    missing = [name for name in names if name not in runs]
    notes = [
        "Intervals: 95 %, bootstrap over the rounds of a time, or paired over images or questions, each the mean of "
        "its seeds; they do not include the spread of seeds, which the tables list. Seconds are CPU seconds of one "
        "thread on a machine with other work.",
        "The released net is reconstructed from the published equations with ω₀ = 2000, the default of its functions; "
        "no published figure is for these images.",
        '"Attention + convolution" is the control for what the mixer has built in: a depthwise convolution with the '
        "mixer's local window beside the attention of each layer, its kernel the same for all frames.",
    ]
    return claims, tables, [*notes, *([f"Not measured: {', '.join(missing)}."] if missing else [])]


def _curve(runs: Runs) -> Written:
    rows = sorted((found for name, found in runs.items() if name.startswith("curve-")), key=lambda row: row["patches"])
    if not rows:
        return [], []
    cells = []
    for row in rows:
        attention, mixer = row["attention"], row["hyperzzw"]
        cells.append(
            (
                f"{row['patches']:,}",
                *(f"{1000 * one['seconds']:.1f}" for one in (attention, mixer)),
                _ratio(row),
                *(f"{one['bytes'] / 2**20:.1f}" for one in (attention, mixer)),
                *(f"{one['operations'] / 1e9:.2f}" for one in (attention, mixer)),
            )
        )
    table = Table(
        f"One tower layer (width {WIDTH}, {HEADS} heads, MLP {MLP}) on one square frame, float32: median milliseconds "
        "of a forward pass over 15 rounds in alternating order, MiB that a backward pass keeps, 10⁹ operations",
        ("patches", "ms, attention", "ms, mixer", "ratio", "MiB, attention", "MiB, mixer", "operations, attention",
         "operations, mixer"),
        cells,
    )  # fmt: skip
    last = rows[-1]
    claim = Claim(
        f"a layer with the mixer is faster than attention at {last['patches']:,} patches",
        "the interval of the ratio ends below 1", f"{_ratio(last)} of attention's time",
        met=paired_interval(np.array(last["ratios"]))[1] < 1,
    )  # fmt: skip
    return [claim], [table]


def _ratio(row: Mapping[str, Any]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(np.median(row["ratios"]), *paired_interval(np.array(row["ratios"])))


def _right(runs: Runs, pattern: str, *keys: str) -> dict[int, np.ndarray]:
    """Seed → right or not, under these keys of the runs `pattern` with the seed."""
    found = {seed: runs[name] for seed in range(10) if (name := pattern.format(seed)) in runs}
    return {seed: np.array(reduce(getitem, keys, one)) for seed, one in found.items()}


Difference = tuple[float, float, float, int]  # mean, ends of its 95 % interval, number of seeds


def _difference(one: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> Difference | None:
    """Difference in per cent and its interval, over the seeds of both; None without a common seed."""
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return None
    items = 100 * np.mean([one[seed].astype(float) - other[seed] for seed in seeds], axis=0)
    return float(items.mean()), *paired_interval(items), len(seeds)


def _said(difference: Difference | None) -> str:
    return "–" if difference is None else "{:+.1f} ({:+.1f} to {:+.1f}), seeds: {}".format(*difference)


def _shares(right: dict[int, np.ndarray]) -> str:
    return ", ".join(f"{100 * values.mean():.1f}" for values in right.values()) or "–"


def _nets(runs: Runs, steps: int) -> Written:
    arms = {
        "ours, AdamW": "net-digits-ours-AdamW-{}", "residual CNN, AdamW": "net-digits-residual-AdamW-{}",
        "released, AdamW": "net-digits-released-AdamW-{}", "ours, Kar3": "net-digits-ours-Kar3-{}",
        "ours, AdamW, slow neural loss": "net-digits-ours-AdamW-slow-{}",
        "stills: ours, AdamW": "net-stills-ours-AdamW-{}",
        "stills: residual CNN, AdamW": "net-stills-residual-AdamW-{}",
    }  # fmt: skip
    found = {name: _right(runs, pattern, "right") for name, pattern in arms.items()}
    rows = []
    for name, pattern in arms.items():
        if not found[name]:
            continue
        some = runs[pattern.format(next(iter(found[name])))]
        base = "stills: ours, AdamW" if name.startswith("stills") else "ours, AdamW"
        difference = "" if name == base else _said(_difference(found[name], found[base]))
        rows.append(
            (name, f"{some['parameters']:,}", f"{some['rate']:g}", _shares(found[name]), difference,
             f"{some['seconds']:.0f}")
        )  # fmt: skip
    if not rows:
        return [], []
    rates = [
        (name.removeprefix("rate-").replace("-", ", "), ", ".join(f"{rate:g}: {score:.1f}" for rate, score in tried))
        for name, tried in ((name, one["tried"]) for name, one in runs.items() if name.startswith("rate-"))
    ]
    alone = [
        (name, _shares(_right(runs, pattern, "right")), _shares(_right(runs, pattern, "alone")))
        for name, pattern in list(arms.items())[:3] if found[name]
    ]  # fmt: skip
    larger = [
        (name, _shares(found[name]), _shares(_right(runs, arms[name], "larger")))
        for name in arms if name.startswith("stills") and found[name]
    ]  # fmt: skip
    tables = [
        Table(f"Right answers, per cent, of 600 digits (8×8) or 600 drawn stills (16×16) after {steps} steps of 32 "
              "images; each seed, and the difference from ours with AdamW",
              ("net", "parameters", "learning rate", "each seed", "difference", "CPU seconds of a run"), rows),
        Table("Choice of the learning rates: right answers of 200 other digits, another seed, per cent",
              ("net, optimizer", "rate: per cent"), rates),
        Table("The same digits in batches of 64 and one at a time, per cent, each seed",
              ("net", "batches of 64", "alone"), alone),
        Table("Nets trained on 16×16 stills, asked about stills of 24×20, per cent, each seed",
              ("net", "16×16", "24×20"), larger),
    ]  # fmt: skip
    pairs = (
        ("ours equals a residual CNN of equal parameters on digits, in points", "ours, AdamW", "residual CNN, AdamW"),
        ("ours equals a residual CNN of equal parameters on drawn stills, in points", "stills: ours, AdamW",
         "stills: residual CNN, AdamW"),
        ("Kar3 trains ours at least as well as AdamW, in points", "ours, Kar3", "ours, AdamW"),
        ("the slow neural loss does not harm, in points", "ours, AdamW, slow neural loss", "ours, AdamW"),
    )  # fmt: skip
    claims = []
    for claim, one, other in pairs:
        if difference := _difference(found[one], found[other]):
            claims.append(Claim(claim, "the interval does not end below 0", _said(difference), met=difference[2] >= 0))
    return claims, [table for table in tables if table.rows]


def _towers(runs: Runs) -> Written:
    found = {arm: [one for run, one in runs.items() if run.startswith(f"tower-{arm}-")] for arm in ARMS}
    if not all(found.values()):
        return [], []
    marks = [mark["steps"] for mark in found["attention"][0]["marks"]]
    rows, costs, claims = [], [], []
    for at, steps in enumerate(marks):
        for family in FAMILIES:
            arms = {arm: _right(runs, f"tower-{arm}-{{}}", "marks", at, "right", family) for arm in ARMS}
            differences = [_difference(arms["hyperzzw"], arms[arm]) for arm in ("attention", "convolution")]
            rows.append((steps, family, *map(_shares, arms.values()), *map(_said, differences)))
            for arm, difference in zip(("attention", "convolution"), differences, strict=True):
                if difference and at in (0, len(marks) - 1):
                    claims.append(
                        Claim(f"after {steps} steps the tiny model answers {family} as well with the mixer as with "
                              f"{ARMS[arm]}, in points", "the interval does not end below 0", _said(difference),
                              met=difference[2] >= 0)
                    )  # fmt: skip
        for arm, name in ARMS.items():
            mean = {key: np.mean([one["marks"][at][key] for one in found[arm]])
                    for key in ("operations", "seconds", "loss")}  # fmt: skip
            costs.append(
                (steps, name, f"{found[arm][0]['tower']:,}", f"{mean['operations'] / 1e12:.3f}",
                 f"{mean['seconds']:.0f}", f"{mean['loss']:.3f}")
            )  # fmt: skip
    number = len(found["attention"][0]["marks"][0]["right"]["motion"])
    tables = [
        Table(f"The tiny model after steps of {TOKENS:,} tokens at learning rate {RATE:g} (the tiny recipe's, chosen "
              f"with attention): right answers of {number} held-out questions, per cent, each seed, and the difference "
              "of the mixer; chance 25", ("steps", "family", *ARMS.values(), "mixer − attention",
                                          "mixer − (attention + convolution)"), rows),
        Table("Cost of these runs: all arms read the same samples; slow frames are 8×8 patches, fast ones 4×4",
              ("steps", "arm", "parameters of the tower", "10¹² operations", "CPU seconds", "last loss"), costs),
    ]  # fmt: skip
    return claims, tables
