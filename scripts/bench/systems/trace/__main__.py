"""Is a trace right? Knock-outs against frames known to hold the answer, coherence against errors, a planted shortcut.

Three measurements: held-out questions of a trained model (and of an untrained one, as a control); the same model
fine-tuned on questions whose words give the answer away in 0, 50 and 90 % of the cases; five ambiguous prompts on
SmolLM2-135M. About 25 CPU minutes on one core. What is finished is kept in .cache/bench/systems, so that a repeated
command continues; what is missing is said in the results.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from keye.errors import KeyeError, run
from keye.files import write_atomically
from scripts.bench.common.record import ROOT, arguments, forget_other_code, out_of, save
from scripts.bench.systems.trace import prompts, report
from scripts.bench.systems.trace.grading import FAMILIES, grade
from scripts.bench.systems.trace.shortcut import RATE, ROWS, SEEDS, SHARES, STEPS, shortcut

EXAMPLES = """examples:
  python -m scripts.bench.systems.trace --run runs/demo                a run of scripts/demo; continues what was stopped
  python -m scripts.bench.systems.trace --run runs/demo --only trained prompts      some of it; a later call continues
  python -m scripts.bench.systems.trace --run runs/demo --quick        shows that it runs, without SmolLM2
"""
SCRATCH = ROOT / ".cache" / "bench" / "systems"
Advance = Callable[[], object]
Unit = tuple[int, Callable[[Advance], list[dict[str, Any]]]]
"""Steps of progress, and what makes the rows."""


def units_of(start: Path, scratch: Path, quick: bool) -> dict[str, Unit]:
    """Every part of the study by its name."""
    limit, steps, seeds, shares = (2, 1, SEEDS[:1], SHARES[-1:]) if quick else (None, STEPS, SEEDS, SHARES)
    questions = sum(json.loads(line)["family"] in FAMILIES for line in (start / "world/heldout.jsonl").open())
    asked = 2 * len(FAMILIES) if quick else questions
    found: dict[str, Unit] = {} if quick else {"prompts": (len(prompts.CASES), prompts.measure_all)}
    for name in ("trained", "untrained"):
        found[name] = asked, lambda advance, name=name: grade(start, name == "trained", limit, advance)
    for seed in seeds:
        for share in shares:
            found[f"shortcut-{share:g}-{seed}"] = (
                steps + asked // 3,
                lambda advance, share=share, seed=seed: shortcut(start, scratch, share, seed, steps, limit, advance),
            )
    return found


def measured(units: dict[str, Unit], scratch: Path, only: list[str]) -> dict[str, dict[str, Any]]:
    """The results of all units that are finished; those whose names begin with one of `only` are measured first."""
    todo = {
        name: unit
        for name, unit in units.items()
        if any(name.startswith(start) for start in only) and not (scratch / f"{name}.json").exists()
    }
    with Progress(transient=True) as progress:
        bar = progress.add_task("trace", total=sum(steps for steps, _ in todo.values()))
        for name, (_, make) in todo.items():
            began = time.process_time()
            rows = make(lambda: progress.advance(bar))
            seconds = time.process_time() - began
            write_atomically(scratch / f"{name}.json", json.dumps({"rows": rows, "seconds": seconds}))
            progress.console.print(f"{name}: {seconds:.0f} s", highlight=False)
    paths = {name: scratch / f"{name}.json" for name in units}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def planted_of(found: dict[str, dict[str, Any]]) -> dict[tuple[float, int], list[dict[str, Any]]]:
    """(share, seed) → rows of the finished fine-tunings, by share."""
    keys = {(float(name.split("-")[1]), int(name.split("-")[2])): name for name in found if name.startswith("shortcut")}
    return {key: found[name]["rows"] for key, name in sorted(keys.items())}


def main() -> None:
    parser = arguments(__doc__, EXAMPLES, results="systems")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a run with annealing/model and world")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="NAME",
        help="measure now: prompts, trained, untrained, shortcut-0.9 …",
    )
    args = parser.parse_args()
    weights = args.run / "annealing/model/model.safetensors"
    if not (weights.is_file() and (args.run / "world/heldout.jsonl").is_file()):
        raise KeyeError(f"{args.run} has no annealing/model with world: give a run of scripts/demo with --run")
    torch.set_num_threads(1)
    name = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]  # measurements are of one model
    scratch = SCRATCH / ("trace_quick" if args.quick else f"trace/{name}")
    if args.quick:
        shutil.rmtree(scratch, ignore_errors=True)
    forget_other_code(scratch, ("keye/evaluation/trace",))
    units = units_of(args.run, scratch, args.quick)
    found = measured(units, scratch, args.only)
    if not found:
        raise KeyeError(f"nothing of {' '.join(args.only)} can be measured; the names are {', '.join(units)}")
    rows = {name: found.get(name, {"rows": []})["rows"] for name in ("trained", "untrained", "prompts")}
    planted = planted_of(found)
    tables = [report.hits(rows[kind], f"{kind} model") for kind in ("trained", "untrained") if rows[kind]]
    tables += (
        [report.slow_shares(rows["trained"]), report.correlation_table(rows["trained"])] if rows["trained"] else []
    )
    tables += [report.shortcut_table(planted)] if planted else []
    tables += [report.prompt_table(rows["prompts"])] if rows["prompts"] else []
    notes = [*NOTES, f"Fine-tuning: {1 if args.quick else STEPS} steps of {ROWS} questions at {RATE:g}, vision tower "
             "and projector frozen."]  # fmt: skip
    notes += [report.first_frames(rows[kind], kind) for kind in ("trained", "untrained") if rows[kind]]
    if missing := [name for name in units if name not in found]:
        notes.append(f"Not measured yet: {', '.join(missing)}.")
    save(
        out_of(args), "trace", report.claims(rows["trained"], rows["untrained"], planted, rows["prompts"]), tables,
        seconds=sum(part["seconds"] for part in found.values()), quick=args.quick,
        seeds={"fine-tuning": ", ".join(map(str, sorted({seed for _, seed in planted}))), "untrained model": 0},
        notes=notes,
    )  # fmt: skip


NOTES = (
    "The duration is CPU time. Intervals are by bootstrap over questions of one trained model; they do not contain the "
    "variation of another training of it. Answers of several runs to one question are drawn together.",
    "A frame shows the answer if it is taken during an event of the question (of \"count\": of the asked colour). A "
    "motion is in all frames, so it is not graded. With ties of the strongest frame a hit is the expected value of a "
    "random choice. \"Most tokens\" takes a frame of the largest size, which are slow frames; \"direct\" hides the "
    "frame from the answer's own tokens only. The traced answer is the model's own, right or wrong.",
    "Shares of the effect are of log-probabilities that all slow and all fast frames give the answer, each above 0; "
    "questions with no such effect, or frames of one kind only, are left out.",
    "CAS knows the right option, as the published word lists do; \"cas of the reply\" does not; both need options, "
    "so not \"read\" and \"when\". DSS has pathways from each frame to the last token, right ones from frames "
    "that show the answer. All are means over blocks. The published figure is over other models and data, and of "
    "rates, not of single answers: correlations of ten groups are larger because grouping removes noise. Families "
    "differ in both accuracy and score; the column within families removes that.",
    "A trace names the sentence if its effect is larger than that of all visual tokens. The sentence is part of the "
    "question in all runs, with 0 % planted too, where it says nothing about the answer. "
    "It has far fewer tokens than the frames, so attention never names it by that rule; AUC, the "
    "probability that the margin of a followed answer is above that of another answer of the "
    "same run, needs no threshold.",
    "The sentences of the five prompts are ours; the topics are the paper's. \"Handed over\" needs a prompt whose "
    "intended reading wins and a counterfactual whose competing reading wins; – otherwise, and where the last token's "
    "state never restores the reading. \"By cut\" and \"by lens\" are of the first token of the continuation.",
)  # fmt: skip

if __name__ == "__main__":
    run(main)
