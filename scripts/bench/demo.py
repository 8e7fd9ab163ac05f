"""Write docs/results/demo.md from the files of a run of the demo; nothing is trained here.

Also copies the table (without paths) and the plot of the ablation, and the held-out rewards before and after GSPO.
"""

import argparse
import csv
import datetime
import json
import math
import shutil
import statistics
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keye.errors import KeyeError, run
from keye.evaluation import CONTROLS
from scripts.bench.common.record import RESULTS, ROOT, Table, machine, markdown
from stages.report import findings

EXAMPLES = """examples:
  bash scripts/demo && python scripts/bench/demo.py                 the run in runs/demo
  python scripts/bench/demo.py runs/other --commit 1a2b3c4          another run of another commit
"""
FAMILIES = {
    "read": "a digit on a card",
    "count": "flashes of one colour, 1–3",
    "order": "which colour first",
    "when": "second of a colour",
    "motion": "which way",
    "find": "a short flash in a long clip",
    "image_read": "a digit in a still",
    "image_ground": "a box",
    "image_place": "a corner",
    "text": "words alone",
}
STAGES = ("vision", "alignment", "multitask", "annealing")
COLUMNS = ("clip", "threshold", "frames", "tokens", "tokens_share", "slow_share", "psnr", "ssim")
CHOSEN_ON = (0, 1)  # seeds of the worlds that the settings were chosen on
TRIED = """## Tried while choosing

On the world of seed 0:

- Stage 0 is short and its learning rate low. The SigLIP loss with 64 pairs falls mostly through its bias. At a rate of
  1e-3, followed by an alignment at 2e-3, stage 0 made the start worse: a model trained on `order` and `find` alone
  reached 0.90 and 0.83 after 100 steps, and 0.98 and 1.00 from scratch (one run each).
- The new RoPE base loses what was learnt from positions: after 16 annealing steps at 5e-4 `when` (in its former form, a
  single flash) fell from 1.00 to 0.13 (30 questions); 30 steps at 1.5e-3 restore most of it.
- GSPO at 4e-4 with 32 questions a step and four families gained +0.044 ± 0.028 and lost `read` (98 → 70). Larger
  rollout batches at half the rate, and families that are kept so that they are not forgotten, solved both.

On the world of seed 1, which was reported before:

- With cards of random size (80–100 %) at any place of the frame, `read` reached 41.7 and `image_read` 55.0 after
  stage 3 (one run). Now the cards of `read` shrink about their centre, and those of `image_read` have one size again.
  With this choice, and no other change, the world of seed 1 gave six learnt families, and GSPO raised the held-out
  reward from 0.858 to 0.935. Because the choice was made after a result on seed 1, seed 2 is reported here: nothing was
  chosen on it.
- Until commit 5c30a86, `motion`, `image_ground` and `image_place` were at chance on all worlds, seed 2 among them, with
  six families learnt on seed 2. The position table of a new tower is larger since then (places.md), and stage 2
  begins with a lesson on places. With 160,000 tokens each of corners and boxes in the lesson, `image_place` and
  `image_ground` stayed at 27 and 12 % after stage 3; directly after a lesson of 330,000 and 250,000 tokens they were
  at 100 and 78 % (one run each, seed 1).

## Withdrawn

Results before 2026-11-28 claimed that `when` (100 %) and `count` (57 %) were learnt. A look-up of the answer by frame
types and seconds alone, without a pixel, reached 98 % and 60 % on those clips: the claim is withdrawn. Since then, in
`when` every half second has another colour, and in `count` the flashes of two objects always have the same total. The
column *zeroed* shows the value of frame types and seconds. [world.md](world.md) records what probes learn from the
plan, its similarities and the bytes of the files.

## In a clean clone

`bash scripts/demo` in a clean clone with an empty home and no environment (commit bcaba25, world of seed 1): 10.7
minutes after the installation, 16 with it, beside light other work. It gave the figures of the same world at commit
973f0a7, before names, wording and the data plane changed, to the last printed digit. The run above is of a working copy
with the environment installed, beside the tests of this project. Before the world was drawn as now (commit e7c27de,
seed 1), five of ten families were learnt and the held-out reward rose from 0.773 to 0.926."""


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    parser.add_argument("run", nargs="?", type=Path, default=ROOT / "runs" / "demo", help="default runs/demo")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default docs/results")
    parser.add_argument("--note", default="", help="a sentence about the run, written after its time")
    parser.add_argument("--commit", help="the commit the run was made at (default: this one)")
    args = parser.parse_args()
    if not (args.run / "evaluation" / "gspo.json").is_file():
        raise KeyeError(f"{args.run} is not a finished run of the demo; run `bash scripts/demo` or give another folder")
    commit = args.commit or subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=ROOT)
    lines = [*_head(args.run, commit.strip(), args.note), *_learnt(args.run), *_gspo(args.run), *_stages(args.run)]
    lines += [*_ablation(args.run), "", *TRIED.splitlines()]
    kept = args.out / "demo"
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.run / "ablation" / "ablation.png", kept / "ablation.png")
    shutil.copyfile(args.run / "gspo" / "eval.json", kept / "gspo_eval.json")
    with (kept / "ablation.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(_rows(args.run))
    (args.out / "demo.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written: {args.out / 'demo.md'}")


def _head(folder: Path, commit: str, note: str) -> list[str]:
    here, environment = machine(), _json(folder / "environment.json")
    steps = {path.stem: _json(path) for path in (folder / "steps").glob("*.json")}
    order = sorted(steps, key=lambda name: steps[name]["finished"])
    seconds = {name: steps[name]["seconds"] for name in order}
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    parts = ", ".join(f"{name} {seconds[name]:.0f} s" for name in seconds)
    date = _mtime(folder / "evaluation" / "gspo.json")
    return [
        "# The demo: what the tiny model learns",
        "",
        "Written by `python scripts/bench/demo.py` from a run of `scripts/demo.py`, which `bash scripts/demo` starts "
        f"after the installation. Commit `{commit}`, {date}.",
        "",
        f"- Machine: {here['cores']} cores of {here['cpu']} (shared), {here['ram_gb']} GB, no GPU; Python "
        f"{environment['python']}, {versions}.",
        seeds_of(folder),
        f"- Time after the installation: **{sum(seconds.values()) / 60:.1f} minutes** ({parts}). {note}".rstrip(),
    ]


def seeds_of(folder: Path) -> str:
    """The seeds of the run's recipe, and whether its settings were chosen on the same world."""
    recipe = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    world = recipe["data"]["world"]["seed"]
    chosen = " and ".join(map(str, CHOSEN_ON))
    same = ", this one among them" if world in CHOSEN_ON else ""
    return (
        f"- Seeds: recipes {recipe['seed']}, world {world}. The settings were chosen on the worlds of seeds "
        f'{chosen}{same} (section "Tried while choosing").'
    )


def _learnt(folder: Path) -> list[str]:
    families, rows = findings.families(folder), []
    controls = findings.measured_controls(families)
    for found in families:
        cells = [f"{found.family} ({FAMILIES[found.family]})", _percent(found.before.chance),
                 _percent(found.before.majority)]  # fmt: skip
        scores = (*map(found.controls.get, controls), found.before, found.after)
        cells += ["–" if score is None else _accuracy(score.accuracy, score.stderr) for score in scores]
        rows.append([*cells, _verdict(found)])
    columns = ["family", "chance", "majority", *controls, "after stage 3", "after GSPO", "learnt"]
    return [
        "",
        "## What the model learnt",
        "",
        f"{sum(found.before.n for found in families)} held-out questions, greedy answers, per cent ± one standard "
        f"error. The same model under controls: {'; '.join(f'*{name}*: {CONTROLS[name]}' for name in controls)}. "
        "*Learnt*: after stage 3 above chance and above blind, zeroed and (if measured) another clip by more than 2 "
        "standard errors (of the difference): "
        f"{sum(found.learnt for found in families)} of {len(rows)} families. A blind model may answer in another form: "
        "where the majority is higher than blind, compare with the majority.",
        "",
        *markdown(Table("Held-out accuracy", columns, rows)),
    ]


def _verdict(found: findings.FamilyFinding) -> str:
    score, controls = found.before, [control for control in found.compared if control]
    errors = [(score.accuracy - score.chance) / score.stderr]
    errors += [(score.accuracy - control.accuracy) / math.hypot(score.stderr, control.stderr) for control in controls]
    answer = ("yes" if controls else "yes, against chance alone") if found.learnt else "**no**"
    return f"{answer} ({min(errors):.1f} errors)"


def _gspo(folder: Path) -> list[str]:
    found, steps = _json(folder / "gspo" / "eval.json"), list(_lines(folder / "gspo" / "metrics.jsonl"))
    before, after = found["before"], found["after"]
    rows = []
    for title, key in (("mean reward (accuracy + 0.1 format)", "reward"), ("the same, greedy", "greedy")):
        gain = "gain" if key == "reward" else "greedy_gain"
        values = [f"{part[key + '_mean']:.3f} ± {part[key + '_stderr']:.3f}" for part in (before, after)]
        rows.append([title, *values, f"{found[gain]:+.3f} ± {found[gain + '_stderr']:.3f}"])
    lost = [
        f"{name} {100 * before['families'][name]['greedy_accuracy_mean']:.0f} → {100 * score:.0f}"
        for name, score in ((n, s["greedy_accuracy_mean"]) for n, s in after["families"].items())
        if score < before["families"][name]["greedy_accuracy_mean"] - 0.01
    ]
    return [
        "",
        "## GSPO",
        "",
        f"{len(steps)} steps; {found['questions']} held-out questions of the families it trains on, four answers each "
        "at temperature 1, the same questions before and after (`demo/gspo_eval.json`). "
        f"Families whose greedy accuracy fell: {', '.join(lost) or 'none'}.",
        "",
        *markdown(Table("Held-out reward", ["", "before", "after", "gain (paired)"], rows)),
    ]


def _stages(folder: Path) -> list[str]:
    rows = []
    for number, name in enumerate(STAGES):
        steps = list(_lines(folder / name / "metrics.jsonl"))
        tenth = max(1, len(steps) // 10)
        kinds = [sum(step.get(f"tokens_{kind}", 0) for step in steps) for kind in ("video", "image", "text")]
        first, last = (statistics.mean(step["loss"] for step in part) for part in (steps[:tenth], steps[-tenth:]))
        speed = statistics.median(step["tokens_per_second"] for step in steps)
        seconds, stalled = (sum(step[key] for step in steps) for key in ("seconds", "stall_seconds"))
        rows.append([
            f"{number} {name}", len(steps), f"{first:.3g} → {last:.3g}", f"{sum(kinds):,}", f"{speed:,.0f}",
            f"{seconds:.0f}", f"{100 * stalled / seconds:.1f} %",
            "/".join(f"{100 * count / sum(kinds):.1f}" for count in kinds),
        ])  # fmt: skip
    columns = [
        "stage", "steps", "loss, first → last tenth", "tokens", "tokens/s (median)", "seconds", "waiting for data",
        "video/image/text of the tokens",
    ]  # fmt: skip
    return ["", "## Stages", "", _recipe_shares(folder), "", *markdown(Table("Training", columns, rows))]


def _recipe_shares(folder: Path) -> str:
    mixture = _json(folder / "annealing" / "stage.json")["recipe"]["mixture"]
    shares = ", ".join(f"{name} {100 * share:g} %" for name, share in mixture.items())
    return f"Stage 3 wants {shares} of the tokens (report §pre-training)."


def _ablation(folder: Path) -> list[str]:
    rows, clips = [], _rows(folder)
    for found in _json(folder / "ablation" / "ablation.json")["rows"]:
        of = [clip for clip in clips if float(clip["threshold"]) == found["threshold"]]
        psnr, ssim, share, slow, tokens = (
            statistics.mean(float(clip[key]) for clip in of)
            for key in ("psnr", "ssim", "tokens_share", "slow_share", "tokens")
        )
        accuracy = _accuracy(found["accuracy"], found["accuracy_stderr"])
        rows.append([
            f"{found['threshold']:.2f}", f"{tokens:,.0f}", f"{100 * share:.0f} %", f"{100 * slow:.0f} %",
            f"{psnr:.1f}", f"{ssim:.3f}", accuracy,
        ])  # fmt: skip
    columns = ["threshold", "tokens a clip", "of all-slow", "slow frames", "PSNR, dB", "SSIM", "accuracy"]
    settings = _json(folder / "ablation" / "ablation.json")["settings"]
    return [
        "",
        "## The ablation the report does not have",
        "",
        f"{len({clip['clip'] for clip in clips})} real clips (`{settings['measure']}`, at most "
        f"{settings['max_tokens_per_frame']} tokens a frame), detail against the original frames; accuracy of the "
        "tuned model on held-out questions about videos.",
        "",
        *markdown(Table("The threshold from low to high", columns, rows)),
        "",
        "![Tokens, slow share, detail and accuracy over the threshold](demo/ablation.png)",
    ]


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "ablation" / "ablation.csv").open(newline="") as table:
        return list(csv.DictReader(table))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _mtime(path: Path) -> str:
    return f"{datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _accuracy(share: float, stderr: float) -> str:
    return f"{_percent(share)} ± {_percent(stderr)}"


if __name__ == "__main__":
    run(main)
