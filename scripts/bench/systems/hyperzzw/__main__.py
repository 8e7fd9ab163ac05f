"""HyperZ·Z·W: cost against attention, pixel-level classification, Kar3, the slow neural loss, and the tiny model.

About 45 CPU minutes on one core. Every run is kept in .cache/bench/systems, so a repeated command continues; what is
missing when it is interrupted is said in the results (`--report` writes them from the runs there are).
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from keye.errors import run
from keye.files import write_atomically
from scripts.bench.common.record import ROOT, arguments, forget_other_code, out_of, save
from scripts.bench.systems.hyperzzw import report
from scripts.bench.systems.hyperzzw.classify import DEV_SEED, chosen_rate, correct, digits, parameters, stills, trained
from scripts.bench.systems.hyperzzw.curve import measured
from scripts.bench.systems.hyperzzw.towers import ARMS, run_of

EXAMPLES = """examples:
  python -m scripts.bench.systems.hyperzzw             everything that is not measured yet
  python -m scripts.bench.systems.hyperzzw --only net  some of the runs
  python -m scripts.bench.systems.hyperzzw --report    only the results, from the runs there are
  python -m scripts.bench.systems.hyperzzw --quick     a smoke test
"""
SEEDS = (0, 1, 2)
MEASURING = tuple(f"scripts/bench/systems/hyperzzw/{name}.py" for name in ("curve", "classify", "towers"))
Task = tuple[str, Callable[[], dict[str, Any]]]


def curve_tasks(quick: bool) -> list[Task]:
    """One for each side of a frame in patches."""
    sides = (4, 8) if quick else (8, 16, 32, 48, 64, 96)
    return [(f"curve-{side}", lambda side=side: measured(side, 2 if quick else 15)) for side in sides]


def rate_tasks(steps: int) -> list[Task]:
    """The choice of learning rates, on digits that no result reads."""
    pairs = ("ours", "AdamW"), ("ours", "Kar3"), ("released", "AdamW"), ("residual", "AdamW")
    return [
        (f"rate-{kind}-{name}", lambda kind=kind, name=name: chosen_rate(kind, digits(), name, steps))
        for kind, name in pairs
    ]


def net_tasks(scratch: Path, steps: int, seeds: tuple[int, ...]) -> list[Task]:
    """Every net on digits, ours and the residual one on stills."""
    arms = (
        ("digits", "ours", "AdamW", False), ("digits", "residual", "AdamW", False), ("stills", "ours", "AdamW", False),
        ("stills", "residual", "AdamW", False), ("digits", "ours", "Kar3", False), ("digits", "ours", "AdamW", True),
        ("digits", "released", "AdamW", False),
    )  # fmt: skip

    def one(data: str, kind: str, optimizer: str, slow_loss: bool, seed: int) -> dict[str, Any]:
        images = digits() if data == "digits" else stills()
        rate = json.loads((scratch / f"rate-{kind}-{optimizer}.json").read_text())["rate"]
        net, seconds = trained(kind, images, optimizer, rate, seed, steps, slow_loss)
        found = {"right": correct(net, images.test), "seconds": seconds, "parameters": parameters(net), "rate": rate}
        if data == "digits" and not slow_loss and optimizer == "AdamW":
            found["alone"] = correct(net, images.test, 1)
        if data == "stills":
            found["larger"] = correct(net, stills(24, 20).test)
        return found

    return [
        (f"net-{data}-{kind}-{name}{'-slow' if slow else ''}-{seed}",
         lambda data=data, kind=kind, name=name, slow=slow, seed=seed: one(data, kind, name, slow, seed))
        for seed in seeds for data, kind, name, slow in arms
    ]  # fmt: skip


def tower_tasks(marks: tuple[int, ...], questions: int, seeds: tuple[int, ...]) -> list[Task]:
    """The tiny model with each mixer, and with a convolution beside attention, evaluated after `marks` steps."""
    return [
        (f"tower-{arm}-{seed}", lambda arm=arm, seed=seed: run_of(arm, seed, marks, questions))
        for seed in seeds for arm in ARMS
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, EXAMPLES, results="systems")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the results of what is measured")
    parser.add_argument("--only", choices=("curve", "rate", "tower", "net"), nargs="+", help="measure only these runs")
    args = parser.parse_args()
    out = out_of(args)
    scratch = ROOT / ".cache" / "bench" / "systems" / ("hyperzzw_quick" if args.quick else "hyperzzw")
    if not args.report:
        forget_other_code(scratch, ("keye/hyperzzw", *MEASURING))
    torch.set_num_threads(1)
    steps, marks, questions = (2, (1, 2), 2) if args.quick else (80, (70, 140, 280), 100)
    seeds = SEEDS[:1] if args.quick else SEEDS
    tasks = [
        *curve_tasks(args.quick), *rate_tasks(steps), *tower_tasks(marks, questions, seeds),
        *net_tasks(scratch, steps, seeds),
    ]  # fmt: skip
    with Progress(transient=True) as progress:
        bar = progress.add_task("hyperzzw", total=len(tasks))
        for name, task in tasks:
            path = scratch / f"{name}.json"
            wanted = not args.report and (not args.only or name.split("-")[0] in args.only)
            if wanted and not path.exists():
                progress.console.print(name, highlight=False)
                began = time.process_time()
                found = task()
                write_atomically(path, json.dumps(found | {"cpu": time.process_time() - began}))
            progress.advance(bar)
    paths = {name: scratch / f"{name}.json" for name, _ in tasks}
    runs = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    claims, tables, notes = report.written(runs, [name for name, _ in tasks], steps)
    if args.report:
        notes.append("`--report` writes the results of runs that the command without it measured.")
    seconds = sum(found["cpu"] for found in runs.values())
    seeds_of = {"runs": ", ".join(map(str, seeds)), "choice of learning rates": DEV_SEED, "world": 0}
    save(out, "hyperzzw", claims, tables, seconds=seconds, quick=args.quick, seeds=seeds_of, notes=notes)


if __name__ == "__main__":
    run(main)
