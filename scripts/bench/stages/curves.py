"""Figures of the results of the stages' parts: `find` over the clip's length, memory over the context.

`python -m scripts.bench stages` draws them from docs/results/stages/*.json whenever it writes the document.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from scripts.bench.stages.extension import SHORT

COLOURS = ("#8a8f98", "#c2702c", "#4f8fd0", "#1f5fa8")


def draw_curves(out: Path) -> None:
    """Write `<part>.png` next to the JSON of each measured part that has a figure."""
    for part, curves in (("extension", extension), ("context", context)):
        record = out / f"{part}.json"
        if record.exists():
            draw(json.loads(record.read_text(encoding="utf-8"))["tables"][0], curves, out / f"{part}.png")


def draw(table: dict, curves: Callable[[dict, Axes], None], path: Path) -> None:
    """One picture; the same table gives the same bytes."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    curves(table, axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def extension(table: dict, axes: Axes) -> None:
    """Per cent right over the tokens of the clip, a curve a model."""
    arms, rows = table["columns"][3:], table["rows"]
    tokens = [row[1] for row in rows]
    for number, arm in enumerate(arms):
        right, error = np.array([[float(part) for part in row[3 + number].split(" ± ")] for row in rows]).T
        colour = COLOURS[number]
        axes.errorbar(tokens, right, error, color=colour, marker="o", markersize=4, linewidth=1.8, capsize=2)
        # Where curves lie on each other, the names go apart.
        axes.annotate(
            arm, (tokens[-1], right[-1]), (8, (-7, 5, -3, 4)[number]), textcoords="offset points", color=colour,
            va="center", fontsize=9,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens], fontsize=8)
    axes.minorticks_off()
    axes.axvline(SHORT, color="#b0b4ba", linestyle=":", linewidth=1.2)
    axes.annotate("stage 2's context", (SHORT, 4), (-4, 0), textcoords="offset points", ha="right", fontsize=8)
    axes.axhline(100 / 6, color="#b0b4ba", linestyle=":", linewidth=1.2)
    axes.set_xlim(right=tokens[-1] * 2.6)
    axes.set_ylim(0, 104)
    axes.set_xlabel("tokens of the clip (dotted across: chance)")
    axes.set_ylabel("flashes found, %")


def context(table: dict, axes: Axes) -> None:
    """MiB of the largest process over the tokens of the pack, a curve a number of processes."""
    for processes, colour, name in ((1, COLOURS[1], "one process"), (2, COLOURS[3], "each of two")):
        rows = [row for row in table["rows"] if row[3] == processes]
        points = sorted((int(row[0].replace(",", "")), float(row[4].replace(",", ""))) for row in rows)
        tokens, mib = zip(*points, strict=True)
        axes.plot(tokens, mib, color=colour, marker="o", markersize=4, linewidth=1.8)
        axes.annotate(name, (tokens[-1], mib[-1]), (8, 0), textcoords="offset points", color=colour, va="center")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    axes.set_xticks(sorted({int(row[0].replace(",", "")) for row in table["rows"]})[-3:])
    axes.set_xlim(0, 1.2 * max(int(row[0].replace(",", "")) for row in table["rows"]))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of the pack")
    axes.set_ylabel("memory of the step, MiB")
