"""Part h: the recipe `small` for some minutes: the four stages, then accuracy per family.

The run is that of `scripts/pretrain.py`, with fewer steps and clips than the recipe. Its world is drawn from the
recipe's seed. Where the time ends in a stage, the run saves and stops, and the same command continues. The model is
asked the world's held-out questions and the split heldout of SlowFastBench, which it was not trained for.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from keye.errors import KeyeError, run
from keye.evaluation import evaluate
from keye.evaluation.report import Report
from keye.inference.chat import load_model
from keye.world.slowfastbench import FAMILIES
from scripts.bench.common.record import ROOT, Claim, Table
from scripts.bench.gpu.journal import Journal, Values, parser
from scripts.bench.learn import Curriculum, Drawn

PART = "recipe"
RECIPE, SMALL_RECIPE = "stages/recipes/small.toml", "stages/recipes/tiny.toml"
STEPS = {"vision": 150, "alignment": 60, "multitask": 900, "annealing": 30}
SMALL_STEPS = {"vision": 1, "alignment": 1, "multitask": 2, "annealing": 1}
TRAINED = ("count", "order", "find", "read", "when", "motion")
STILLS = ("image_read", "image_ground", "image_place", "caption", "text")
CLIPS, SMALL_CLIPS = 500, 4  # of each family
RESERVED = 100.0  # seconds of the part that the evaluation needs
QUESTIONS, SMALL_QUESTIONS = 50, 1  # of each family
COLUMNS = ("questions", "family", "number", "accuracy %", "chance or majority %", "standard errors above")


def overrides(small: bool) -> list[str]:
    """The changes to the recipe."""
    clips = SMALL_CLIPS if small else CLIPS
    sets = [f"{stage}.steps={steps}" for stage, steps in (SMALL_STEPS if small else STEPS).items()]
    sets += [f"data.world.counts.{family}={clips}" for family in (*TRAINED, *STILLS)]
    held = 1 if small else QUESTIONS
    sets += [f"data.world.heldout.{family}={held}" for family in (*TRAINED, *STILLS) if family != "caption"]
    if small:
        sets += ["annealing.sequence_parallel=1", "annealing.context=2048"]
    return [word for override in sets for word in ("--set", override)]


def train(journal: Journal, folder: Path) -> Values:
    """Train to the end, or stop the run where the time ends.

    Raises:
        KeyeError: the run failed, or was stopped and continues when the part is called again.
    """
    small = journal.small
    command = [sys.executable, "scripts/pretrain.py", SMALL_RECIPE if small else RECIPE, "--out", str(folder)]
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, *overrides(small)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )  # fmt: skip
        try:
            code = process.wait(timeout=max(1.0, journal.limit - RESERVED - journal.spent) if not small else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # the stage saves after its step
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
            raise KeyeError("the time was up while the recipe trained; the same command continues") from None
    if code:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["no output"])[-1]
        raise KeyeError(f"the run of the recipe ended with code {code}: {last[:200]}")
    return {"seconds": time.monotonic() - began} | {stage: progress(folder / stage) for stage in STEPS}


def progress(stage: Path) -> Values:
    """Last loss, and the median rate of a stage's steps."""
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    rates = sorted(line["tokens_per_second"] for line in steps if "tokens_per_second" in line)
    return {
        "steps": len(steps), "first": steps[0]["loss"], "last": steps[-1]["loss"],
        "rate": rates[len(rates) // 2] if rates else None,
        "stalled": sum(line.get("stall_share", 0.0) for line in steps) / len(steps),
    }  # fmt: skip


def ask(journal: Journal, folder: Path, which: str) -> Values:
    """Accuracy per family of the last stage's model."""
    model, processor = load_model(folder / "annealing" / "model", str(journal.device))
    number = SMALL_QUESTIONS if journal.small else QUESTIONS
    if which == "SlowFastBench heldout":
        drawn = [family for family, row in FAMILIES.items() if not row.real]
        drawn = drawn[:2] if journal.small else drawn
        length, height = (4, 56) if journal.small else (12, 224)
        questions = Drawn(drawn, "heldout", number, Curriculum(0.0, 0, length, height))
    else:
        questions = folder / "world" / "heldout.jsonl"
    if isinstance(questions, Path):
        report = evaluate(model, processor, questions, limit=number, batch_size=32)
    else:
        report = evaluate(model, processor, questions, batch_size=32)
    return {"families": scores_of(report), "seconds": report.seconds}


def scores_of(report: Report) -> list[list[object]]:
    """Family, number, accuracy, baseline and distance in standard errors."""
    rows = {**report.families, "all": report.overall}
    return [[name, score.n, score.accuracy, score.baseline, score.above] for name, score in rows.items()]


def tables_of(journal: Journal) -> list[Table]:
    tables = []
    if trained := journal.found.get("training"):
        rows = [
            (
                stage, found["steps"], f"{found['first']:.3f}", f"{found['last']:.3f}",
                "–" if found["rate"] is None else f"{found['rate']:,.0f}", f"{found['stalled']:.0%}",
            )
            for stage, found in trained.items() if stage != "seconds"
        ]  # fmt: skip
        columns = ("stage", "steps", "first loss", "last loss", "tokens/s", "waiting for data")
        tables.append(Table(f"The stages, {trained['seconds']:.0f} s in the last call", columns, rows))
    rows = [
        (which, name, number, f"{100 * accuracy:.0f}", f"{100 * baseline:.0f}", f"{above:+.1f}")
        for which, found in journal.found.items()
        if which != "training"
        for name, number, accuracy, baseline, above in found["families"]
    ]
    return [*tables, Table("Accuracy of the last stage's model", COLUMNS, rows)]


def claims_of(journal: Journal) -> list[Claim]:
    found = journal.found.get("the world's held-out questions")
    if found is None:
        return []
    learnt = [name for name, _, _, _, above in found["families"] if above > 2 and name != "all"]
    figure = f"{len(learnt)} of {len(found['families']) - 1}: {', '.join(learnt) or 'none'}"
    return [Claim("families more than two standard errors above chance and majority", "–", figure)]


def main() -> int:
    made = parser(__doc__, PART)
    made.add_argument("--run", type=Path, help="folder of the run (.cache/bench/gpu_recipe)")
    args = made.parse_args()
    journal = Journal.open(args, PART)
    journal.tables = lambda: tables_of(journal)
    folder = args.run or ROOT / ".cache" / "bench" / ("gpu_recipe_small" if journal.small else "gpu_recipe")
    if args.again:
        shutil.rmtree(folder, ignore_errors=True)
    if journal.row("training", lambda: train(journal, folder)):
        for which in ("the world's held-out questions", "SlowFastBench heldout"):
            journal.row(which, lambda which=which: ask(journal, folder, which))
    changed = " ".join(overrides(journal.small))
    journal.save(claims_of(journal), [f"`scripts/pretrain.py {SMALL_RECIPE if journal.small else RECIPE} {changed}`."])
    return 0


if __name__ == "__main__":
    run(main)
