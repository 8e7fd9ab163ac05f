"""Mark the questions of a manifest that a model answers without their images and videos.

Every question with media gets `blind_accuracy`: the share of right answers that the model samples for the text alone.
Other lines are copied. With blindness.guard = "drop", posttrain leaves out questions with a blind_accuracy of
blindness.drop_above or more. The same command continues where it was stopped.
"""

import argparse

from keye.errors import run

_EXAMPLES = """examples:
  keye data mark-blind train.jsonl --model runs/mine/annealing/model --out marked.jsonl
  keye data mark-blind train.jsonl --model MODEL --out marked.jsonl --samples 16 --device cuda
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", help="questions as posttrain reads them (.jsonl)")
    parser.add_argument("--model", required=True, help="directory of the model that is asked")
    parser.add_argument("--out", required=True, help="the manifest to write (.jsonl)")
    parser.add_argument("--samples", type=int, default=8, help="answers to each question (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the answers (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="lines that are asked together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the answers (default: %(default)s)")
    parser.add_argument(
        "--drop-above", type=float, default=0.75, help="accuracy that counts as answered (default: %(default)s)"
    )
    parser.add_argument("--device", default="", help="cpu or cuda (default: the GPU if there is one)")
    args = parser.parse_args()

    from rich.progress import Progress

    from rl.questions.marks import Marking, load_answerer, mark

    settings = Marking(
        args.samples, args.temperature, args.max_new_tokens, args.batch, args.seed, args.drop_above, args.model
    )
    answer = load_answerer(settings, args.device)
    with Progress(transient=True) as bar:
        task = bar.add_task("asking without frames", total=None)
        counts = mark(
            args.manifest, args.out, settings, answer, lambda done, total: bar.update(task, completed=done, total=total)
        )
    print("\n".join(counts.lines(args.drop_above)))
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
