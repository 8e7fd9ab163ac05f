"""Add hints of five levels to the questions of a manifest, for RL on questions that fail every rollout.

Questions of SlowFastWorld get hints from their ground truth. With --write, a language model writes those of other
questions; the environment names it: KEYE_HINTS_URL, KEYE_HINTS_MODEL and KEYE_HINTS_KEY, or KEYE_HINTS_MODEL alone for
a local model. Its answers are stored, so that the same command continues and pays for none twice.
"""

import argparse
from pathlib import Path

from keye.errors import ManifestError, run

EXAMPLES = """examples:
  keye posttrain hints world/train.jsonl --out world/hinted.jsonl
  keye posttrain hints questions.jsonl --out hinted.jsonl --write
  keye posttrain hints questions.jsonl --out hinted.jsonl --write --ceiling 5 --input-price 0.2 --output-price 0.6
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", help="a .jsonl manifest of questions with answers")
    parser.add_argument("--out", required=True, metavar="FILE", help="the manifest to write")
    parser.add_argument("--write", action="store_true", help="let a language model write hints")
    parser.add_argument("--answers", metavar="DIR", help="folder of its answers (default FILE.answers)")
    parser.add_argument("--ceiling", type=float, default=0.0, metavar="X", help="cost at most (default: no ceiling)")
    parser.add_argument("--input-price", type=float, default=0.0, metavar="X", help="of a million prompt tokens")
    parser.add_argument("--output-price", type=float, default=0.0, metavar="X", help="of a million answer tokens")
    args = parser.parse_args()
    manifest, out = Path(args.manifest), Path(args.out)
    if manifest.absolute() == out.absolute():
        raise ManifestError(f"--out {out} is the manifest itself; give another file")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from rl.alignment.dataset import count_lines
    from rl.endpoint import Client
    from rl.questions.writing_hints import write_hints

    columns = (TextColumn("hints"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    client = None
    if args.write:
        client = Client.from_environment("hints", args.answers or f"{out}.answers", _price(args), log=print)
    try:
        with Progress(*columns) as bar:
            task = bar.add_task("", total=count_lines(manifest))
            counts = write_hints(manifest, out, client, lambda number: bar.update(task, completed=number))
    finally:
        if client is not None:
            client.close()
    print(f"wrote {out}: {', '.join(f'{number} {name}' for name, number in counts.items())}")


def _price(args: argparse.Namespace) -> object:
    from rl.endpoint import Price

    return Price(args.input_price, args.output_price, args.ceiling or None)


if __name__ == "__main__":
    run(main)
