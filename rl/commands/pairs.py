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
  keye posttrain pairs MODEL train.jsonl --out dpo.jsonl --format trl --families image_read text

--format trl writes TRL's conversational preference form, for TRL's DPOTrainer (docs/post-training.md, "Pairs"). TRL has
no column for videos, so that the questions must have none. Both forms are read by mpo.pairs and the reward model.
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
    parser.add_argument(
        "--format", choices=("messages", "trl"), default="messages", help="of the lines, see below (default messages)"
    )
    args = parser.parse_args()
    check_sampling(args)
    if args.per_question < 1 or args.samples < 2:
        raise RecipeError("--per-question must be at least 1 and --samples at least 2: a pair has two answers")
    if args.method == "rejection" and "accuracy" not in args.reward:
        raise RecipeError("right and wrong answers are found by the reward accuracy; add --reward accuracy=1")
    limit_threads()
    from rl.preference.selecting import make_pairs
    from rl.run.agree import agree
    from stages.distributed import engine
    from stages.distributed.ranks import first_rank

    engine.start()
    if args.format == "trl":
        agree(lambda: _check_without_videos(args))
    journal = draw(args)

    def write() -> None:
        counts = make_pairs(
            Path(args.manifest), journal.rows(), Path(args.out), args.method, args.per_question, args.format
        )
        print(json.dumps(counts), flush=True)

    first_rank(write, OSError)
    engine.stop()


def _check_without_videos(args: argparse.Namespace) -> None:
    """Refuse questions with videos before anything is sampled."""
    from rl.preference.conversational import has_video
    from rl.questions.prompts import load_prompts

    prompts = load_prompts(args.manifest, args.families).prompts
    first = next((prompt for prompt in prompts if has_video(prompt.messages)), None)
    if first is not None:
        others = sorted({p.family for p in prompts} - {p.family for p in prompts if has_video(p.messages)} - {""})
        remedy = f", or --families {' '.join(others)}" if others else ""
        raise RecipeError(f"{first.where} has a video, and TRL has no column for videos; use --format messages{remedy}")


if __name__ == "__main__":
    run(main)
