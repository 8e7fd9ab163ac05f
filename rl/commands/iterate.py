"""Alternate RL and cold starts: the RL model's best answers make the next cold start, from which RL begins again.

A round samples the cold-start questions with the latest policy, keeps its best right answers, tunes the start model of
[sft] on them, keeps the RL questions with 0 < accuracy < 1, and trains on these with GSPO. Everything is in
RUN/rounds/1, 2, …; the same command continues, on any number of processes.
"""

import argparse
from typing import Any

from keye.errors import run
from stages.distributed.hosts import limit_threads

EXAMPLES = """examples:
  keye posttrain iterate rl/recipes/tiny_post.toml --out runs/demo --rounds 2
  torchrun --nproc_per_node 2 scripts/posttrain.py iterate rl/recipes/tiny_post.toml --out runs/demo --limit 500
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a TOML file with [sft] and [gspo]")
    parser.add_argument("--out", "--run", dest="run", required=True, help="directory of the run")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="rounds (default 2)")
    parser.add_argument("--first", default="gspo", metavar="PHASE", help="its model samples first (default gspo)")
    parser.add_argument("--cold", default="", metavar="FILE", help="cold-start questions (default gspo.manifest)")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="answers to each question (default 8)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="questions of a manifest (default: all)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (default 1)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args()
    limit_threads()
    from rl.recipe import load

    recipe = load(args.recipe, args.set)
    from rl.commands.posttrain import report
    from rl.iterate import Rounds, iterate
    from stages.distributed import engine

    def done(name: str, result: dict[str, Any]) -> None:
        report(name, result, args.run, ["rounds", name])

    engine.start()
    rounds = Rounds(args.rounds, args.first, args.cold, args.samples, args.limit, args.temperature)
    iterate(recipe, args.run, rounds, done)
    engine.stop()


if __name__ == "__main__":
    run(main)
