"""Write a data set for alignment RL: the prompts of a manifest with drawn constraints on the form of the answer."""

import argparse

from keye.errors import RecipeError, run

EXAMPLES = """examples:
  keye posttrain constraints world/train.jsonl --out world/constraints.jsonl
  keye posttrain constraints prompts.jsonl --out constraints.jsonl --each 3 --most 5 --seed 1
  keye posttrain constraints prompts.jsonl --out json.jsonl --kinds json,no_commas,words
  keye posttrain constraints --list                  all kinds, each with a drawn example

Train on it with constraints = 1.0 (the share that is satisfied) or all_constraints = 1.0 under [rewards].
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("manifest", nargs="?", help="a .jsonl manifest of chats")
    parser.add_argument("--out", metavar="FILE", help="the manifest to write; an existing one is replaced")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same set (default 0)")
    parser.add_argument("--each", type=int, default=1, metavar="N", help="sets for each prompt (default 1)")
    parser.add_argument("--least", type=int, default=1, metavar="N", help="constraints of a set at least (default 1)")
    parser.add_argument("--most", type=int, default=3, metavar="N", help="constraints of a set at most (default 3)")
    parser.add_argument("--kinds", default="", metavar="KIND,…", help="draw only these (default: all but language)")
    parser.add_argument("--keep-answers", action="store_true", help="keep answers, for rewards of the content")
    parser.add_argument("--list", action="store_true", help="list the kinds and exit")
    args = parser.parse_args()
    from rl.alignment import KINDS

    kinds = tuple(filter(None, args.kinds.split(",")))
    for kind in kinds:
        if kind not in KINDS:
            raise RecipeError(f"--kinds {args.kinds} names {kind!r}; use some of {', '.join(KINDS)}")
    if args.list:
        _list()
        return
    if not args.manifest or not args.out:
        raise RecipeError("give a manifest and --out FILE, or --list")
    from rl.alignment.dataset import write_constraint_set

    number = write_constraint_set(
        args.manifest, args.out, seed=args.seed, each=args.each, least=args.least, most=args.most, kinds=kinds,
        keep_answers=args.keep_answers,
    )  # fmt: skip
    print(f"wrote {args.out} with {number} prompts")


def _list() -> None:
    import random

    from rl.alignment.draw import DRAWS

    for kind, draw in DRAWS.items():
        try:
            example = draw(random.Random(0), "Describe the clip.").describe()
        except ValueError as error:  # an optional package is not installed
            example = str(error)
        print(f"{kind:<20}{example}")


if __name__ == "__main__":
    run(main)
