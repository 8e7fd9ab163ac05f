"""A temporary LoRA as the memory of a video-language model: questions about a clip that has left the context.

While it sees the clip, the model answers probe questions of every family, never in the words that are asked later. The
memory is written with these questions and answers, without the clip, as the original Temp-LoRA is written with the text
that the model has generated (arXiv 2401.11504). Then the question is asked without the clip. Two controls say what the
memory holds: one is written without any probe of the question's family, one has the probes and answers as text in the
context.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keye.errors import KeyeError
from keye.evaluation.evaluate import generate_replies
from keye.evaluation.match import match
from keye.memory import TemporaryLora, attach
from keye.world.draft import QUESTIONS
from keye.world.scene import COLOURS

FAMILIES = ("read", "find", "order", "motion", "when", "count")
ARMS = (
    "clip in the context", "same bytes as fast tokens", "LoRA memory", "LoRA memory of other families",
    "LoRA memory of another clip", "the answers as text", "nothing",
)  # fmt: skip
MATCH = r"language_model\.layers\.\d+\.self_attn\.(q|v)_proj$"
RANK, RATE, STEPS = 2, 1e-2, 30


def read_arm(run: Path, arm: str, seed: int, each: int, steps: int = STEPS) -> dict[str, Any]:
    """Right answers of an arm on `each` held-out clips of each family; seeds have different clips.

    Returns:
        {"bytes": of the memory, "tokens": of the same size, "right": {family: [0 or 1]}}

    Raises:
        KeyeError: the run has no model or too few clips.
    """
    from keye import KeyeForConditionalGeneration, KeyeProcessor

    folder, manifest = run / "annealing" / "model", run / "world" / "heldout.jsonl"
    if not folder.is_dir() or not manifest.is_file():
        raise KeyeError(f"{run} has no annealing/model or world/heldout.jsonl; make a run with scripts/demo")
    model = KeyeForConditionalGeneration.from_pretrained(folder).eval()
    processor = KeyeProcessor.from_pretrained(folder)
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    right: dict[str, list[int]] = {family: [] for family in FAMILIES}
    memory = attach(model, RANK, match=MATCH, learning_rate=RATE, max_norm=1.0, seed=seed)
    tokens = memory.nbytes // (4 * model.config.text_config.hidden_size)
    for family in FAMILIES:
        found = [row for row in rows if row["family"] == family][seed * each : (seed + 1) * each]
        if len(found) < each:
            raise KeyeError(f"{manifest} has too few rows of {family}; give a smaller --clips")
        for index, row in enumerate(found):
            probes = _probes(row, np.random.default_rng([seed, index]))
            other = found[(index + 1) % each]
            clip, few = _clip(row, manifest.parent), _clip(row, manifest.parent, tokens)
            memory.reset()
            shown: list[dict[str, Any]] = []
            before: list[dict[str, Any]] = []
            if arm in ("clip in the context", "same bytes as fast tokens"):
                shown = [clip if arm == "clip in the context" else few]
            elif arm == "the answers as text":
                before = [turn for chat in _answered(model, processor, clip, probes) for turn in chat]
            elif arm != "nothing":
                source = _clip(other, manifest.parent) if arm == "LoRA memory of another clip" else clip
                if arm == "LoRA memory of other families":
                    probes = [probe for probe in probes if not _is_of(probe, family)]
                _remember(model, processor, memory, _answered(model, processor, source, probes), steps)
            reply = _ask(model, processor, shown, [_question(row)], before)[0]
            right[family].append(
                int(match(reply.text, row["answer"], row["tolerance"], row["options"], reply.finished))
            )
    return {"bytes": memory.nbytes, "tokens": tokens, "right": right}


def _question(row: dict[str, Any]) -> str:
    return row["messages"][0]["content"][-1]["text"]


def _clip(row: dict[str, Any], folder: Path, tokens: int | None = None) -> dict[str, Any]:
    """The video of a row as an element of a chat, with at most `tokens` tokens."""
    video = str(folder / row["messages"][0]["content"][0]["video"])
    return {"type": "video", "video": video, **({} if tokens is None else {"max_tokens": tokens})}


def _probes(row: dict[str, Any], rng: np.random.Generator) -> list[str]:
    """Both phrasings of every family with drawn colours, without the words of the row's own question."""
    asked, probes = _question(row), []
    for family in FAMILIES:
        for phrasing in QUESTIONS[family]:
            one, other = rng.choice(sorted(COLOURS), 2, replace=False)
            words = f"{one} or {other}" if family == "order" else str(one)
            probes.append(phrasing.format(words))
    same = next((text for text in QUESTIONS[row["family"]] if asked.startswith(text.split("{")[0])), asked)
    return [probe for probe in probes if not probe.startswith(same.split("{")[0])]


def _is_of(probe: str, family: str) -> bool:
    """Whether a probe asks about this family in any words."""
    return any(probe.startswith(text.split("{")[0]) for text in QUESTIONS[family])


def _answered(model: Any, processor: Any, clip: dict[str, Any], probes: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Chats of the probes and the model's own answers, which it gives while it sees the clip."""
    replies = _ask(model, processor, [clip], probes)
    return [
        [{"role": "user", "content": probe}, {"role": "assistant", "content": reply.text}]
        for probe, reply in zip(probes, replies, strict=True)
        if reply.finished and reply.text
    ]


def _remember(
    model: Any, processor: Any, memory: TemporaryLora, chats: Sequence[list[dict[str, Any]]], steps: int
) -> None:
    """Write the chats."""
    if not chats:
        return
    batch = processor.collate([processor.sample(chat) for chat in chats])
    memory.write(lambda: model(**batch, use_cache=False).loss, steps)


def _ask(
    model: Any,
    processor: Any,
    media: Sequence[dict[str, Any]],
    questions: Sequence[str],
    before: Sequence[dict[str, Any]] = (),
) -> list[Any]:
    """Replies to questions about the media, each after the turns `before`."""
    samples = [
        processor.sample(
            [*before, {"role": "user", "content": [*media, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    return generate_replies(model, processor, samples, max_new_tokens=16)
