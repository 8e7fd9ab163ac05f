"""Evaluate a trained model on a manifest."""

import argparse
import os
from pathlib import Path

import torch

from keye.errors import run
from keye.evaluation import CONTROLS, control_table, evaluate, gather

_EXAMPLES = """examples:
  keye evaluate runs/demo/annealing/model runs/demo/world/heldout.jsonl
  keye evaluate MODEL heldout.jsonl --control blind --train train.jsonl --out blind.json
  keye evaluate MODEL heldout.jsonl --control zeroed                     the same tokens with zero pixels
  keye evaluate MODEL heldout.jsonl --control all --out answers.json     every control, in one table
  keye evaluate MODEL heldout.jsonl --families count,order --limit 50
  torchrun --nproc_per_node 2 -m keye.commands.evaluate MODEL heldout.jsonl     divide the questions among two processes
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure accuracy per task family, with the chance and majority baselines.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a model directory")
    parser.add_argument("manifest", help="JSONL manifest of questions")
    parser.add_argument("--train", help="training manifest for the majority answers")
    parser.add_argument("--families", help="only these families, separated by commas")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N questions of each family")
    parser.add_argument(
        "--control",
        choices=("none", "all", *CONTROLS),
        default="none",
        help="; ".join(f"{name}: {what}" for name, what in CONTROLS.items())
        + "; all: none and each of them, in one table and one report each",
    )
    parser.add_argument("--blind", dest="control", action="store_const", const="blind", help="same as --control blind")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="questions per batch (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="maximum tokens per answer (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")
    parser.add_argument("--out", help="write the report as JSON")
    args = parser.parse_args()
    model, processor = load(args.model)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    reports = {}
    for control in ("none", *CONTROLS) if args.control == "all" else (args.control,):
        report = evaluate(
            model,
            processor,
            args.manifest,
            families=args.families.split(",") if args.families else None,
            limit=args.limit,
            control=control,
            temperature=args.temperature,
            train=args.train,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            seed=args.seed,
            rank=rank,
            world_size=world_size,
            progress=rank == 0,
        )
        reports[control] = gather(report)
        if rank == 0 and args.out:
            out = Path(args.out)
            path = out if control == "none" or args.control != "all" else out.with_stem(f"{out.stem}_{control}")
            reports[control].save(path)
            print(f"wrote {path}")
    if rank == 0:
        print(control_table(reports) if args.control == "all" else reports[args.control].table())
    if world_size > 1:
        torch.distributed.destroy_process_group()


def load(path: str):
    """Model (on this process's GPU if there is one) and processor of a directory.

    Raises:
        CheckpointError: the directory is not a model directory, or its model cannot be loaded.
    """
    from keye.inference.chat import load_model

    return load_model(path, f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    run(main)
