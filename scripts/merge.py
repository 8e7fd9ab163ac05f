"""Average models that were trained from one start, as the report does with models annealed on different mixtures."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from keye.errors import CheckpointError, run  # noqa: E402

EXAMPLES = """examples:
  python scripts/merge.py runs/a/annealing/model runs/b/annealing/model --out runs/merged
  python scripts/merge.py A B C --weights 2,1,1 --out merged        A counts as much as B and C together

The result is a model's directory like the others: evaluate it with
  python scripts/evaluate.py runs/merged runs/a/world/heldout.jsonl
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model directories, as the stages write them")
    parser.add_argument("--out", required=True, help="directory to write; must not be there")
    parser.add_argument("--weights", metavar="W,W,…", help="how much each model counts (default: all alike)")
    parser.add_argument("--shard-gb", type=float, default=4.0, help="largest output file, in GiB (default 4)")
    args = parser.parse_args()
    weights = None
    if args.weights:
        try:
            weights = [float(part) for part in args.weights.split(",")]
        except ValueError:
            raise CheckpointError(f"--weights {args.weights} are not numbers with commas; write 2,1,1") from None
    from stages.merge import merge

    print(f"wrote {merge(args.models, args.out, weights, int(args.shard_gb * 2**30))}")


if __name__ == "__main__":
    run(main)
