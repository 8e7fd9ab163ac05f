"""Figures of a study: accuracy over tokens, and accuracy by family and setting."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keye.evaluation.study.settings import CEILING, CONTENDERS, REFERENCE
from keye.evaluation.study.tables import Row
from keye.visualize.figures import save_figure

COLOURS = ("#1d6fb8", "#d1495b", "#7a7a7a", "#2e933c", "#e09f3e", "#7b4ba0", "#3bb3c3", "#8d5524", "#000000", "#c77dff")
MARKERS = "os^Dv<>PX*"


def pareto(path: Path, rows: Sequence[Row], by: str) -> None:
    """Accuracy over real tokens with 95 % intervals: a panel per length, a line per policy over its budgets."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.by == by and not row.changes]
    panels = [("all", "")] + sorted({("length", row.value) for row in rows if row.slice == "length"}, key=_length)
    policies = _policies(rows)
    figure = Figure(figsize=(4.4 * len(panels), 4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        here = [row for row in rows if (row.slice, row.value) == panel]
        for number, policy in enumerate(policies):
            points = sorted((row for row in here if row.policy == policy), key=lambda row: row.tokens)
            if not points:
                continue
            y = [100 * row.accuracy for row in points]
            spread = [[max(0.0, 100 * (row.accuracy - row.low)) for row in points],
                      [max(0.0, 100 * (row.high - row.accuracy)) for row in points]]  # fmt: skip
            thick = policy == REFERENCE
            axes.errorbar([row.tokens for row in points], y, yerr=None if np.isnan(spread).any() else spread,
                          color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)], capsize=2,
                          linewidth=2.4 if thick else 1.2, alpha=1 if thick else 0.8, label=policy)  # fmt: skip
        axes.axhline(100 * np.mean([row.chance for row in here]), color="#999999", linestyle=":", linewidth=1)
        title = "all questions" if panel[0] == "all" else f"clips of {panel[1]}"
        axes.set(title=f"{title} ({here[0].questions})", xlabel="tokens of a clip", xscale="log", ylabel="accuracy, %")
        ticks = [1 << power for power in range(31) if axes.get_xlim()[0] <= 1 << power <= axes.get_xlim()[1]]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, path, dpi=110)


def heat_map(path: Path, rows: Sequence[Row], by: str) -> None:
    """Accuracy in per cent by family (rows) and setting (columns); a star marks tokens that are not equal."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.by == by and row.slice == "family"]
    families = sorted({row.value for row in rows})
    labels = list(dict.fromkeys(row.setting for row in rows))
    cells = {(row.value, row.setting): row for row in rows}
    values = np.array([[100 * cells[family, label].accuracy for label in labels] for family in families])
    figure = Figure(figsize=(2 + 0.42 * len(labels), 2.6 + 0.32 * len(families)), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(values, vmin=20, vmax=100, cmap="viridis", aspect="auto")
    for down, family in enumerate(families):
        for across, label in enumerate(labels):
            row = cells[family, label]
            unequal = not row.equal and not math.isnan(row.ratio)
            axes.text(across, down, f"{values[down, across]:.0f}{'*' if unequal else ''}", ha="center", va="center",
                      fontsize=7, color="white" if values[down, across] < 65 else "black")  # fmt: skip
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(len(families)), families, fontsize=8)
    figure.colorbar(picture, ax=axes, label="accuracy, %")
    save_figure(figure, path, dpi=110)


def _policies(rows: Sequence[Row]) -> list[str]:
    known = list(CONTENDERS)
    names = dict.fromkeys(row.policy for row in rows)
    return sorted(names, key=lambda name: (known.index(name) if name in known else 50, name == CEILING))


def _length(panel: tuple[str, str]) -> int:
    return ("16s", "1min", "10min", "1h").index(panel[1])
