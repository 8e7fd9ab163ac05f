"""Make reasoning data in five steps, each from JSONL to JSONL; a repeated command continues.

examples (keye reasoning STEP --help has more of each step):
keye reasoning enhance questions.jsonl hard.jsonl --merge
keye reasoning generate hard.jsonl paths.jsonl --paths 8
keye reasoning grade paths.jsonl graded.jsonl --votes 3
keye reasoning review graded.jsonl reviewed.jsonl
keye reasoning score reviewed.jsonl coldstart.jsonl --samples 4

KEYE_GENERATOR_URL, _MODEL and _KEY name the model of enhance, generate and score, KEYE_JUDGE_… that of grade. Without a
URL, _MODEL is a local model directory.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from keye.errors import KeyeError, run
from rl.endpoint.cost import Price
from rl.reasoning.items import Items
from rl.reasoning.work import CONSOLE, Runner

EXAMPLES = {
    "enhance": """examples:
  keye reasoning enhance questions.jsonl hard.jsonl
  keye reasoning enhance questions.jsonl hard.jsonl --merge --checks 3
  KEYE_GENERATOR_URL=http://localhost:8000/v1 KEYE_GENERATOR_MODEL=Qwen3-32B keye reasoning enhance q.jsonl hard.jsonl
""",
    "generate": """examples:
  keye reasoning generate hard.jsonl paths.jsonl --paths 8
  keye reasoning generate hard.jsonl paths.jsonl --prompt-price 0.2 --completion-price 0.6 --max-cost 50
  KEYE_GENERATOR_MODEL=runs/demo/annealing/model keye reasoning generate questions.jsonl paths.jsonl --plain --tokens 32
""",
    "grade": """examples:
  keye reasoning grade paths.jsonl graded.jsonl --votes 3
  keye reasoning grade paths.jsonl graded.jsonl --rules-only
  KEYE_JUDGE_URL=http://localhost:8000/v1 KEYE_JUDGE_MODEL=Qwen3-32B keye reasoning grade p.jsonl g.jsonl --send none
""",
    "review": """examples:
  keye reasoning review graded.jsonl reviewed.jsonl
  keye reasoning review graded.jsonl reviewed.jsonl --port 8080
  keye reasoning review graded.jsonl reviewed.jsonl --export
""",
    "score": """examples:
  keye reasoning score reviewed.jsonl coldstart.jsonl
  keye reasoning score graded.jsonl coldstart.jsonl --unreviewed --samples 8
  keye reasoning score reviewed.jsonl coldstart.jsonl --repeat 1:0,2:0,3:1,4:1,5:2 --seed 1
""",
}
"""Of the help of each step."""


def main() -> int:
    args = _parser().parse_args()
    if Path(args.input).resolve() == Path(args.out).resolve():
        raise KeyeError(f"{args.out} is also the input; give another output")
    return _review(args) if args.step == "review" else _step(args)


def _step(args: argparse.Namespace) -> int:
    """Run a step that asks a model."""
    from rl.endpoint import Client, Limits
    from rl.endpoint.local import LocalModel
    from rl.reasoning.media import Media

    out = Path(args.out)
    source = Items(args.input, args.limit)
    price = Price(args.prompt_price, args.completion_price, args.max_cost)
    limits = Limits(args.concurrency, args.seconds, args.patience)
    cache = Path(args.cache) if args.cache else out.parent / "answers"
    role = "judge" if args.step == "grade" else "generator"
    with Client.from_environment(role, cache, price, limits, CONSOLE.print) as client:
        local = isinstance(client.backend, LocalModel)
        send = ("clip" if local else "frames") if args.send is None else args.send
        root = Path(args.clip_root) if args.clip_root else None
        media = None if send == "none" else Media(send, args.max_visual_tokens, root, local)
        work, settings = _work(args, client, media, source)
        settings |= {"model": client.backend.name}
        summary = Runner(args.step, source, out, settings, client, args.concurrency).run(work)
    _report(args.step, out, summary)
    return 0


def _work(args: argparse.Namespace, client: Any, media: Any, source: Items) -> tuple[Any, dict[str, Any]]:
    """The work of a step and its settings."""
    from rl.reasoning.enhance import Enhance, pairs, settings
    from rl.reasoning.generate import INSTRUCTIONS, Generate
    from rl.reasoning.grade import Grade
    from rl.reasoning.score import REPEATS, Score

    folder = Path(args.out).parent
    if args.step == "enhance":
        partners = pairs(source.prompts) if args.merge else {}
        work = Enhance(client, folder, partners, args.checks, args.tokens)
        return work, settings(args.merge, args.checks, args.tokens)
    if args.step == "grade":
        graded = Grade(client, media, folder, args.votes, args.tokens, args.confidence, not args.rules_only)
        return graded, graded.settings()
    if media is None:
        raise KeyeError(f"--send none is for grade only; {args.step} needs the media")
    plain = args.plain
    if args.step == "generate":
        thinking = True if args.thinking else None
        words = None if plain else INSTRUCTIONS
        made = Generate(client, media, folder, args.paths, args.temperature, args.tokens, thinking, words)
        return made, made.settings()
    words = None if plain else INSTRUCTIONS
    policy = _policy(args.repeat) if args.repeat is not None else dict(REPEATS)
    scored = Score(
        client, media, folder, args.samples, args.temperature, args.tokens, policy, args.seed, words, args.unreviewed
    )
    return scored, scored.settings()


def _policy(text: str) -> dict[int, float]:
    """`1:0.1,2:0.25,…` as a table; each score once, each share from 0 to 100."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        policy = {int(score): float(share) for score, share in pairs}
    except ValueError as error:
        raise KeyeError(f"--repeat {text!r} cannot be read; write 1:0.1,2:0.25,3:0.5,4:2,5:3") from error
    valid = all(math.isfinite(share) and 0 <= share <= 100 for share in policy.values())
    if sorted(policy) != [1, 2, 3, 4, 5] or len(pairs) != 5 or not valid:
        raise KeyeError(f"--repeat {text!r} must give each score from 1 to 5 a number of times from 0 to 100")
    return policy


