"""Check the data of a recipe, or one manifest, before anything trains on it.

Reports for every source its share of the tokens, its rows, how many times the stage will read them and rows that cannot
be read; and for some of its samples the tokens, what was made smaller to fit, and what is bad and why. Exits with 1 if
a source has more bad samples than --max-bad-fraction allows.
"""

import argparse
import dataclasses
import json
import logging
import sys
import warnings
from pathlib import Path

from keye.errors import FormerNameWarning, RecipeError, run, writing

FORMER = {"--not-like": "--decontaminate-against", "--most-bad": "--max-bad-fraction"}
_EXAMPLES = """examples:
  keye data stages/recipes/tiny.toml --run runs/tiny --stage multitask
  keye data train.jsonl --tokenizer Qwen/Qwen3-8B --context 8192 --out data.png
  keye data train.jsonl --decontaminate-against heldout.jsonl      pictures of the evaluation are bad
  keye data mark-blind train.jsonl --model MODEL --out marked.jsonl      questions that need no video; has a --help
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="a recipe (.toml), or a manifest or data set as data.sources names them")
    parser.add_argument("--stage", help="the recipe's stage that reads the data (default its last)")
    parser.add_argument("--run", help="directory that replaces {run} in the recipe (default runs/<name of the recipe>)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe")
    parser.add_argument(
        "--tokenizer",
        default="",
        help="tokenizer for a manifest (default: a small one, which overestimates lengths)",
    )
    parser.add_argument("--context", type=int, default=8192, help="tokens of a sample at most, for a manifest")
    parser.add_argument(
        "--decontaminate-against", action="append", default=[], metavar="MANIFEST", help="an evaluation's manifest"
    )
    parser.add_argument("--samples", type=int, default=100, help="samples to check per source (default 100)")
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.05, help="share of bad samples allowed (default 0.05)"
    )
    parser.add_argument("--out", help="write a chart (PNG)")
    parser.add_argument("--json", help="write all figures as JSON")
    args = parser.parse_args([_present(argument) for argument in sys.argv[1:]])

    from rich.progress import Progress

    from stages.data import check
    from stages.recipe import load

    logging.getLogger("stages").setLevel(logging.ERROR)  # the table says what is bad
    if args.data.endswith(".toml"):
        recipe = load(args.data, args.set)
        others = (*recipe.data.decontaminate_against, *args.decontaminate_against)
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, decontaminate_against=others))
        if recipe.data.world is not None:
            from stages.preparation import prepare_world

            prepare_world(recipe, Path(args.run or f"runs/{recipe.name}"))  # as the run itself does first
    else:
        recipe = check.one_manifest(args.data, args.tokenizer, args.context, tuple(args.decontaminate_against), 6)
    stage = args.stage or list(recipe.chain)[-1]
    if stage not in recipe.chain:
        raise RecipeError(f"{args.data} has no stage {stage}; it has {', '.join(recipe.chain)}")
    with Progress(transient=True) as bar:
        tasks: dict[str, int] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name.rpartition("/")[2], total=total)
            bar.update(tasks[name], completed=done)

        found = check.check_data(recipe, stage, Path(args.run or f"runs/{recipe.name}"), args.samples, progress)
    print("\n".join(check.lines(found, planned=args.data.endswith(".toml"))))
    if args.out:
        check.picture(found, recipe.chain[stage].limit, args.out)
    if args.json:
        with writing(args.json, "the report"):
            Path(args.json).write_text(json.dumps([dataclasses.asdict(one) for one in found], indent=1) + "\n")
    over = [one.name for one in found if len(one.bad) > args.max_bad_fraction * one.checked]
    for name in over:
        print(f"{name}: more than {args.max_bad_fraction:.0%} of the checked samples are bad", file=sys.stderr)
    return 1 if over else 0


def _present(argument: str) -> str:
    """An argument with the present name of its option; a former one is read with a warning."""
    option, equals, value = argument.partition("=")
    if option not in FORMER:
        return argument
    warnings.warn(f"the option {option} is now called {FORMER[option]}", FormerNameWarning, stacklevel=2)
    return FORMER[option] + equals + value


if __name__ == "__main__":
    run(main)
