"""What the stages claim, measured part by part; docs/results/stages.md is written from what the parts leave.

Every part is a script beside this one and can be run again alone. `--part` without a name only writes the document.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from keye.errors import run  # noqa: E402
from scripts.bench.record import RESULTS, arguments, document, out_of, run_parts  # noqa: E402

PARTS = ("kills",)
EXAMPLES = """examples:
  python scripts/bench/stages.py                    all parts
  python scripts/bench/stages.py --part kills       one of them
  python scripts/bench/stages.py --part             only the document, from what was measured before
"""
HEAD = """# The stages, measured

All of it again: `python scripts/bench/stages.py`; one part: `--part NAME`."""


def main() -> int:
    parser = arguments(__doc__, EXAMPLES, results="stages")
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    args = parser.parse_args()
    out = out_of(args).resolve()
    options = ["--out", str(out), *(["--quick"] if args.quick else [])]
    failed = run_parts({part: part for part in args.part}, options)
    path = out.parent / "stages.md" if out == RESULTS / "stages" else out / "stages.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document(out, PARTS, HEAD), encoding="utf-8")
    print(f"\nwritten: {path}")
    if failed:
        again = f"run again with --part {' '.join(failed)}"
        print(f"error: {', '.join(failed)} failed, see above; {again}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
