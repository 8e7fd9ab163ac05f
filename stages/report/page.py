"""One self-contained page about one run: its training, its post-training and, for the demo, the encoder's decisions.

`write(run)` reads only the run's own files. Any pre-training run has the sections of
`stages.report.training_sections`. The sections of the demo appear with the first of their files; those without a file
then say that they have not run yet:

    plans/<clip>.json, plans/<clip>/*.jpg     a VideoPlan and its frames at the size the model sees them
    evaluation/{annealing,annealing_<control>,gspo}.json
    {sft,mpo,gspo}/…                          see stages.report.post_training
    ablation/ablation.json                    rows of threshold, tokens, slow share, PSNR, SSIM, accuracy
    environment.json, recipe.toml, steps/*.json
"""

import base64
import json
import math
import tomllib
from html import escape
from pathlib import Path

from keye.errors import writing
from keye.evaluation import CONTROLS, Score
from keye.slowfast.plan import VideoPlan
from stages.report import findings, post_training
from stages.report import training_sections as training
from stages.report.charts import NOT_RUN, Series, legend, line_chart, percent, row_chart, table

FILMSTRIP_FRAMES = 60
STYLE = Path(__file__).with_name("report.css")


def write(run: str | Path) -> Path:
    """Write `<run>/report.html` and return its path; parts that have not run yet say so."""
    run = Path(run)
    sections = [
        ("What a video costs", _plans(run)),
        *training.sections(run),
        ("What it can see", _accuracy(run)),
        *post_training.sections(run),
        ("Ablation of the threshold", _ablation(run)),
        ("How it was run", _environment(run)),
    ]
    if not any((run / name).exists() for name in ("plans", "evaluation", "ablation")):
        sections = [(title, content) for title, content in sections if content != NOT_RUN]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(run.name)} · Keye-VL-1.5</title><style>{STYLE.read_text()}</style></head><body><main>"
        f'<header><p class="kicker">Keye-VL-1.5 · run</p><h1>{escape(run.name)}</h1>{_verdict(run)}</header>'
        f"{body}</main></body></html>"
    )
    path = run / "report.html"
    with writing(path, "the report"):
        path.write_text(page, encoding="utf-8")
    return path


def _verdict(run: Path) -> str:
    tiles = training.tiles(run)
    families = findings.families(run)
    if families:
        learnt = [f.family for f in families if f.learnt]
        text = "families above chance and the controls by more than 2 standard errors"
        tiles.append((f"{len(learnt)} of {len(families)}", text + (f": {', '.join(learnt)}" if learnt else "")))
    gained = findings.reward(run)
    if gained:
        text = f"held-out reward over GSPO, {gained.before:.3f} → {gained.after:.3f}"
        tiles.append((f"{gained.gain:+.3f}", f"{text} (standard error of the gain {gained.gain_stderr:.3f})"))
    seconds = sum(s.get("seconds", 0) for s in _steps(run).values())
    if seconds:
        tiles.append((f"{seconds / 60:.1f} min", "from the clips to this page"))
    cards = "".join(f"<div><b>{figure}</b><span>{escape(text)}</span></div>" for figure, text in tiles)
    return f'<div class="tiles">{cards}</div>'


def _plans(run: Path) -> str:
    plans = {p.stem: findings.read_json(p) for p in sorted((run / "plans").glob("*.json"))}
    if not plans:
        return NOT_RUN
    # All frames of one clip are shown: the one with the most even mix of slow and fast frames.
    fast_share = {name: sum(plan["frame_types"]) / max(len(plan["frame_types"]), 1) for name, plan in plans.items()}
    shown = min(plans, key=lambda name: abs(fast_share[name] - 0.5))
    intro = (
        "<p>A frame that looks like the latest slow frame becomes <b class='fast'>fast</b> and gets fewer tokens; "
        "any other becomes a new <b class='slow'>slow</b> frame. The pictures show the patches the model reads.</p>"
    )
    rows = []
    for name, plan in plans.items():
        made = VideoPlan.from_dict(plan)
        (slow, fast), (h, w), (fh, fw) = made.counts, made.slow_size, made.fast_size
        sizes = [f"{slow} × {h}×{w}", f"{fast} × {fh}×{fw}", f"{made.tokens:,}", percent(made.saved)]
        rows.append([escape(name), f"{made.duration:.1f} s", str(len(made)), *sizes])
    overview = table(["clip", "length", "frames", "slow", "fast", "tokens", "saved against all-slow"], rows)
    return intro + _filmstrip(run, shown, plans[shown]) + _similarity(plans[shown]) + overview


def _filmstrip(run: Path, name: str, plan: dict) -> str:
    pictures = sorted((run / "plans" / name).glob("*.jpg"))[:FILMSTRIP_FRAMES]
    figures = []
    for picture, kind, time in zip(pictures, plan["frame_types"], plan["timestamps"], strict=False):
        source = f"data:image/jpeg;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        word = "fast" if kind else "slow"
        caption = f"<figcaption>{time:.1f} s <b>{word}</b></figcaption>"
        figures.append(f'<figure class="{word}"><img alt="{word} frame" src="{source}">{caption}</figure>')
    return f'<div class="strip">{"".join(figures)}</div>' if figures else ""


def _similarity(plan: dict) -> str:
    times, types = plan["timestamps"], plan["frame_types"]
    similarity = [math.nan if s is None else s for s in plan["similarity"]]
    threshold = plan.get("settings", {}).get("threshold")
    series = [Series("similarity with the latest slow frame", times, similarity, "muted")]
    for kind, word in enumerate(("slow", "fast")):
        marks = [s if t == kind else math.nan for s, t in zip(similarity, types, strict=True)]
        series.append(Series(word, times, marks, word, style="marks"))
    if threshold is not None:
        ends = [times[0], times[-1]]
        series.append(Series(f"threshold {threshold:g}", ends, [threshold] * 2, "muted", style="dashed"))
    return legend(series) + line_chart(series, "seconds", "similarity", width=760)


