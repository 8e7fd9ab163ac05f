"""Train experts on different families of questions, merge them, and compare all on held-out questions.

Every expert is trained by GSPO from the same start model, in RUN/experts/NAME. The merged models are the average and,
for each factor, the start model plus the factor times the sum of the experts' changes. The same command continues.
"""

import argparse
from typing import Any

from keye.errors import RecipeError, run
from stages.distributed.hosts import limit_threads

EXAMPLES = """examples:
  keye posttrain experts rl/recipes/tiny.toml --out runs/demo --expert time=when,order --expert space=read,find
  keye posttrain experts rl/recipes/tiny.toml --out runs/demo --expert a=when --expert b=read --factors 0.3,0.6,1
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a TOML file with [gspo]")
    parser.add_argument("--out", "--run", dest="run", required=True, help="directory of the run")
    parser.add_argument(
        "--expert", action="append", default=[], metavar="NAME=FAMILY,…", help="an expert; give it two times or more"
    )
    parser.add_argument("--factors", default="0.5,1", metavar="X,…", help="of the sum of changes (default 0.5,1)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args()
    try:
        factors = [float(part) for part in args.factors.split(",")]
    except ValueError:
        raise RecipeError(f"--factors {args.factors} are not numbers with commas; write 0.5,1") from None
    limit_threads()
    from rl.recipe import load

    recipe = load(args.recipe, args.set)
    from rl.commands.posttrain import report
    from rl.experts import parse_experts, table, train_experts
    from stages.distributed import engine

    experts = parse_experts(args.expert)

    def done(name: str, result: dict[str, Any]) -> None:
        report(name, result, args.run, ["experts", name])

    engine.start()
    results = train_experts(recipe, args.run, experts, factors, done)
    import torch.distributed as dist

    if dist.get_rank() == 0:
        print(table(results), flush=True)
    engine.stop()


if __name__ == "__main__":
    run(main)
