"""Make pairs of a better and a worse answer of a model to each question of a manifest, for MPO or a reward model.

Samples answers to each question and judges them. `rejection` pairs right with wrong answers of similar length,
`ranking` the highest with the lowest rewards. Started again it continues; the answers are kept in OUT.answers.
"""

import argparse
import json
from pathlib import Path

from keye.errors import RecipeError, run
from rl.commands.sampled import add_sampling, check_sampling, draw
from stages.distributed.hosts import limit_threads

EXAMPLES = """examples:
  keye posttrain pairs runs/demo/sft/model runs/demo/world/train.jsonl --out runs/demo/pairs.jsonl
  keye posttrain pairs MODEL train.jsonl --out pairs.jsonl --method ranking --reward accuracy=1 --reward format=0.1
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sampling(parser)
    parser.add_argument(
        "--method", choices=("rejection", "ranking"), default="rejection", help="see above (default rejection)"
    )
    parser.add_argument("--per-question", type=int, default=1, metavar="N", help="pairs at most (default 1)")
    args = parser.parse_args()
    check_sampling(args)
    if args.per_question < 1 or args.samples < 2:
        raise RecipeError("--per-question must be at least 1 and --samples at least 2: a pair has two answers")
    if args.method == "rejection" and "accuracy" not in args.reward:
        raise RecipeError("right and wrong answers are found by the reward accuracy; add --reward accuracy=1")
    limit_threads()
    from rl.preference.selecting import make_pairs
    from stages.distributed import engine
    from stages.distributed.ranks import first_rank

    engine.start()
    journal = draw(args)

    def write() -> None:
        manifest, out = Path(args.manifest), Path(args.out)
        print(json.dumps(make_pairs(manifest, journal.rows(), out, args.method, args.per_question)), flush=True)

    first_rank(write, OSError)
    engine.stop()


if __name__ == "__main__":
    run(main)
