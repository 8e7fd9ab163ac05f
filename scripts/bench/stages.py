"""What the stages claim, measured part by part; docs/results/stages.md is written from what the parts leave.

Every part is a script beside this one (stages_<part>.py, and kills.py) and can be run again alone. `--part` without a
name only writes the document.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from keye.errors import run  # noqa: E402
from scripts.bench.record import RESULTS, arguments, document, out_of, run_parts  # noqa: E402
from scripts.bench.stages_curves import draw_curves  # noqa: E402

SCRIPTS = {
    "packing": "stages_packing",
    "balance": "stages_balance",
    "context": "stages_context",
    "extension": "stages_extension",
    "trainer": "stages_trainer",
    "cost": "stages_cost",
    "compile": "stages_compile",
    "simulation": "stages_simulation",
    "kills": "kills",
}
PARTS, GPU = tuple(SCRIPTS), "gpu"
EXAMPLES = """examples:
  python scripts/bench/stages.py                    all parts that need no GPU; hours, on a machine left alone
  python scripts/bench/stages.py --part kills       one of them
  python scripts/bench/stages.py --part             only the document, from what was measured before
  python scripts/bench/stages.py --quick            a fraction of every part, into .cache: shows that it runs
  python scripts/bench/stages.py --gpu              steps at 8B widths, on a machine with a GPU; ten minutes at most
  python scripts/bench/stages.py --gpu --small --device cpu
"""
HEAD = """# The stages, measured

All of it again: `python scripts/bench/stages.py`; one part: `--part NAME`; on a machine with a GPU: `--gpu`. Without a
GPU the part `gpu` stays as it was measured, or is named below as not measured: seconds, MFU and the longest context of
a step at 8B widths cannot be had elsewhere."""


def main() -> int:
    parser = arguments(__doc__, EXAMPLES, results="stages")
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--gpu", action="store_true", help="the part that needs a GPU, and only that")
    parser.add_argument("--small", action="store_true", help="with --gpu: small shapes, which prove nothing")
    parser.add_argument("--device", default="cuda", help="with --gpu: cuda, or cpu with --small")
    args = parser.parse_args()
    args.quick |= args.gpu and args.small
    out = out_of(args).resolve()
    options = ["--out", str(out)]
    if args.gpu:
        options += ["--device", args.device, *(["--small"] if args.small else [])]
    elif args.quick:
        options.append("--quick")
    chosen = {GPU: "stages_gpu"} if args.gpu else {part: SCRIPTS[part] for part in args.part}
    failed = run_parts(chosen, options)
    path = out.parent / "stages.md" if out == RESULTS / "stages" else out / "stages.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent != out:
        draw_curves(out)
    path.write_text(document(out, (*PARTS, GPU), HEAD), encoding="utf-8")
    print(f"\nwritten: {path}")
    if failed:
        again = "--gpu" if args.gpu else f"--part {' '.join(failed)}"
        print(f"error: {', '.join(failed)} failed, see above; run again with {again}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
