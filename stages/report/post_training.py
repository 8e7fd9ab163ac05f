"""The sections of a report on post-training: SFT, MPO and GSPO, each from its own folder of the run.

<phase>/metrics.jsonl         a row for each step, see docs/rl.md and docs/post-training.md
<phase>/eval.json             held-out questions before and after, in total and for each family
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import nan
from pathlib import Path
from typing import Any

from stages.metrics import read_metrics
from stages.report import findings
from stages.report.charts import NOT_RUN, Series, legend, line_chart, smooth, table

WIDTH, HEIGHT = 420, 210
DOTS = 40  # points of a curve up to which each has a mark of its own: measurements between steps

Row = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One chart over the steps.

    Attributes:
        title: above the chart.
        y: label of the axis, with the unit.
        curves: key of metrics.jsonl → its name in the legend; a key that no row has is left out.
        percent: the values are shares.
        note: what to look for.
    """

    title: str
    y: str
    curves: dict[str, str]
    percent: bool = False
    note: str = ""


PANELS = {
    "sft": (Panel("Loss", "loss", {"loss": "training", "heldout_loss": "held out"}),),
    "mpo": (
        Panel("Loss", "loss", {"loss": "sum", "preference": "DPO", "quality": "BCO", "generation": "NLL"}),
        Panel(
            "Implicit rewards", "nats × β", {"reward_chosen": "chosen", "reward_rejected": "rejected"},
            note="If both fall, the learning rate is too high.",
        ),
        Panel("Pairs in the right order", "share", {"reward_accuracy": "chosen above rejected"}, True),
    ),
    "gspo": (
        Panel("Reward", "reward", {"reward_mean": "rollouts", "heldout/reward_mean": "held out"}),
        Panel(
            "Groups", "share", {"informative": "different rewards", "all_wrong": "all wrong"}, True,
            "Only groups with different rewards have a gradient.",
        ),
        Panel(
            "Blindness", "accuracy",
            {"seen": "with frames", "gap/smallest": "smallest gap", "blind/zeroed": "zeroed",
             "blind/blind": "text only", "blind/other": "another clip", "blind/shuffled": "shuffled"}, True,
            "A gap near 0 means that the policy does not look.",
        ),
        Panel("Length of an answer", "tokens", {"response_length": "mean"}),
        Panel("Entropy", "nats per token", {"entropy": "mean"}, note="Near 0, all answers to a question are the same."),
        Panel(
            "Clipped", "share", {"clip_fraction": "clipped", "truncated": "truncated answers"}, True,
            "Near 1, the learning rate is too high.",
        ),
        Panel("Gradient", "norm", {"grad_norm": "before clipping"}),
        Panel(
            "Sampler", "nats per token",
            {"sampler_difference_mean": "from the trainer", "kl": "KL from the start model"},
        ),
        Panel("Time", "seconds a step", {"seconds_rollout": "rollout", "seconds_update": "update"}),
    ),
}  # fmt: skip


def sections(run: Path) -> list[tuple[str, str]]:
    """(title, HTML) of SFT and MPO, where the run has them, and of GSPO (`NOT_RUN` without data)."""
    found = [(name.upper(), _phase(run / name, panels)) for name, panels in PANELS.items()]
    return [(title, content) for title, content in found if content != NOT_RUN or title == "GSPO"]


def _phase(folder: Path, panels: Sequence[Panel]) -> str:
    log = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row or "reward_mean" in row]
    if not log:
        return NOT_RUN
    for row in log:
        if "finished" in row:
            row["truncated"] = 1 - row["finished"]
    result = findings.read_json(folder / "eval.json")
    measured = _measured(result) if "after" in result else ""
    charts = "".join(_chart(panel, log) for panel in panels)
    absent = "" if measured else '<p class="absent">The held-out questions have not been measured yet.</p>'
    return measured + absent + f'<div class="panels">{charts}</div>'


def _chart(panel: Panel, log: list[Row]) -> str:
    """The panel's HTML; "" if no row has one of its metrics."""
    series: list[Series] = []
    keys = [key for key in panel.curves if any(row.get(key) is not None for row in log)]
    for key, colour in zip(keys, ("c1", "c0", "c2", "c3", "c4", "c6"), strict=False):
        name, points = panel.curves[key], [(row["step"], row[key]) for row in log if row.get(key) is not None]
        steps, values = [list(column) for column in zip(*points, strict=True)]
        if len(points) < len(log) and len(points) <= DOTS:
            series.append(Series(name, steps, values, colour, style="dots"))
        else:
            series += [Series("", steps, values, colour, style="faint")] if len(keys) == 1 else []
            series.append(Series(name, steps, smooth(values), colour))
    if not series:
        return ""
    chart = line_chart(series, "step", panel.y, width=WIDTH, height=HEIGHT, percent=panel.percent)
    names = legend([one for one in series if one.name]) if len(keys) > 1 else ""
    note = f'<p class="note">{panel.note}</p>' if panel.note else ""
    return f'<div class="panel"><h3>{panel.title}</h3>{note}{names}{chart}</div>'


def _measured(result: Row) -> str:
    """The reward on held-out questions before and after, in total and for each family."""
    before, after = result["before"], result["after"]
    gain, error = result.get("gain", after["reward_mean"] - before["reward_mean"]), result.get("gain_stderr", nan)
    sure = "more" if abs(gain) > 2 * error else "not more"
    text = (
        f"<p>Reward on held-out questions: <b>{before['reward_mean']:.3f}</b> ± {before['reward_stderr']:.3f} before, "
        f"<b>{after['reward_mean']:.3f}</b> ± {after['reward_stderr']:.3f} after; paired difference "
        f"<b>{gain:+.3f} ± {error:.3f}</b>, {sure} than two standard errors."
    )
    best = result.get("best") or {}
    text += f" The best model is that of step {best['step']}." if "step" in best else ""
    text += "</p>"
    families = before.get("families", {})
    rows = [
        [escape(name) or "–", str(old["n"]), *(_value(one, "reward") for one in (old, new))]
        + [_value(one, "accuracy") for one in (old, new)]
        for name, old in families.items()
        if (new := after.get("families", {}).get(name))
    ]
    head = ["family", "questions", "reward before", "after", "accuracy before", "after"]
    return text + (table(head, rows) if rows else "")


def _value(summary: Row, name: str) -> str:
    value, error = summary.get(f"{name}_mean"), summary.get(f"{name}_stderr", nan)
    return "–" if value is None else f"{value:.3f} <small>± {error:.3f}</small>"
