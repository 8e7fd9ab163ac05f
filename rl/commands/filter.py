"""Leave out the questions of a manifest that a model answers anyway, or never.

Samples answers to each question, judges them, and writes the lines whose accuracy is from --least to --most, with their
accuracy. Started again it continues; the answers are kept in OUT.answers, which `pairs` can use as well.
"""

import argparse
import json
from pathlib import Path

from keye.errors import RecipeError, run
from rl.commands.sampled import add_sampling, check_sampling, draw
from stages.distributed.hosts import limit_threads

EXAMPLES = """examples:
  keye posttrain filter runs/demo/sft/model runs/demo/world/train.jsonl --out runs/demo/hard.jsonl
  torchrun --nproc_per_node 8 scripts/posttrain.py filter MODEL train.jsonl --out hard.jsonl --least 0.1 --most 0.9
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sampling(parser)
    parser.add_argument("--least", type=float, default=0.0, help="lowest accuracy that is kept (default 0)")
    parser.add_argument("--most", type=float, default=0.99, help="highest accuracy that is kept (default 0.99)")
    args = parser.parse_args()
    check_sampling(args)
    if "accuracy" not in args.reward:
        raise RecipeError("questions are kept by their share of right answers; add --reward accuracy=1")
    limit_threads()
    from rl.preference.selecting import Kept, filter_questions
    from stages.distributed import engine
    from stages.distributed.ranks import first_rank

    engine.start()
    journal = draw(args)

    def write() -> None:
        kept = Kept(args.least, args.most)
        print(json.dumps(filter_questions(Path(args.manifest), journal.rows(), Path(args.out), kept)), flush=True)

    first_rank(write, OSError)
    engine.stop()


if __name__ == "__main__":
    run(main)
