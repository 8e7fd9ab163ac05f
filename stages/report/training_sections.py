"""The sections of a report on any pre-training run, from the files of its stages.

recipe.toml                   the chain of stages, the target shares
<stage>/metrics.jsonl         step, loss, tokens_per_second, mfu, stall_share, tokens_<kind>, skipped …
<stage>/peak.json             the peak rate for the MFU
<stage>/quarantine*.jsonl     samples that could not be used, with reasons; one file per rank
<stage>/checkpoints, stage.json
"""

import re
from collections import Counter
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from keye.errors import RecipeError
from stages import recipe as recipes
from stages.data.quarantine import Quarantine
from stages.distributed.checkpoints import checkpoints
from stages.metrics import duration, read_metrics
from stages.report import findings
from stages.report.charts import NOT_RUN, Series, legend, line_chart, percent, smooth, table

STAGES = {
    "vision": ("Stage 0 · vision", "the vision tower against a text tower, SigLIP loss"),
    "alignment": ("Stage 1 · alignment", "the projector only"),
    "multitask": ("Stage 2 · multi-task", "everything"),
    "annealing": ("Stage 3 · annealing", "everything, a longer context, a larger RoPE base"),
}
KIND_COLOURS = {"video": "c0", "image": "c1", "text": "c2"}
REASONS = 12  # shown for skipped samples, the most frequent first
WIDTH, HEIGHT = 420, 210


def sections(run: Path) -> list[tuple[str, str]]:
    """(title, HTML) of each section; the HTML is `NOT_RUN` without data."""
    chain, logs = _chain(run), {}
    for name in chain:
        rows = [row for row in read_metrics(run / name / "metrics.jsonl") if "loss" in row]
        logs |= {name: rows} if rows else {}
    return [
        ("The stages", _stages(run, chain, logs)),
        ("Training data", _data(run, chain, logs)),
        ("Speed", _speed(run, logs)),
        ("Skipped steps and samples", _skipped(run, logs)),
    ]


def tiles(run: Path) -> list[tuple[str, str]]:
    """(figure, caption) for the top of the page."""
    chain = _chain(run)
    logs = {name: read_metrics(run / name / "metrics.jsonl") for name in chain}
    rows = [row for log in logs.values() for row in log if "loss" in row]
    if not rows:
        return []
    finished = [name for name in chain if (run / name / "stage.json").exists()]
    wanted = sum(stage.steps for stage in chain.values() if stage is not None) or len(rows)
    seconds, tokens = sum(row.get("seconds", 0.0) for row in rows), sum(row.get("tokens", 0) for row in rows)
    stalled = sum(row.get("stall_seconds", 0.0) for row in rows)
    made = [(f"{len(rows):,} of {wanted:,}", f"steps; stages finished: {', '.join(finished) or 'none yet'}")]
    if seconds:
        made.append((f"{tokens:,}", f"tokens in {duration(seconds)} of steps, {tokens / seconds:,.0f} a second"))
        made.append((percent(stalled / seconds), "of the steps' time was spent waiting for data"))
    return made


def _chain(run: Path) -> dict[str, Any]:
    """Phase → its settings, in order; None if the recipe is missing or cannot be read."""
    try:
        return dict(recipes.load(run / "recipe.toml").chain)
    except RecipeError:
        return {name: None for name in STAGES if (run / name).is_dir()} or dict.fromkeys(STAGES)


def _title(name: str) -> tuple[str, str]:
    title, trains = STAGES[recipes.stage_of(name)]
    context = name.partition("-")[2]
    return (f"{title}, {int(context):,} tokens", trains) if context else (title, trains)


