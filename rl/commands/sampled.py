"""What `keye posttrain filter` and `keye posttrain pairs` share: their arguments, and the answers that they sample."""

import argparse
from pathlib import Path
from typing import Any

from keye.errors import RecipeError


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of sampling."""
    parser.add_argument("model", metavar="MODEL", help="a model directory")
    parser.add_argument("manifest", metavar="MANIFEST", help="JSONL of questions with answers, see docs/rl.md")
    parser.add_argument("--out", required=True, metavar="OUT", help="the JSONL file that is written")
    parser.add_argument("--answers", metavar="DIR", help="folder of the sampled answers (default OUT.answers)")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="answers to each question (default 8)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="of an answer (default 1024)")
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="answers decoded together (default 256)")
    parser.add_argument("--families", nargs="*", default=[], help="families of questions (default: all)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="questions at most (default: all)")
    parser.add_argument(
        "--reward", action="append", default=[], metavar="NAME=WEIGHT", help="a reward (default accuracy=1)"
    )
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the model")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it


def check_sampling(args: argparse.Namespace) -> None:
    """Refuse impossible values; `args.reward` becomes name → weight.

    Raises:
        RecipeError: names the option.
    """
    args.reward = _rewards(args.reward or ["accuracy=1"])
    for option, value, least in (
        ("--samples", args.samples, 1), ("--max-new-tokens", args.max_new_tokens, 1), ("--batch", args.batch, 1),
        ("--limit", args.limit, 0),
    ):  # fmt: skip
        if value < least:
            raise RecipeError(f"{option} {value} must be at least {least}")
    if args.temperature <= 0:
        raise RecipeError(f"--temperature {args.temperature} must be above 0, so that the answers differ")
    if Path(args.out).absolute() == Path(args.manifest).absolute():
        raise RecipeError(f"--out {args.out} is the manifest itself; give another file")


def _rewards(given: list[str]) -> dict[str, float]:
    weights = {}
    for text in given:
        name, equals, weight = text.partition("=")
        try:
            weights[name] = float(weight if equals else 1.0)
        except ValueError:
            raise RecipeError(f"--reward {text}: write NAME=WEIGHT, such as accuracy=1") from None
    return weights


def draw(args: argparse.Namespace) -> Any:
    """The `Journal` with the answers to all questions; collective."""
    from rl.preference.answers import Draw, Sampled, draw_all
    from rl.questions.prompts import load_prompts
    from rl.run.agree import agree
    from stages.distributed.weights import open_start

    found = agree(lambda: load_prompts(args.manifest, args.families))
    start = agree(lambda: open_start(args.model))
    how = Draw(args.samples, args.temperature, args.max_new_tokens, args.seed)
    folder = Path(args.answers or f"{args.out}.answers")
    sampled = Sampled(found, tuple(args.families), args.limit, args.reward, args.precision, args.batch)
    return draw_all(folder, start, sampled, how)