def _review(args: argparse.Namespace) -> int:
    """Serve the review until it is interrupted, then write its output."""
    from rl.reasoning.review import Review
    from rl.reasoning.review_server import ReviewServer

    review = Review(Path(args.input), Path(args.out))
    if not args.export and review.open:
        server = ReviewServer(review, args.port, args.max_visual_tokens)
        print(f"{len(review.open)} of {len(review)} chains are open: {server.url}", flush=True)
        print("Ctrl-C stops and writes the output; the same command continues", flush=True)
        try:
            server.run()
        except KeyboardInterrupt:
            server.http.server_close()
    counts = review.write()
    print(f"{args.out}: " + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    return 0


def _report(step: str, out: Path, summary: dict[str, Any]) -> None:
    """Print counts and cost."""
    for what, count in sorted(summary["counts"].items()):
        print(f"{count:>8g}  {what}")
    if summary["rejected"]:
        first = next(iter(summary["rejected"].values()))
        print(f"{len(summary['rejected']):>8}  lines of the input cannot be used, the first because {first}")
    if step == "generate" and summary["counts"].get("without logprobs"):
        print("the endpoint gave no usable log-probabilities for some answers: their confidence is null")
    print(f"{out}: {json.dumps(summary['requests'])}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    enhance = _add(steps, "enhance", "rewrite questions harder, and merge questions about one video", 1024)
    enhance.add_argument("--merge", action="store_true", help="merge each question with the next about the same media")
    enhance.add_argument("--checks", type=_count, default=1, metavar="N", help="times the answer is asked back")
    generate = _add(steps, "generate", "several trajectories for each question, with confidence", 4096)
    generate.add_argument("--paths", type=_count, default=8, metavar="N", help="trajectories of a question")
    generate.add_argument("--thinking", action="store_true", help="ask for thoughts by chat_template_kwargs")
    grade = _add(steps, "grade", "grades A, B and C by answer and process", 2048)
    grade.add_argument("--votes", type=_count, default=1, metavar="N", help="judgements of a process")
    grade.add_argument("--confidence", type=float, metavar="X", help="an A with a step below X is reviewed, such as -1")
    grade.add_argument("--rules-only", action="store_true", help="no judge: every right answer is reviewed")
    review = _step_parser(steps, "review", "check chains of grade B and borderline A on a local page")
    review.add_argument("--port", type=int, default=0, help="of 127.0.0.1 (default: a free one)")
    review.add_argument("--export", action="store_true", help="write the output from the decisions so far, and end")
    score = _add(steps, "score", "score 1 to 5 by asking with and without media; writes the final set", 4096)
    score.add_argument("--samples", type=_count, default=4, metavar="N", help="answers with the media, and without")
    score.add_argument("--repeat", metavar="S:N,…", help="times in the final set (default: 1:0.1,2:0.25,3:0.5,4:2,5:3)")
    score.add_argument("--seed", type=int, default=0, help="of the fractions of --repeat")
    score.add_argument("--unreviewed", action="store_true", help="use grade B and borderline A without a review")
    for asking in (generate, score):
        asking.add_argument("--temperature", type=float, default=1.0, metavar="T", help="(default: %(default)s)")
        asking.add_argument("--plain", action="store_true", help="send the question without instructions")
    for one in (enhance, generate, grade, review, score):
        one.add_argument("input", help="a JSONL file: questions with an answer, or the output of the step before")
        one.add_argument("out", help="a JSONL file; the summary and the dropped lines are written next to it")
        one.add_argument(
            "--max-visual-tokens", type=_count, default=8_000, metavar="N", help="budget of a video's plan"
        )
    return parser


def _add(steps: Any, name: str, text: str, tokens: int) -> argparse.ArgumentParser:
    """A step that asks a model."""
    step = _step_parser(steps, name, text)
    step.add_argument("--tokens", type=_count, default=tokens, metavar="N", help="of an answer (default: %(default)s)")
    step.add_argument("--limit", type=_count, metavar="N", help="only the first questions")
    step.add_argument("--cache", metavar="DIR", help="folder of all answers (default: answers, next to OUT)")
    step.add_argument("--concurrency", type=_count, default=16, metavar="N", help="requests at a time (default: 16)")
    step.add_argument("--seconds", type=float, default=300.0, metavar="S", help="limit of an answer (default: 300)")
    step.add_argument(
        "--patience", type=float, default=1800.0, metavar="S", help="seconds of retries until the step stops"
    )
    price = "price of a million tokens of"
    step.add_argument("--prompt-price", type=float, default=0.0, metavar="P", help=f"{price} prompts")
    step.add_argument("--completion-price", type=float, default=0.0, metavar="P", help=f"{price} answers")
    step.add_argument("--max-cost", type=float, metavar="C", help="stop before the folder of answers costs more")
    step.add_argument(
        "--send", choices=("frames", "clip", "none"), help="videos as frames of their plan (default), as files for "
        "keye serve and local models (their default), or not at all (grade only)",
    )  # fmt: skip
    step.add_argument("--clip-root", metavar="DIR", help="the server's --media-root; clips are sent as paths in it")
    return step


def _step_parser(steps: Any, name: str, text: str) -> argparse.ArgumentParser:
    shown = {"epilog": EXAMPLES[name], "formatter_class": argparse.RawDescriptionHelpFormatter}
    return steps.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", **shown)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


if __name__ == "__main__":
    run(main)
