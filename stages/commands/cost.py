"""Estimate a recipe before anything runs: memory of a GPU and of a node, time, money, and whether it fits."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from keye.errors import KeyeError, run

EXAMPLES = """examples:
  keye cost stages/recipes/keye_8b.toml --gpus 64 --gpu h200
  keye cost stages/recipes/keye_8b.toml --gpus 64 --gpu h100 --mfu 0.35 --price 2.5 --out cost.png
  keye cost stages/recipes/small.toml --gpu 4090 --set vision.checkpointing=true --json

Nothing is run; data, model and GPUs are not needed.
"""


def main() -> None:
    args = build_parser(__doc__, EXAMPLES).parse_args()
    check(args)
    run_estimate(args)


def build_parser(about: str, examples: str) -> argparse.ArgumentParser:
    """The parser with the options of every recipe."""
    parser = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a TOML file, such as stages/recipes/keye_8b.toml")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs (default 1)")
    parser.add_argument("--gpu", default="h200", metavar="NAME", help="one of stages/cost/gpus.py (default h200)")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak rate, recomputed layers included (default 0.4)"
    )
    parser.add_argument("--price", type=float, help="US dollars an hour and GPU, instead of the assumed price")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="GPUs of a node (default 8)")
    parser.add_argument("--host-gb", type=float, metavar="GB", help="memory of a node: report stages that need more")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. annealing.steps=20")
    parser.add_argument("--json", action="store_true", help="everything as JSON, memory by component")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="also draw it")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse impossible values.

    Raises:
        KeyeError: names the option.
    """
    if args.gpus < 1:
        raise KeyeError(f"--gpus {args.gpus}: name at least one")
    if args.per_node < 1:
        raise KeyeError(f"--per-node {args.per_node}: name at least one")
    if not 0 < args.mfu <= 1:
        raise KeyeError(f"--mfu {args.mfu:g} is not a share of the peak rate; give one above 0 and up to 1")


def run_estimate(args: argparse.Namespace) -> None:
    """Print the cost of a pre-training recipe."""
    from stages.cost import report
    from stages.cost.estimate import Assumptions, estimate
    from stages.cost.gpus import gpu_named
    from stages.cost.host_memory import Node
    from stages.recipe import load

    recipe, gpu = load(args.recipe, args.set), gpu_named(args.gpu)
    assumed = Assumptions(utilisation=args.mfu, node=Node(args.per_node))
    gpu = gpu if args.price is None else dataclasses.replace(gpu, price=args.price)
    costs = estimate(recipe, gpu, args.gpus, assumed)
    if args.json:
        print(json.dumps(report.as_json(recipe, gpu, args.gpus, assumed, costs), indent=1))
    else:
        print(f"{recipe.name} on {args.gpus} × {gpu.name}\n")
        print(report.table(costs))
        print("\n" + report.sentence(recipe, gpu, args.gpus, assumed))
    for cost in costs:
        if not cost.fits:
            peak, room = cost.memory.peak / 1e9, assumed.usable * gpu.memory / 1e9
            print(f"{cost.name} needs {peak:.1f} GB of {room:.1f}: {cost.remedy}", file=sys.stderr)
        if args.host_gb is not None and cost.host.peak > args.host_gb * 1e9:
            largest = max(report.HOST, key=lambda part: getattr(cost.host, part))
            print(
                f"{cost.name} needs {cost.host.peak / 1e9:.1f} GB of a node's {args.host_gb:g}, most of it {largest}",
                file=sys.stderr,
            )
    if args.out:
        report.draw(args.out, gpu, costs, f"{recipe.name} on {args.gpus} × {gpu.name}")
        print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