def _accuracy(run: Path) -> str:
    rows = findings.families(run)
    if not rows:
        return NOT_RUN
    index = list(range(len(rows)))

    def measured(name: str, scores: list[Score | None], colour: str) -> Series:
        shares = [math.nan if score is None else score.accuracy for score in scores]
        return Series(name, index, shares, colour, [score.stderr if score else 0.0 for score in scores], "marks")

    controls = findings.measured_controls(rows)
    colours = dict(zip(controls, ("c2", "c3", "c4", "c5", "c6"), strict=False))
    series = [
        Series("chance", index, [r.before.chance for r in rows], "muted", style="line"),
        Series("majority answer", index, [r.before.majority for r in rows], "muted", style="dashed"),
        *(measured(name, [r.controls.get(name) for r in rows], colour) for name, colour in colours.items()),
        measured("after stage 3", [r.before for r in rows], "c0"),
        measured("after GSPO", [r.after for r in rows], "c1"),
    ]
    learnt, not_learnt = [r.family for r in rows if r.learnt], [r.family for r in rows if not r.learnt]
    text = "<p>Above chance and the controls by more than two standard errors after stage 3: "
    text += f"<b>{', '.join(learnt) or 'none'}</b>. "
    text += f"Not learnt in this run: <b>{', '.join(not_learnt)}</b>.</p>" if not_learnt else "All were learnt.</p>"
    figures = []
    for r in rows:
        scores = (*map(r.controls.get, controls), r.before, r.after)
        cells = [escape(r.family), str(r.before.n), percent(r.before.chance), percent(r.before.majority)]
        cells += ["–" if score is None else percent(score.accuracy, score.stderr) for score in scores]
        figures.append([*cells, "yes" if r.learnt else "no"])
    head = ["family", "questions", "chance", "majority", *controls, "after stage 3", "after GSPO", "learnt"]
    note = "Held-out clips of other seeds than the training clips; bars: one standard error. "
    note += "; ".join(f"{name}: {CONTROLS[name]}" for name in controls)
    note = f'<p class="note">{escape(note)}.</p>'
    return text + legend(series) + row_chart([r.family for r in rows], series) + table(head, figures) + note


def _ablation(run: Path) -> str:
    report = findings.read_json(run / "ablation" / "ablation.json")
    rows = report.get("rows", [])
    if not rows:
        return NOT_RUN
    rows = sorted(rows, key=lambda row: row["threshold"])
    x = [row["threshold"] for row in rows]
    panels = []
    for key, title, share in (
        ("tokens", "visual tokens a clip", False),
        ("slow_share", "share of slow frames", True),
        ("psnr", "detail kept, PSNR in dB", False),
        ("ssim", "detail kept, SSIM", False),
        ("accuracy", "accuracy of the trained model", True),
    ):
        y = [math.nan if row.get(key) is None else row[key] for row in rows]
        if all(math.isnan(v) for v in y):
            continue
        spread = [row.get(f"{key}_stderr") or 0.0 for row in rows]
        dots = Series(title, x, y, "c0", spread, "dots")
        chart = line_chart([dots], "threshold", title, width=420, height=210, percent=share)
        panels.append(f'<div class="panel"><h3>{title[0].upper()}{title[1:]}</h3>{chart}</div>')
    settings = report.get("settings", {})
    default = settings.get("default_threshold")
    note = (
        f"Measure {escape(str(settings.get('measure', '')))}"
        + (f", whose own threshold is {default:g}. " if default is not None else ". ")
        + "Detail compares the frames, as the model sees them, with the original frames at their own size; accuracy is "
        "that of the last model on held-out questions about videos, with the threshold changed at inference."
    )
    return f'<p class="note">{note}</p><div class="panels">{"".join(panels)}</div>'


def _environment(run: Path) -> str:
    steps = [[escape(name), f"{step['seconds']:.0f}"] for name, step in _steps(run).items() if "seconds" in step]
    timings = table(["step", "seconds"], steps) if steps else ""
    flat = []
    for key, value in findings.read_json(run / "environment.json").items():
        text = value if isinstance(value, str) else json.dumps(value)
        flat.append([escape(key), f"<code>{escape(text)}</code>"])
    recipe = run / "recipe.toml"
    text = recipe.read_text() if recipe.exists() else ""
    seeds = [["seed of " + escape(where), str(seed)] for where, seed in _seeds(tomllib.loads(text))] if text else []
    source = f"<details><summary>The recipe</summary><pre>{escape(text)}</pre></details>" if text else ""
    return (timings + (table(["environment", ""], flat + seeds, "facts") if flat or seeds else "") + source) or NOT_RUN


def _seeds(recipe: dict, where: str = "the recipe") -> list[tuple[str, int]]:
    found = []
    for key, value in recipe.items():
        if isinstance(value, dict):
            found += _seeds(value, key if where == "the recipe" else f"{where}.{key}")
        elif key == "seed" or key.endswith("_seed"):
            found.append((where if key == "seed" else f"{where}, {key}", value))
    return found


def _steps(run: Path) -> dict[str, dict]:
    steps = {p.stem: findings.read_json(p) for p in (run / "steps").glob("*.json")}
    return dict(sorted(steps.items(), key=lambda item: item[1].get("finished", 0)))
