"""Train a reward model on pairs of a chosen and a rejected answer (Bradley-Terry).

Writes a Hugging Face directory with `reward_head.safetensors` and `reward.json`, and prints its accuracy on the pairs
that are held out. Started again it continues; metrics and checkpoints are in DIR.training.
"""

import argparse
import json
from dataclasses import asdict

from keye.errors import run
from stages.distributed.hosts import limit_threads

EXAMPLES = """examples:
  keye posttrain reward-model runs/demo/sft/model runs/demo/pairs.jsonl --out runs/demo/reward --steps 100
  torchrun --nproc_per_node 8 scripts/posttrain.py reward-model MODEL pairs.jsonl --out DIR --steps 500 --train head
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="the model directory that training starts from")
    parser.add_argument("pairs", metavar="PAIRS", help="JSONL with messages, chosen and rejected")
    parser.add_argument("--out", required=True, metavar="DIR", help="the directory of the reward model")
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="optimizer steps")
    parser.add_argument("--learning-rate", type=float, default=1e-5, metavar="X", help="default 1e-5")
    parser.add_argument("--warmup", type=int, default=0, metavar="N", help="steps of linear rise (default 0)")
    parser.add_argument("--train", choices=("full", "head"), default="full", help="what is trained (default full)")
    parser.add_argument("--heldout", type=float, default=0.1, metavar="X", help="share held out (default 0.1)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pairs of a step (default 32)")
    parser.add_argument("--micro-pairs", type=int, default=4, metavar="N", help="pairs of a forward pass (default 4)")
    parser.add_argument("--zero", type=int, default=2, metavar="N", help="ZeRO stage, 0 to 2 (default 2)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of training")
    parser.add_argument("--checkpoint-every", type=int, default=50, metavar="N", help="steps (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the pairs (default 0)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args()
    limit_threads()
    from rl.preference.reward_training import RewardTrainer, RewardTraining
    from stages.distributed import engine

    config = RewardTraining(
        steps=args.steps, learning_rate=args.learning_rate, warmup=args.warmup, trained=args.train,
        heldout=args.heldout, batch_size=args.batch_size, micro_pairs=args.micro_pairs, zero=args.zero,
        precision=args.precision, checkpoint_every=args.checkpoint_every, seed=args.seed,
    )  # fmt: skip
    config.validate()
    engine.start()
    trainer = RewardTrainer(config, args.model, args.pairs, args.out)
    record = trainer.train()
    if trainer.rank == 0:
        print(json.dumps(asdict(record)), flush=True)
    engine.stop()


if __name__ == "__main__":
    run(main)
