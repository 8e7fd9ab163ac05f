"""All that the slow-fast encoder claims, measured: every part in turn, then docs/results/encoder.md.

Each part is a script of its own and leaves a JSON file; the document is written from these files, so a part can be run
again alone. `--part` without a name only writes the document. See README.md beside this file.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from keye.errors import run  # noqa: E402
from scripts.bench.record import OUT, arguments, document, out_of, run_parts  # noqa: E402

PARTS = ("identity", "scoring", "plan", "memory", "pixels", "recall", "budget", "decoding", "fuzz")
EXAMPLES = """examples:
  python scripts/bench/encoder.py                     everything; about an hour, on a machine that does nothing else
  python scripts/bench/encoder.py --part plan pixels  some parts
  python scripts/bench/encoder.py --part              only the document, from what was measured before
  python scripts/bench/encoder.py --quick             a fraction of every part, into .cache: shows that it runs
"""


def main() -> int:
    parser: argparse.ArgumentParser = arguments(__doc__, EXAMPLES)
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    args = parser.parse_args()
    out = out_of(args)
    options = ["--out", str(out), *(["--quick"] if args.quick else [])]
    failed = run_parts({part: part for part in args.part}, options)
    path = out.parent / "encoder.md" if out == OUT else out / "encoder.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document(out, PARTS), encoding="utf-8")
    print(f"\nwritten: {path}")
    if failed:
        print(
            f"error: {', '.join(failed)} failed, see above; run again with --part {' '.join(failed)}", file=sys.stderr
        )
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