def _stages(run: Path, chain: dict[str, Any], logs: dict[str, list[dict[str, Any]]]) -> str:
    charts, rows = [], []
    for name, stage in chain.items():
        title, trains = _title(name)
        if name not in logs:
            charts.append(f'<div class="panel"><h3>{title}</h3><p class="note">{trains}</p>{NOT_RUN}</div>')
            continue
        log = logs[name]
        steps, losses = [row["step"] for row in log], [row["loss"] for row in log]
        series = [Series("each step", steps, losses, "c0", style="faint"), Series("", steps, smooth(losses), "c0")]
        held = [row for row in log if "heldout_loss" in row]
        if held:
            points = [row["step"] for row in held], [row["heldout_loss"] for row in held]
            series = [series[0], Series("mean", *series[1][1:3], "c0"), Series("held out", *points, "c1")]
        chart = line_chart(series, "step", "loss", width=WIDTH, height=HEIGHT)
        key = legend(series) if held else ""
        charts.append(f'<div class="panel"><h3>{title}</h3><p class="note">{trains}</p>{key}{chart}</div>')
        tenth = max(1, len(losses) // 10)
        change = [f"{sum(part) / len(part):.3f}" for part in (losses[:tenth], losses[-tenth:])]
        done = f"{steps[-1]:,}" + (f" of {stage.steps:,}" if stage is not None and stage.steps > steps[-1] else "")
        kept = ", ".join(path.name.removeprefix("step-") for path in checkpoints(run / name / "checkpoints"))
        tokens = sum(row.get("tokens", 0) for row in log)
        least = f"{held[-1]['heldout_loss']:.3f}" if held else "–"
        rows.append([title, done, *change, least, f"{tokens:,}" if tokens else "–", kept or "–"])
    note = '<p class="note">First and last loss are means over a tenth of the steps.</p>'
    head = ["stage", "steps", "first loss", "last loss", "held out", "tokens", "checkpoints at"]
    return f'<div class="panels">{"".join(charts)}</div>' + (table(head, rows) + note if rows else "")


def _data(run: Path, chain: dict[str, Any], logs: dict[str, list[dict[str, Any]]]) -> str:
    panels, rows = [], []
    for name, log in logs.items():
        sums = dict.fromkeys(KIND_COLOURS, 0)
        shares: dict[str, list[float]] = {kind: [] for kind in KIND_COLOURS}
        for row in log:
            sums = {kind: sums[kind] + row.get(f"tokens_{kind}", 0) for kind in KIND_COLOURS}
            total = sum(sums.values()) or 1
            for kind in KIND_COLOURS:
                shares[kind].append(sums[kind] / total)
        if not any(sums.values()):
            continue
        steps, targets = [row["step"] for row in log], getattr(chain[name], "mixture", {})
        drawn = [kind for kind in KIND_COLOURS if sums[kind] or targets.get(kind)]
        series = [Series(kind, steps, shares[kind], KIND_COLOURS[kind]) for kind in drawn]
        ends = [steps[0], steps[-1]]
        series += [
            Series(f"{kind}, target", ends, [targets[kind]] * 2, KIND_COLOURS[kind], style="dashed")
            for kind in drawn
            if kind in targets
        ]
        chart = line_chart(series, "step", "tokens so far", width=WIDTH, height=HEIGHT, percent=True)
        panels.append(f'<div class="panel"><h3>{_title(name)[0]}</h3>{legend(series)}{chart}</div>')
        for kind in drawn:
            gap = percent(abs(shares[kind][-1] - targets[kind])) if kind in targets else "–"
            target = percent(targets[kind]) if kind in targets else "–"
            rows.append([_title(name)[0], kind, target, percent(shares[kind][-1]), gap])
    if not rows:
        return NOT_RUN
    head = ["stage", "kind", "target share", "share of the tokens", "difference"]
    return f'<div class="panels">{"".join(panels)}</div>{table(head, rows)}'


def _speed(run: Path, logs: dict[str, list[dict[str, Any]]]) -> str:
    panels, rows, notes = [], [], []
    for name, log in logs.items():
        timed = [row for row in log if row.get("tokens_per_second")]
        if not timed:
            continue
        steps, rates = [row["step"] for row in timed], [row["tokens_per_second"] for row in timed]
        series = [Series("each step", steps, rates, "c1", style="faint"), Series("", steps, smooth(rates), "c1")]
        chart = line_chart(series, "step", "tokens/s", width=WIDTH, height=HEIGHT)
        panels.append(f'<div class="panel"><h3>{_title(name)[0]}</h3>{chart}</div>')
        shares = [median(row[key] for row in timed) if key in timed[0] else None for key in ("mfu", "stall_share")]
        longest = max(row.get("seconds", 0.0) for row in timed)
        rows.append(
            [_title(name)[0], f"{median(rates):,.0f}", *("–" if s is None else percent(s) for s in shares)]
            + [f"{median(row.get('seconds', 0.0) for row in timed):.2f} s", f"{longest:.2f} s"]
        )
        peak = findings.read_json(run / name / "peak.json")
        if peak:
            reached = f"{peak['peak_flops'] / 1e12:,.3g} TFLOP/s over {peak['processes']} processes"
            notes.append(f"{_title(name)[0]}: MFU is a share of {reached}, {escape(peak['peak_source'])}.")
    if not rows:
        return NOT_RUN
    head = ["stage", "tokens/s", "MFU", "waiting for data", "step", "longest step"]
    note = f'<p class="note">Medians over the steps. {" ".join(notes)}</p>'
    return f'<div class="panels">{"".join(panels)}</div>{table(head, rows)}{note}'


def _skipped(run: Path, logs: dict[str, list[dict[str, Any]]]) -> str:
    if not logs:
        return NOT_RUN
    steps = [
        [_title(name)[0], f"{row['step']:,}", escape(str(row.get("skipped") or "not finite"))]
        for name, log in logs.items()
        for row in log
        if row.get("skipped") or row.get("not_finite")
    ]
    reasons: Counter[tuple[str, str]] = Counter()
    for name in logs:
        for row in Quarantine(run / name / "quarantine.jsonl").rows():
            # Numbers and paths differ between samples with the same reason.
            reasons[name, re.sub(r"(/\S+|\d[\d,.]*)", "…", str(row.get("reason", row)))] += 1
    text = f"<p>Steps skipped because of a spike or a non-finite value: {len(steps) or 'none'}.</p>"
    text += table(["stage", "step", "why"], steps[:REASONS]) if steps else ""
    smaller = {name: findings.thinned(run / name / "metrics.jsonl") for name in logs}
    text += "".join(f"<p>{_title(name)[0]}: {sentence}.</p>" for name, sentence in smaller.items() if sentence)
    text += f"<p>Samples that could not be used: {sum(reasons.values()) or 'none'}.</p>"
    if reasons:
        rows = [[_title(name)[0], f"{count:,}", escape(why)] for (name, why), count in reasons.most_common(REASONS)]
        text += table(["stage", "samples", "why"], rows) + '<p class="note">Each is named in quarantine.jsonl.</p>'
    return text
