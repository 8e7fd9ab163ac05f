"""Estimate a recipe before anything runs: memory of a GPU and of a node, time, money, and whether it fits."""

import argparse
import dataclasses
import json
import sys
import tomllib
from pathlib import Path

from keye.errors import KeyeError, run
from stages.commands.cost import build_parser, check, run_estimate

POSTTRAIN = {"gspo", "sft", "mpo", "heldout", "rewards"}
STAGES = Path(__file__).resolve().parents[2] / "stages" / "recipes"
EXAMPLES = """examples:
  keye cost stages/recipes/keye_8b.toml --gpus 64 --gpu h200
  keye cost stages/recipes/keye_8b.toml --gpus 64 --gpu h100 --mfu 0.35 --price 2.5 --out cost.png
  keye cost stages/recipes/small.toml --gpu 4090 --set vision.checkpointing=true --json
  keye cost rl/recipes/keye_8b.toml --gpus 8 --gpu h200
  keye cost rl/recipes/tiny.toml --gpus 2 --gpu 4090 --prompt-tokens 300 --answer-tokens 8

Nothing is run; data, model and GPUs are not needed. The model and the clips of a GSPO recipe are those of --pretrain.
"""


def main() -> None:
    parser = build_parser(__doc__, EXAMPLES)
    group = parser.add_argument_group("of a GSPO recipe")
    group.add_argument(
        "--pretrain", type=Path, metavar="RECIPE", help="of the model (default: of the same name in stages/recipes)"
    )
    group.add_argument("--prompt-tokens", type=int, metavar="N", help="of an average prompt (default: by its budget)")
    group.add_argument("--answer-tokens", type=int, metavar="N", help="of an average answer (default: half its limit)")
    args = parser.parse_args()
    check(args)
    tables = _tables(Path(args.recipe))
    if not tables & POSTTRAIN:
        run_estimate(args)
        return
    if "gspo" not in tables:
        raise KeyeError(f"{args.recipe} has no table [gspo]: of post-training, only GSPO is estimated; add it")
    for name in ("prompt_tokens", "answer_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise KeyeError(f"--{name.replace('_', '-')} {value}: give at least one token")
    if args.out:
        raise KeyeError("--out draws the stages of a pre-training recipe; for a GSPO recipe use --json")
    _estimate(args)


def _tables(path: Path) -> set[str]:
    """The top-level keys of a recipe; none if it cannot be read, which the reader of pre-training recipes reports."""
    try:
        return set(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return set()


def _estimate(args: argparse.Namespace) -> None:
    from rl.cost import report
    from rl.cost.estimate import Assumptions, estimate
    from rl.recipe import load
    from stages.cost.gpus import gpu_named
    from stages.cost.host_memory import Node
    from stages.recipe import load as load_pretrain

    recipe, gpu = load(args.recipe, args.set), gpu_named(args.gpu)
    name = Path(args.recipe).stem
    source = args.pretrain or STAGES / f"{name}.toml"
    if not source.is_file():
        raise KeyeError(f"{source}: no such recipe; give the pre-training recipe of the model with --pretrain")
    gpu = gpu if args.price is None else dataclasses.replace(gpu, price=args.price)
    assumed = Assumptions(
        utilisation=args.mfu, prompt=args.prompt_tokens, answer=args.answer_tokens, node=Node(args.per_node)
    )
    cost = estimate(recipe, load_pretrain(source), gpu, args.gpus, assumed)
    if args.json:
        print(json.dumps(report.as_json(name, gpu, args.gpus, assumed, cost), indent=1))
    else:
        print(f"GSPO, {name} on {args.gpus} × {gpu.name}\n")
        print(report.table(cost))
        print("\n" + report.advice(cost))
        print(report.sentence(source.name, gpu, args.gpus, assumed, cost))
    if not cost.fits:
        peak, room = cost.memory.peak / 1e9, assumed.usable * gpu.memory / 1e9
        print(f"gspo needs {peak:.1f} GB of {room:.1f}: {cost.remedy}", file=sys.stderr)
    if args.host_gb is not None and cost.host.peak > args.host_gb * 1e9:
        print(f"gspo needs {cost.host.peak / 1e9:.1f} GB of a node's {args.host_gb:g}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
