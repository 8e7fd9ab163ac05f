"""Average models that were trained from the same model, as the report does with different annealing mixtures."""

import argparse
from pathlib import Path

from keye.errors import CheckpointError, run

EXAMPLES = """examples:
  keye merge runs/a/annealing/model runs/b/annealing/model --out runs/merged
  keye merge A B C --weights 2,1,1 --out merged        A counts as much as B and C together
  keye merge A B --base START --weights 0.6,0.6 --out merged
                                     START plus 0.6 of what each one's training changed (task arithmetic)
  keye merge A B --sweep 0:1:0.25 --eval dev.jsonl --out merged
                                     five mixtures are evaluated, the best is kept; merged.sweep has all results

The result is a model directory; evaluate it with
  keye evaluate runs/merged runs/a/world/heldout.jsonl
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model directories, as the stages write them")
    parser.add_argument("--out", required=True, help="directory to write; must not exist")
    parser.add_argument("--weights", metavar="W,W,…", help="weight of each model (default: all the same)")
    parser.add_argument("--base", metavar="MODEL", help="what they were trained from: add their changes to it")
    parser.add_argument(
        "--sweep", metavar="A:B:STEP", help="try all weights from A to B in steps of STEP; needs --eval"
    )
    parser.add_argument("--eval", metavar="MANIFEST", help="questions that choose the best of a sweep")
    parser.add_argument("--limit", type=int, metavar="N", help="with --eval: at most N questions of each family")
    parser.add_argument("--shard-gb", type=float, default=4.0, help="largest output file, in GiB (default 4)")
    args = parser.parse_args()
    if (args.sweep is None) != (args.eval is None):
        raise CheckpointError("--sweep and --eval go together: --sweep 0:1:0.25 --eval MANIFEST")
    if args.sweep:
        if args.weights:
            raise CheckpointError("--sweep finds the weights; leave out --weights or --sweep")
        swept(args)
        return
    weights = None
    if args.weights:
        try:
            weights = [float(part) for part in args.weights.split(",")]
        except ValueError:
            raise CheckpointError(f"--weights {args.weights} are not numbers with commas; write 2,1,1") from None
    from stages.merge import merge

    made = merge(args.models, args.out, weights, int(args.shard_gb * 2**30), base=args.base)
    print(f"wrote {made}")


def swept(args: argparse.Namespace) -> None:
    """Run the sweep that the command line asks for."""
    from transformers.utils import logging

    from keye.commands.evaluate import load
    from keye.evaluation import Report, evaluate
    from stages.sweep import grid, sweep

    def score(directory: Path) -> Report:
        return evaluate(*load(str(directory)), args.eval, limit=args.limit)

    logging.disable_progress_bar()
    values = grid(args.sweep)
    about = {"eval": str(Path(args.eval).absolute()), "limit": args.limit}
    best = sweep(args.models, args.out, values, score, about, args.base)
    listed = ", ".join(f"{weight:g}" for weight in best.weights)
    print(f"best weights: {listed}\n{best.report.table()}\nwrote {args.out}; all mixtures are in {args.out}.sweep")
    print("The best was chosen on these questions: report its accuracy on others.")


if __name__ == "__main__":
    run(main)
