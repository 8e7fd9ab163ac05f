"""Evaluate a trained model on a manifest."""

import argparse
import os

import torch

from keye.errors import CheckpointError, run
from keye.evaluation import evaluate, gather

_EXAMPLES = """examples:
  python scripts/evaluate.py runs/demo/annealing/model runs/demo/world/heldout.jsonl
  python scripts/evaluate.py MODEL heldout.jsonl --control blind --train train.jsonl --out blind.json
  python scripts/evaluate.py MODEL heldout.jsonl --control zeroed        the same tokens without their pixels
  python scripts/evaluate.py MODEL heldout.jsonl --families count,order --limit 50
  torchrun --nproc_per_node 2 -- scripts/evaluate.py MODEL heldout.jsonl          the questions shared by two processes
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Accuracy per task family beside the chance and majority baselines.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="model directory, as the stages write it")
    parser.add_argument("manifest", help="JSONL manifest of questions")
    parser.add_argument("--train", help="training manifest, from which the majority answers are taken")
    parser.add_argument("--families", help="only these, separated by commas")
    parser.add_argument("--limit", type=int, help="at most so many questions of each family")
    parser.add_argument(
        "--control",
        choices=("none", "blind", "zeroed"),
        default="none",
        help="blind: leave out images and videos; zeroed: keep their tokens, frame types and seconds, zero the pixels",
    )
    parser.add_argument("--blind", dest="control", action="store_const", const="blind", help="same as --control blind")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the report as JSON")
    given = parser.parse_args()
    model, processor = load(given.model)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    report = evaluate(
        model,
        processor,
        given.manifest,
        families=given.families.split(",") if given.families else None,
        limit=given.limit,
        control=given.control,
        temperature=given.temperature,
        train=given.train,
        batch_size=given.batch_size,
        max_new_tokens=given.max_new_tokens,
        seed=given.seed,
        rank=rank,
        world_size=world_size,
        progress=rank == 0,
    )
    report = gather(report)
    if rank == 0:
        print(report.table())
        if given.out:
            report.save(given.out)
            print(f"wrote {given.out}")
    if world_size > 1:
        torch.distributed.destroy_process_group()


def load(path: str):
    """Model (on the GPU if there is one) and processor of a directory; CheckpointError when it is not one."""
    from keye import KeyeForConditionalGeneration, KeyeProcessor

    if not os.path.isfile(os.path.join(path, "config.json")):
        raise CheckpointError(
            f"{path} holds no model (no config.json); give a directory like runs/demo/annealing/model"
        )
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    model = KeyeForConditionalGeneration.from_pretrained(path).to(device)
    return model, KeyeProcessor.from_pretrained(path)


if __name__ == "__main__":
    run(main)
