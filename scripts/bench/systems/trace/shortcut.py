"""A planted shortcut: does the trace name it?

In the training questions of two families a sentence names an answer, "Someone says red."; for a share of them it is the
right one and their clip is that of another question (`scripts.bench.rl.blindness.plant`). In held-out questions the
named answer is drawn at random and the clip is right. A short fine-tuning of the decoder on a share of 0 leaves the
model looking; on 90 % it learns to follow the words.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keye.evaluation.benchmark import ManifestBenchmark
from keye.evaluation.match import match
from keye.evaluation.trace import Prompt, TokenGroup, Tracer, knock_out, of_kind
from keye.world.manifest import read_manifest
from scripts.bench.rl.blindness import plant
from scripts.bench.systems.trace.grading import LONGEST

SHARES = (0.0, 0.5, 0.9)
SEEDS = (21, 22, 23)
STEPS, ROWS, RATE = 120, 16, 5e-4
WORDS = 4
"""Words of the sentence that names an answer, with its full stop."""


def shortcut(
    run: Path, scratch: Path, share: float, seed: int, steps: int, limit: int | None, advance: Callable[[], object]
) -> list[dict[str, Any]]:
    """Train on a share of planted questions, then trace the held-out ones: a row each.

    limit: held-out questions of each family. advance: called after each step and each question.
    """
    from keye.inference.chat import load_model

    out = scratch / f"world-{share:g}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    plant(run / "world", out, seed, share)
    model, processor = load_model(run / "annealing/model", "cpu")
    train(model, processor, out / "world/train.jsonl", seed, steps, advance)
    tracer, rows = Tracer(model), []
    for question in ManifestBenchmark(out / "world/heldout.jsonl", limit=limit):
        rows.append(row_of(tracer, processor, question))
        advance()
    return rows


def train(model: Any, processor: Any, manifest: Path, seed: int, steps: int, advance: Callable[[], object]) -> None:
    """Fine-tune the decoder on questions and answers; the vision tower and the projector are frozen."""
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    rows = read_manifest(manifest)
    model.requires_grad_(False)
    model.language_model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.language_model.parameters(), lr=RATE, weight_decay=0.0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10) * (1 - step / steps)
        picks = draw.choice(len(rows), min(ROWS, len(rows)), replace=False)
        samples = []
        for pick in picks:
            answer = {"role": "assistant", "content": rows[pick]["answer"]}
            samples.append(processor.sample([*rows[pick]["messages"], answer], base_dir=manifest.parent))
        loss = model(**processor.collate(samples)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.language_model.parameters(), 1.0)
        optimizer.step()
        advance()
    model.eval()


def row_of(tracer: Tracer, processor: Any, question: Any) -> dict[str, Any]:
    """What the model answers to a held-out question, and the effect and attention of its parts."""
    tokenizer = processor.tokenizer
    sample = processor.sample(question.messages, base_dir=question.base_dir, add_generation_prompt=True)
    prompt = Prompt.of_sample(tracer.model, processor, sample)
    words = of_kind(prompt.groups, "word")
    said = TokenGroup("sentence", "context", tuple(place for word in words[-WORDS:] for place in word.places))
    rest = TokenGroup("question", "question", tuple(place for word in words[:-WORDS] for place in word.places))
    ids = tracer.answer(prompt, [tokenizer.eos_token_id], LONGEST)
    reply = tokenizer.decode(ids, skip_special_tokens=True).strip()
    groups = (said, rest, prompt.group("all visual tokens"), prompt.group("timestamps"))
    effects = knock_out(tracer, prompt, ids, groups)
    return {
        "id": question.id, "family": question.family, "reply": reply, "named": words[-2].name,
        "answer": question.answer, "right": bool(match(reply, question.answer, None, question.options)),
        "followed": reply == words[-2].name,
        "effects": {effect.group.name: effect.nats for effect in effects},
        "attention": {effect.group.name: effect.attention for effect in effects},
    }  # fmt: skip


def telling(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose named answer is wrong, so that following the words and the frames differ."""
    return [row for row in rows if row["named"] != row["answer"]]


def names(row: dict[str, Any], measure: str = "effects") -> bool:
    """Whether the sentence has a larger effect (or more attention) than the visual tokens."""
    return row[measure]["sentence"] > row[measure]["all visual tokens"]


def auc(rows: list[dict[str, Any]], measure: str) -> float:
    """Probability that a followed answer's margin of the sentence over the frames exceeds that of another answer."""
    margin = np.array([row[measure]["sentence"] - row[measure]["all visual tokens"] for row in rows])
    followed = np.array([row["followed"] for row in rows])
    one, other = margin[followed], margin[~followed]
    if not len(one) or not len(other):
        return float("nan")
    return float((np.sign(one[:, None] - other[None]) / 2 + 0.5).mean())
