"""The tracer, graded: does the strongest knock-out fall on a frame that shows the answer?

SlowFastWorld knows when each event of a clip happens, so the frames that show the answer are known. Each held-out
question of a trained model is traced; so is each of an untrained model, as a control.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keye.evaluation.benchmark import ManifestBenchmark, Question
from keye.evaluation.match import match
from keye.evaluation.trace import Prompt, Row, Tracer, commitment_by_cut, knock_out, lens
from keye.evaluation.trace.coherence import cas_of, pathway_strength
from keye.evaluation.trace.groups import TokenGroup
from keye.evaluation.trace.tracer import Cut

FAMILIES = ("find", "read", "order", "count", "when", "motion")
LOCATED = ("find", "read", "order", "count", "when")
"""Families whose answer is in some frames; a motion is in all of them."""
LONGEST = 8
"""Tokens of an answer; those of the world have fewer, and an untrained model does not end its answer."""
METHODS = ("knock-out", "direct knock-out", "KL of the knock-out", "attention", "most tokens")


def grade(run: Path, trained: bool, limit: int | None, advance: Callable[[], object]) -> list[dict[str, Any]]:
    """A row for each held-out question of a run, as JSON values: by its model, or by one with random weights.

    limit: questions of each family. advance: called after each.
    """
    from keye.inference.chat import load_model
    from keye.model.keye import KeyeForConditionalGeneration

    model, processor = load_model(run / "annealing/model", "cpu")
    if not trained:
        torch.manual_seed(0)
        model = KeyeForConditionalGeneration(model.config).eval()
    tracer, manifest, rows = Tracer(model), run / "world/heldout.jsonl", []
    meta = {row["id"]: row["meta"] for row in map(json.loads, manifest.read_text(encoding="utf-8").splitlines())}
    for question in ManifestBenchmark(manifest, FAMILIES, limit):
        rows.append(row_of(tracer, processor, question, meta[question.id]))
        advance()
    return rows


def row_of(tracer: Tracer, processor: Any, question: Question, meta: dict[str, Any]) -> dict[str, Any]:
    """The trace of one question and what the world knows about it."""
    tokenizer = processor.tokenizer
    sample = processor.sample(question.messages, base_dir=question.base_dir, add_generation_prompt=True)
    prompt = Prompt.of_sample(tracer.model, processor, sample)
    ids = tracer.answer(prompt, [tokenizer.eos_token_id], LONGEST)
    reply = tokenizer.decode(ids, skip_special_tokens=True).strip()
    effects = {effect.group.name: effect for effect in knock_out(tracer, prompt, ids)}
    frames = [effects[group.name] for group in prompt.groups if group.kind == "frame"]
    shown = evidence([effect.group for effect in frames], meta)
    visual = prompt.group("all visual tokens")
    config = tracer.model.config
    alone = prompt.without(visual.places, config.image_token_id, config.video_token_id)
    cut = tracer.run(prompt, ids, [Row((Cut(visual.places),))])
    found = {
        "id": question.id, "family": question.family, "reply": reply, "answer": question.answer,
        "right": bool(match(reply, question.answer, question.tolerance, question.options)),
        "score": float(tracer.run(prompt, ids).score[0]),
        "identity": float((cut.log_probs - tracer.run(alone, ids).log_probs).abs().max()),
        "frames": [
            {
                "fast": bool(effect.group.fast), "tokens": len(effect.group), "evidence": seen, "nats": effect.nats,
                "direct": effect.answer_nats, "kl": effect.kl, "attention": effect.attention,
            }
            for effect, seen in zip(frames, shown, strict=True)
        ],
        "kinds": {
            name: {"tokens": len(effects[name].group), "nats": effects[name].nats, "attention": effects[name].attention}
            for name in ("all slow frames", "all fast frames") if name in effects
        },
        "by_cut": commitment_by_cut(tracer, prompt), "by_lens": lens(tracer, prompt, ids).settled,
    }  # fmt: skip
    return found | coherence(tracer, prompt, tokenizer, question, reply, [e.group for e in frames], shown)


def evidence(frames: Sequence[TokenGroup], meta: dict[str, Any]) -> list[bool]:
    """Whether each frame is taken during an event of the question; of "count" those of the asked colour."""
    asked = meta.get("colour")
    events = [e for e in meta.get("events", []) if asked is None or e.get("colour", asked) == asked]
    return [any(e["start"] - 1e-3 <= frame.seconds < e["end"] - 1e-3 for e in events) for frame in frames]


def coherence(
    tracer: Tracer,
    prompt: Prompt,
    tokenizer: Any,
    question: Question,
    reply: str,
    frames: Sequence[TokenGroup],
    shown: Sequence[bool],
) -> dict[str, float]:
    """CAS and DSS of a question, the means over blocks.

    "cas": the right option against the others, as the paper's word lists, which know the truth. "cas of the reply": the
    option that was given against the others. "dss": pathways from the frames that show the answer to the last token
    against those from other frames, one mean strength each.
    """
    found: dict[str, float] = {}
    options = question.options or []
    for name, chosen in (("cas", question.answer), ("cas of the reply", reply)):
        if chosen in options:
            others = [option for option in options if option != chosen]
            found[name] = float(cas_of(tracer, prompt, tokenizer, [chosen], others, space=False).mean())
    if any(shown) and not all(shown):
        states = tracer.states(prompt, [*(frame.places[-1] for frame in frames), len(prompt) - 1])[1:]
        strengths = torch.stack([pathway_strength(states[:, [at, -1]]) for at in range(len(frames))])
        seen = torch.tensor(shown)
        right, wrong = strengths[seen].mean(0), strengths[~seen].mean(0)
        found["dss"] = float((right / (right + wrong)).mean())
    return found


def values(row: dict[str, Any], method: str) -> np.ndarray:
    """What a method says about each frame `[T]`."""
    key = {"knock-out": "nats", "direct knock-out": "direct", "KL of the knock-out": "kl", "attention": "attention",
           "most tokens": "tokens"}[method]  # fmt: skip
    return np.array([frame[key] for frame in row["frames"]], dtype=float)


def hit(row: dict[str, Any], method: str) -> float:
    """Whether the strongest frame shows the answer; with ties the expected value of a random choice among them."""
    found = values(row, method)
    shown = np.array([frame["evidence"] for frame in row["frames"]], dtype=float)
    return float(shown[found == found.max()].mean())


def chance(row: dict[str, Any]) -> float:
    """Probability that a random frame shows the answer."""
    return float(np.mean([frame["evidence"] for frame in row["frames"]]))


def gradable(row: dict[str, Any]) -> bool:
    """Whether some frames show the answer and others do not."""
    return row["family"] in LOCATED and 0 < chance(row) < 1


def share_on_evidence(row: dict[str, Any]) -> float:
    """Share of the positive effect of frames that lies on those that show the answer; chance without any effect."""
    found = np.maximum(values(row, "knock-out"), 0)
    shown = np.array([frame["evidence"] for frame in row["frames"]])
    return float(found[shown].sum() / found.sum()) if found.sum() > 0 else chance(row)


def slow_shares(row: dict[str, Any]) -> tuple[float, float, float] | None:
    """Slow frames' share of tokens, of the positive effect and of attention; None without both kinds or any effect."""
    if len(row["kinds"]) < 2:
        return None
    slow, fast = row["kinds"]["all slow frames"], row["kinds"]["all fast frames"]
    effect = [max(0.0, kind["nats"]) for kind in (slow, fast)]
    if not sum(effect):
        return None
    tokens, attention = ([kind[name] for kind in (slow, fast)] for name in ("tokens", "attention"))
    return tokens[0] / sum(tokens), effect[0] / sum(effect), attention[0] / sum(attention)
