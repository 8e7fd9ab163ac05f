"""Train the four pre-training stages of a recipe; the same command again resumes where it stopped.

examples:
torchrun --nproc_per_node 2 scripts/pretrain.py stages/recipes/tiny.toml --out runs/mine
torchrun --nproc_per_node 2 scripts/pretrain.py stages/recipes/tiny.toml --stage annealing --set annealing.steps=20
deepspeed --num_gpus 8 scripts/pretrain.py stages/recipes/keye_8b.toml --out runs/keye
deepspeed --hostfile hosts scripts/pretrain.py stages/recipes/keye_8b.toml --out runs/keye

keye pretrain stages/recipes/tiny.toml --set annealing.steps=20 --print          the resolved recipe

--run is the same as --out; torchrun parses --run itself unless -- precedes the script.
"""

import argparse

from keye.errors import run
from stages.distributed.hosts import limit_threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a TOML file, such as stages/recipes/tiny.toml")
    parser.add_argument("--out", "--run", dest="run", help="directory to write to (default runs/<name of the recipe>)")
    parser.add_argument("--stage", help="only this one: vision, alignment, multitask, annealing or annealing-CONTEXT")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. annealing.steps=20")
    parser.add_argument("--print", action="store_true", help="print the recipe with its defaults; trains nothing")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = parser.parse_args()
    limit_threads()
    from stages.recipe import load
    from stages.typed_toml import to_toml

    recipe = load(args.recipe, args.set)
    if args.print:
        print(to_toml(recipe), end="")
        return
    from stages.run import pretrain

    pretrain(recipe, args.run or f"runs/{recipe.name}", args.stage)


if __name__ == "__main__":
    run(main)
