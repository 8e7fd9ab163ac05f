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
  python -m scripts.bench stages --gpu                 the part that needs a GPU; ten minutes at most
  python -m scripts.bench model --gpu --small --device cpu
  python -m scripts.bench.encoder.identity --help      the options of one part
"""


def main() -> int:
    parser: argparse.ArgumentParser = arguments(__doc__, EXAMPLES, results="<group>")
    parser.prog = "python -m scripts.bench"
    parser.add_argument("group", choices=GROUPS, help="what is measured")
    parser.add_argument("--part", nargs="*", metavar="PART", help="some parts; without a name, only the document")
    parser.add_argument("--gpu", action="store_true", help="only the part that needs a GPU")
    parser.add_argument("--small", action="store_true", help="with --gpu: small shapes, as a smoke test")
    parser.add_argument("--device", default="cuda", help="with --gpu: cuda, or cpu with --small")
    args = parser.parse_args()
    group = GROUPS[args.group]
    args.results = group.name
    parts = group.parts if args.part is None else args.part
    if unknown := set(parts) - set(group.parts):
        parser.error(f"{group.name} has no part {', '.join(sorted(unknown))}; its parts are {', '.join(group.parts)}")
    if args.gpu and not group.gpu:
        parser.error(f"{group.name} has no part that needs a GPU")
    args.quick |= args.gpu and args.small
    out = out_of(args).resolve()
    options = ["--out", str(out)]
    if args.gpu:
        parts = ["gpu"]
        options += ["--device", args.device, *(["--small"] if args.small else [])]
    elif args.quick:
        options.append("--quick")
    failed = run_parts({part: f"scripts.bench.{group.name}.{part}" for part in parts}, options)
    published = out == RESULTS / group.name
    path = (out.parent if published else out) / f"{group.name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    if published:
        group.draw(out)
    path.write_text(document(out, group.order, group.head), encoding="utf-8")
    print(f"\nwritten: {path}")
    if failed:
        again = "--gpu" if args.gpu else f"--part {' '.join(failed)}"
        print(f"error: {', '.join(failed)} failed, see above; run again with {again}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
