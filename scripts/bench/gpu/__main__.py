"""Runs what needs a GPU: eight parts, the most valuable first, each under eight minutes on an H200.

Each part is a process of its own. It writes every row as it is measured, so that a part that is killed or runs out of
time leaves what it has, and the same command continues. A part that fails leaves its reason in its record, and the next
part runs. The parts need torch, transformers and triton; d to h also av; d, e, g and h also deepspeed; h also datasets.
"""

import argparse
import time
from pathlib import Path

from keye.errors import KeyeError, run
from scripts.bench.common.record import RESULTS, arguments, document
from scripts.bench.gpu.journal import LIMIT, PLANS, QUICK, check_device, say
from scripts.bench.gpu.runner import Call, alone, ended_in_order, open_rows
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
EXAMPLES = """examples:
  python -m scripts.bench.gpu                                all parts on a machine with a GPU; about an hour
  python -m scripts.bench.gpu --part b c                     two parts; the same command continues where it ended
  python -m scripts.bench.gpu --within 570                   what ten minutes suffice for; the same command continues
  python -m scripts.bench.gpu --part a --small --device cpu  the same code on small shapes, anywhere
  python -m scripts.bench.gpu --part                         only the document, from existing results
  python -m scripts.bench.gpu.parts.attention --help         the options of one part
  python -m scripts.bench.gpu.parts.estimates                what keye cost expects of d, e and g
  python -m scripts.bench.gpu.pack --out gpu.tar             an archive for a machine without a network
"""


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
    parser.add_argument(
        "--within", type=float, metavar="SECONDS", help="time of the complete call; what it leaves, the next one does"
    )
    parser.add_argument("--since", type=float, metavar="SECONDS", help="when --within began, since 1970 (now)")
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="a .tar of all results, kept up to date")
    args = parser.parse_args()
    if args.quick:
        args.small, args.device = True, "cpu"
    names = [PARTS.get(part, part) for part in (PARTS if args.part is None else args.part)]
    if unknown := sorted(set(names) - set(PARTS.values())):
        raise KeyeError(f"--part {unknown[0]} is not a part; choose among {letters}")
    if names:
        check_device(args.device, args.small, "the bench")
    out = (args.out or (QUICK if args.small else RESULTS / "gpu")).resolve()
    bundle = args.bundle and args.bundle.resolve()
    options = ["--device", args.device]
    options += ["--plans", str(args.plans.resolve())] if args.plans != PLANS else []
    options += [f"--{flag}" for flag in ("small", "again") if getattr(args, flag)]
    with alone(out) as lock, ended_in_order():
        call = Call(out, args.limit, args.within, args.since or time.time(), bundle, lock)
        failed, left = run_parts(call, names, options)
        path = write_document(out)
        call.write_bundle()
    say(f"\nwritten: {path}")
    for name in names:
        if name not in left and (rows := open_rows(out, name)):
            say(f"{name}: {len(rows)} rows failed or not measured: {', '.join(rows)}"[:300])
    if left:
        say(f"no time was left for {', '.join(left)}: the same command continues")
    if failed:
        say(f"error: {', '.join(failed)} failed, see above; run again with --part {' '.join(failed)}")
    return 1 if failed or left else 0


def run_parts(call: Call, names: list[str], options: list[str]) -> tuple[list[str], list[str]]:
    """Run the parts one after the other; returns those that failed, and those that no time was left for."""
    failed = []
    for number, name in enumerate(names, 1):
        if not call.has_time():
            return failed, names[number - 1 :]
        began = time.monotonic()
        say(f"\n[{number}/{len(names)}] {name}; at most {call.times()[1] / 60:.1f} minutes")
        if call.run(name, options):
            failed.append(name)
        say(f"      {time.monotonic() - began:.0f} s")
    return failed, []


def write_document(out: Path) -> Path:
    """The document of all parts' records, beside the folder in docs/results or in the folder itself."""
    group = GROUPS["gpu"]
    path = (out.parent if out == RESULTS / "gpu" else out) / "gpu.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document(out, group.order, group.head), encoding="utf-8")
    return path


if __name__ == "__main__":
    run(main)
