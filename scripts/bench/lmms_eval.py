"""Does a trained model answer in lmms-eval as in `keye evaluate`?

`keye evaluate` and, as a local task, lmms-eval in an environment of its own (docs/evaluation.md) ask the held-out
questions of SlowFastWorld about clips; lmms-eval with one answer and with several at a time. Replies are compared word
by word. Results: docs/results/evaluation.md.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from keye.errors import KeyeError, run
from keye.evaluation import ManifestBenchmark, Question, Report, evaluate, match
from keye.inference.chat import load_model
from scripts.bench.common.record import ROOT, Claim, Table, arguments, document, out_of, save

EXAMPLES = """examples:
  python -m scripts.bench.lmms_eval runs/demo/gspo/model runs/demo/world/heldout.jsonl --python lmms/bin/python
"""
HEAD = """# Evaluation, measured

Does a trained model answer in lmms-eval as in `keye evaluate`? To repeat the measurement: `python -m
scripts.bench.lmms_eval`, with the model and the world of the demo and the environment of
[docs/evaluation.md](../evaluation.md)."""
FAMILIES = ("read", "count", "order", "when", "find", "motion")
MAX_NEW_TOKENS = 32
TASK = """task: drawn_clips
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {limit}
  temperature: 0
process_results: !function utils.process_results
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """from keye.evaluation import match


def doc_to_visual(doc):
    return [doc["clip"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"accuracy": float(match(results[0], doc["answer"], doc["tolerance"], doc["options"]))}
"""


def main() -> None:
    parser = arguments(__doc__, EXAMPLES, results="evaluation")
    parser.add_argument("model", help="a model directory")
    parser.add_argument("manifest", help="questions about clips, of python -m keye.world")
    parser.add_argument("--python", required=True, help="the interpreter of an environment with lmms-eval")
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument(
        "--limit", type=int, metavar="N", help="questions of each family (default: all; 4 with --quick)"
    )
    args = parser.parse_args()
    began, out = time.monotonic(), out_of(args)
    limit = args.limit or (4 if args.quick else None)
    model, processor = load_model(args.model, "cpu")
    settings = {"families": args.families, "limit": limit, "max_new_tokens": MAX_NEW_TOKENS, "batch_size": 1}
    report = evaluate(model, processor, args.manifest, **settings)
    rows, claims = [_row("keye evaluate", report, report)], []
    with tempfile.TemporaryDirectory(prefix="keye-lmms-") as scratch:
        questions = list(ManifestBenchmark(args.manifest, args.families, limit))
        write_task(Path(scratch), questions, MAX_NEW_TOKENS)
        for size in (1, 8):
            replies, version = ask(args.python, args.model, Path(scratch), size)
            same = sum(reply == one.prediction for reply, one in zip(replies, report.outcomes, strict=True))
            figure = f"{same} of {len(replies)}"
            claims.append(Claim(f"equal replies, batch size {size}", "all", figure, met=same == len(replies)))
            rows.append(_row(f"lmms-eval {version}, batch size {size}", graded(report, replies), report))
    columns = ["asked by", *report.families, "all", "equal replies"]
    table = Table("Accuracy in per cent", columns, rows)
    save(out, "plugin", claims, [table], seconds=time.monotonic() - began, quick=args.quick)
    path = (out if args.quick or args.out else out.parent) / "evaluation.md"
    path.write_text(document(out, ["plugin"], HEAD), encoding="utf-8")
    print(f"written: {path}")


def _row(name: str, report: Report, reference: Report) -> list[str | int]:
    same = sum(a.prediction == b.prediction for a, b in zip(report.outcomes, reference.outcomes, strict=True))
    scores = [f"{100 * row.accuracy:.1f}" for row in (*report.families.values(), report.overall)]
    return [name, *scores, same]


def graded(report: Report, replies: Sequence[str]) -> Report:
    """The report with other replies, graded again."""
    outcomes = [
        replace(one, prediction=reply, correct=match(reply, one.answer)) if reply != one.prediction else one
        for one, reply in zip(report.outcomes, replies, strict=True)
    ]
    return Report(report.name, outcomes)


def write_task(folder: Path, questions: Sequence[Question], limit: int) -> Path:
    """Write a task of lmms-eval, `drawn_clips`, with a line for each question about one clip.

    Args:
        folder: for the task.
        questions: of a manifest; the first part is the clip, the second the text.
        limit: most tokens of a reply.

    Returns:
        The JSONL of the questions.
    """
    folder = folder.absolute()
    rows = []
    for question in questions:
        clip, text = question.messages[0]["content"]
        if clip["type"] != "video":
            raise KeyeError(f"question {question.id} is not about a clip; choose other --families")
        rows.append(
            {
                "clip": str(question.base_dir.absolute() / clip["video"]),
                "question": text["text"],
                "answer": question.answer,
                "options": question.options,
                "tolerance": question.tolerance,
            }
        )
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = TASK.format(questions=path, cache=folder / "cache", limit=limit)
    (folder / "drawn_clips.yaml").write_text(task, encoding="utf-8")
    (folder / "utils.py").write_text(FUNCTIONS, encoding="utf-8")
    return path


def ask(python: str, model: str, task: Path, batch_size: int) -> tuple[list[str], str]:
    """The replies that lmms-eval gets, and its version."""
    out = task / f"out{batch_size}"
    python = str(Path(python).absolute())
    command = [python, "-m", "lmms_eval", "--model", "keye", "--model_args", f"pretrained={Path(model).absolute()}"]
    command += ["--tasks", "drawn_clips", "--include_path", str(task), "--batch_size", str(batch_size)]
    command += ["--output_path", str(out), "--log_samples", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(task / "hf")}
    environment.pop("VIRTUAL_ENV", None)
    out.mkdir(exist_ok=True)
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, check=False)
    samples = list(out.rglob("*samples_drawn_clips.jsonl"))
    if done.returncode or not samples:
        raise KeyeError(f"lmms-eval failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}; see --python")
    found = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, samples[0].open(encoding="utf-8"))}
    script = "from importlib.metadata import version; print(version('lmms-eval'))"
    version = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    return [found[number] for number in sorted(found)], version


if __name__ == "__main__":
    sys.exit(run(main))
