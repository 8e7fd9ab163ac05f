"""A local task for lmms-eval: drawn clips, their questions as JSONL, and the task's YAML and functions.

python -m tests.keye.adapters.lmms_task FOLDER      # then: lmms-eval --tasks drawn_clips --include_path FOLDER …
"""

import json
import sys
from pathlib import Path

from keye.world import generate, read_manifest

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
  max_new_tokens: 8
  temperature: 0
  until:
    - "\\n"
process_results: !function utils.process_results
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
"""

FUNCTIONS = """def doc_to_visual(doc):
    return [doc["clip"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"accuracy": float(results[0] == doc["answer"])}
"""


def write_task(folder: Path, count: int = 3, seconds: float = 3) -> Path:
    """Draw the clips and write the task into `folder`; returns the JSONL of the questions."""
    counts = {"count": count, "order": count}
    manifest = generate(folder, "heldout", counts, duration=seconds, size=(112, 112), workers=1, progress=False)
    questions = folder / "questions.jsonl"
    rows = []
    for sample in read_manifest(manifest):
        clip, text = sample["messages"][0]["content"]
        rows.append({"clip": str(folder / clip["video"]), "question": text["text"], "answer": sample["answer"]})
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "drawn_clips.yaml").write_text(TASK.format(questions=questions, cache=folder / "cache"))
    (folder / "utils.py").write_text(FUNCTIONS)
    return questions


if __name__ == "__main__":
    print(write_task(Path(sys.argv[1]).absolute()))
