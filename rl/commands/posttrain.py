"""Tune a pre-trained run: SFT, preference optimization (MPO) and RL (GSPO), each where the recipe has its table.

examples:
torchrun --nproc_per_node 2 scripts/posttrain.py rl/recipes/tiny.toml --out runs/demo
deepspeed --num_gpus 8 scripts/posttrain.py rl/recipes/keye_8b.toml --out runs/mine --set gspo.steps=200
python scripts/posttrain.py rl/recipes/tiny_post.toml --out runs/demo --phase mpo

Data for it are made by commands of their own, each with --help:
keye posttrain filter MODEL MANIFEST --out OUT     leave out questions that the model answers anyway
keye posttrain pairs MODEL MANIFEST --out OUT      a better and a worse answer of the model to each question
keye posttrain reward-model MODEL PAIRS --out DIR --steps 100  train a reward model on such pairs
keye posttrain constraints MANIFEST --out OUT      add constraints on the form of the answer, for alignment RL
keye posttrain hints MANIFEST --out OUT            add hints, for questions that fail every rollout

Longer courses, each with --help:
keye posttrain iterate RECIPE --out RUN            rounds of new cold starts and RL
keye posttrain experts RECIPE --out RUN            experts on families of questions, merged and compared

--run is the same as --out; torchrun parses --run itself unless -- precedes the script.
"""

import argparse
import importlib
import sys
from typing import Any

from keye.errors import run
from rl.recipe import PHASES, load
from stages.distributed.hosts import limit_threads

OTHERS = {
    "constraints": "rl.commands.constraints",
    "experts": "rl.commands.experts",
    "filter": "rl.commands.filter",
    "hints": "rl.commands.hints",
    "iterate": "rl.commands.iterate",
    "pairs": "rl.commands.pairs",
    "reward-model": "rl.commands.reward_model",
}
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
    parser.add_argument("--phase", choices=PHASES, help="run this phase of the recipe only (default: all it has)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args()
    limit_threads()
    recipe = load(args.recipe, args.set)
    from rl.phases import post_train
    from stages.distributed import engine

    engine.start()
    post_train(recipe, args.run, args.phase, lambda name, result: report(name, result, args.run, recipe.phases))
    engine.stop()


def report(name: str, result: dict[str, Any], folder: str, phases: list[str]) -> None:
    """Print the outcome of a phase, with its name if the recipe has several."""
    before, after = result["before"], result["after"]
    print(
        f"{name + ': ' if len(phases) > 1 else ''}held-out reward {before['reward_mean']:.3f} ± "
        f"{before['reward_stderr']:.3f} → {after['reward_mean']:.3f} ± {after['reward_stderr']:.3f}; gain "
        f"{result['gain']:+.3f} ± {result['gain_stderr']:.3f} (paired), greedy {result['greedy_gain']:+.3f} ± "
        f"{result['greedy_gain_stderr']:.3f}",
        flush=True,
    )
    if result["rejected"]:
        print(f"{len(result['rejected'])} samples were left out; {folder}/{name}/eval.json has the reasons")


if __name__ == "__main__":
    run(main)
