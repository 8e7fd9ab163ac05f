"""Tune a pre-trained run with GSPO on questions whose answers can be checked.

examples:
torchrun --nproc_per_node 2 scripts/posttrain.py rl/recipes/tiny.toml --out runs/demo
deepspeed --num_gpus 8 scripts/posttrain.py rl/recipes/keye_8b.toml --out runs/mine --set gspo.steps=200

--run is the same as --out; torchrun parses --run itself unless -- precedes the script.
"""

import argparse
import importlib
import sys

from keye.errors import run
from rl.recipe import load
from stages.distributed.hosts import limit_threads

OTHERS = {"constraints": "rl.commands.constraints"}
"""First word of the command → the module whose `main` runs it."""


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in OTHERS:
        name = sys.argv[1]
        sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
        importlib.import_module(OTHERS[name]).main()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a TOML file; the ready-made ones are in rl/recipes")
    parser.add_argument("--out", "--run", dest="run", required=True, help="directory of the pre-training run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args()
    limit_threads()
    recipe = load(args.recipe, args.set)
    from rl.trainer import GspoTrainer
    from stages.distributed import engine

    engine.start()
    trainer = GspoTrainer(recipe, args.run)
    result = trainer.train()
    if trainer.rank == 0:
        before, after = result["before"], result["after"]
        print(
            f"held-out reward {before['reward_mean']:.3f} ± {before['reward_stderr']:.3f} → {after['reward_mean']:.3f} "
            f"± {after['reward_stderr']:.3f}; gain {result['gain']:+.3f} ± {result['gain_stderr']:.3f} (paired), "
            f"greedy {result['greedy_gain']:+.3f} ± {result['greedy_gain_stderr']:.3f}"
        )
        if result["rejected"]:
            print(f"{len(result['rejected'])} samples were left out; {args.run}/gspo/eval.json has the reasons")
    engine.stop()


if __name__ == "__main__":
    run(main)
