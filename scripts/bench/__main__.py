"""Measures the claims of this project and writes docs/results/<group>.md.

Each part is a module that writes a JSON file to docs/results/<group>. The document is generated from these files, so a
single part can be repeated. scripts/bench/README.md describes the parts.
"""

import argparse
import sys

from keye.errors import run
from scripts.bench.common.record import RESULTS, arguments, document, out_of, run_parts
from scripts.bench.groups import GROUPS

EXAMPLES = """examples:
  python -m scripts.bench encoder                      all parts; about an hour on an idle machine
  python -m scripts.bench encoder --part plan pixels   some parts
  python -m scripts.bench stages --part                only the document, from existing results
  python -m scripts.bench model --quick                a smoke test of every part, into .cache
  python -m scripts.bench.gpu --help                   what needs a GPU
  python -m scripts.bench.encoder.identity --help      the options of one part
"""


def main() -> int:
    parser: argparse.ArgumentParser = arguments(__doc__, EXAMPLES, results="<group>")
    parser.prog = "python -m scripts.bench"
    parser.add_argument("group", choices=GROUPS, help="what is measured")
    parser.add_argument("--part", nargs="*", metavar="PART", help="some parts; without a name, only the document")
    args = parser.parse_args()
    group = GROUPS[args.group]
    args.results = group.name
    parts = group.parts if args.part is None else args.part
    if unknown := set(parts) - set(group.parts):
        parser.error(f"{group.name} has no part {', '.join(sorted(unknown))}; its parts are {', '.join(group.parts)}")
    out = out_of(args).resolve()
    options = ["--out", str(out)]
    if args.quick:
        options.append("--quick")
    failed = run_parts({part: group.module(part) for part in parts}, options)
    published = out == RESULTS / group.name
    path = (out.parent if published else out) / f"{group.name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    if published:
        group.draw(out)
    path.write_text(document(out, group.order, group.head), encoding="utf-8")
    print(f"\nwritten: {path}")
    if failed:
        again = f"--part {' '.join(failed)}"
        print(f"error: {', '.join(failed)} failed, see above; run again with {again}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
