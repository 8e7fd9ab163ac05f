"""Runs what needs a GPU: eight parts, the most valuable first, each under eight minutes on an H200.

Each part is a process of its own. It writes every row as it is measured, so that a part that is killed or runs out of
time leaves what it has, and the same command continues. A part that fails leaves its reason in its record, and the next
part runs. The parts need torch, transformers and triton; d to h also av, d, e, g and h also
deepspeed, h also datasets.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from keye.errors import KeyeError, run
from keye.files import write_atomically
from scripts.bench.common.record import RESULTS, ROOT, Table, arguments, document, save
from scripts.bench.gpu.journal import LIMIT, PLANS, QUICK, say
from scripts.bench.groups import GROUPS

PARTS = {
    "a": "cuda_tests",
    "b": "attention",
    "c": "layers",
    "d": "training",
    "e": "context",
    "f": "encoder",
    "g": "gspo",
    "h": "recipe",
}
GRACE = 60.0  # seconds that a part has after its limit, for the row that it is measuring
EXAMPLES = """examples:
  python -m scripts.bench.gpu                                all parts on a machine with a GPU; about an hour
  python -m scripts.bench.gpu --part b c                     two parts; the same command continues where it ended
  python -m scripts.bench.gpu --part a --small --device cpu  the same code on small shapes, anywhere
  python -m scripts.bench.gpu --part                         only the document, from existing results
  python -m scripts.bench.gpu.parts.attention --help         the options of one part
  python -m scripts.bench.gpu.parts.estimates                what keye cost expects of d, e and g
  python -m scripts.bench.gpu.pack --out gpu.tar             an archive for a machine without a network
"""


def run_part(name: str, options: list[str], out: Path, seconds: float) -> bool:
    """Run a part in a process of its own; a failure is recorded. Returns whether it succeeded."""
    command = [sys.executable, "-m", f"scripts.bench.gpu.parts.{name}", "--out", str(out), *options]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    reason = ""
    try:
        code = process.wait(timeout=seconds)
        reason = f"its process ended with code {code}; its output says why" if code else ""
    except subprocess.TimeoutExpired:
        reason = f"it was stopped after {seconds:.0f} s; the same command continues"
    finally:
        if process.poll() is None:
            stop(process)
    if reason:
        say(f"{name}: {reason}")
        record_failure(name, options, out, reason)
    return not reason


def stop(process: subprocess.Popen) -> None:
    """End a part and the processes that it has started, first politely."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def record_failure(name: str, options: list[str], out: Path, reason: str) -> None:
    """Add the reason to the part's record, or write a record that has nothing else."""
    path = out / f"{name}.json"
    sentence = f"Incomplete: {reason}."
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if sentence not in kept["notes"]:
            kept["notes"].insert(0, sentence)
            write_atomically(path, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    else:
        table = Table("Failed or not measured", ("row", "reason"), [("the complete part", f"failed: {reason}")])
        save(out, name, [], [table], seconds=0, quick="--small" in options, notes=[sentence])


def main() -> int:
    parser: argparse.ArgumentParser = arguments(__doc__, EXAMPLES, results="gpu")
    parser.prog = "python -m scripts.bench.gpu"
    letters = ", ".join(f"{letter} {name}" for letter, name in PARTS.items())
    parser.add_argument("--part", nargs="*", metavar="PART", help=f"{letters}; without a name, only the document")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --small")
    parser.add_argument("--small", action="store_true", help="small shapes: shows that it runs, proves nothing")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds of a part ({LIMIT:.0f})")
    parser.add_argument("--plans", type=Path, default=PLANS, help="folder of decoded plans (.cache/bench/gpu_plans)")
    parser.add_argument("--again", action="store_true", help="measure all rows again")
    args = parser.parse_args()
    if args.quick:
        args.small, args.device = True, "cpu"
    names = [PARTS.get(part, part) for part in (PARTS if args.part is None else args.part)]
    if unknown := sorted(set(names) - set(PARTS.values())):
        raise KeyeError(f"--part {unknown[0]} is not a part; choose among {letters}")
    out = (args.out or (QUICK if args.small else RESULTS / "gpu")).resolve()
    options = ["--device", args.device]
    options += ["--limit", str(args.limit)] if args.limit != LIMIT else []
    options += ["--plans", str(args.plans.resolve())] if args.plans != PLANS else []
    options += [f"--{flag}" for flag in ("small", "again") if getattr(args, flag)]
    failed = []
    for number, name in enumerate(names, 1):
        began = time.monotonic()
        say(f"\n[{number}/{len(names)}] {name}; at most {(args.limit + GRACE) / 60:.0f} minutes")
        if not run_part(name, options, out, args.limit + GRACE):
            failed.append(name)
        say(f"      {time.monotonic() - began:.0f} s")
    path = write_document(out)
    say(f"\nwritten: {path}")
    if failed:
        say(f"error: {', '.join(failed)} failed, see above; run again with --part {' '.join(failed)}")
    return 1 if failed else 0


def write_document(out: Path) -> Path:
    """The document of all parts' records, beside the folder in docs/results or in the folder itself."""
    group = GROUPS["gpu"]
    path = (out.parent if out == RESULTS / "gpu" else out) / "gpu.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document(out, group.order, group.head), encoding="utf-8")
    return path


if __name__ == "__main__":
    run(main)
