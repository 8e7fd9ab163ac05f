"""A complete trace of one answer, as JSON values: the command `keye trace` writes it, and draws its page from it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from keye.errors import KeyeError
from keye.evaluation.controls import other
from keye.evaluation.trace.coherence import cas_markers, cas_of
from keye.evaluation.trace.groups import of_kind
from keye.evaluation.trace.knockout import Effect, commitment_by_cut, knock_out, shares, windows_of
from keye.evaluation.trace.lens import Lens, lens
from keye.evaluation.trace.patching import handed_over, patch
from keye.evaluation.trace.prompt import Prompt
from keye.evaluation.trace.semantic import semantic_map
from keye.evaluation.trace.tracer import Tracer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from keye.model.keye import KeyeForConditionalGeneration
    from keye.processor.processor import KeyeProcessor
    from keye.processor.sample import Sample

LONGEST = 8192
"""Longest prompt whose groups are hidden from all later tokens; in a longer one only from the answer's own tokens."""
MOST_NEW_TOKENS = 32

Readings = tuple[Sequence[str], Sequence[str]]


def trace_video(
    model: "KeyeForConditionalGeneration",
    processor: "KeyeProcessor",
    messages: Sequence[dict[str, Any]],
    base_dir: str | Path = ".",
    answer: str | None = None,
    counterfactual: Sequence[dict[str, Any]] | None = None,
    readings: Readings | None = None,
    window: int | None = None,
    layer: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Trace the answer of a Keye model to a chat with clips, images or only text.

    Args:
        model, processor: of one directory.
        messages: the chat, its last turn the user's.
        base_dir: folder of relative paths.
        answer: trace this one (default: the model's own greedy answer).
        counterfactual: a chat with other clips and images, whose pixels take the places of the first one's.
        readings: words of the intended and of the competing reading, for CAS.
        window: blocks of a window (default: an eighth of the depth).
        layer: block of the semantic map, from 0 (default: no map).
        progress: show a bar.

    Returns:
        JSON values: docs/five-systems/trace.md describes the keys.

    Raises:
        KeyeError: a chat that cannot be read, an empty answer, or a counterfactual with the same answer.
    """
    sample = processor.sample(messages, base_dir=base_dir, add_generation_prompt=True)
    prompt = Prompt.of_sample(model, processor, sample)
    changed = None
    if counterfactual is not None:
        source = processor.sample(counterfactual, base_dir=base_dir, add_generation_prompt=True)
        changed = Prompt.of_sample(model, processor, other(sample, source))
    found = _trace(Tracer(model), processor.tokenizer, prompt, answer, changed, readings, window, layer, progress)
    return {"question": _question(messages), "clips": _clips(sample), **found}


def trace_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    answer: str | None = None,
    counterfactual: str | None = None,
    readings: Readings | None = None,
    window: int | None = None,
    layer: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Trace how a causal LM of transformers continues a text; arguments, result and errors as for `trace_video`.

    counterfactual: another text. Groups are patched if it has the same number of tokens, otherwise only the state of
    the last token.
    """
    prompt = Prompt.of_text(model, tokenizer, text)
    changed = None if counterfactual is None else Prompt.of_text(model, tokenizer, counterfactual)
    found = _trace(Tracer(model), tokenizer, prompt, answer, changed, readings, window, layer, progress)
    return {"question": text, "clips": [], **found}


def _trace(
    tracer: Tracer,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    answer: str | None,
    changed: Prompt | None,
    readings: Readings | None,
    window: int | None,
    layer: int | None,
    progress: bool,
) -> dict[str, Any]:
    windows = windows_of(tracer.anatomy.depth, window)
    readers = "later" if len(prompt) <= LONGEST else "answer"
    with _bar(progress, 5 + len(windows)) as advance:
        ids = _answer(tracer, tokenizer, prompt, answer)
        advance()
        effects = knock_out(tracer, prompt, ids, windows=windows, readers=readers, advance=advance)
        look = lens(tracer, prompt, ids)
        score = float(tracer.run(prompt, ids).score[0])
        found = {
            "answer": tokenizer.decode(ids, skip_special_tokens=True).strip(),
            "answer_log_prob": score,
            "tokens": len(prompt),
            "depth": tracer.anatomy.depth,
            "readers": readers,
            "windows": [list(one) for one in windows],
            "groups": [_group(effect) for effect in effects],
            "shares": _shares(effects),
            "lens": {
                "top": [tokenizer.decode([token]) for token in look.top],
                "top_probability": list(look.top_probability),
                "answer_log_prob": list(look.answer_log_prob),
                "kl": list(look.kl),
            },
            "commitment": _commitment(tracer, prompt, look, ids[0]),
        }
        if changed is not None:
            found["counterfactual"] = _compared(tracer, tokenizer, prompt, changed, ids)
        if readings is not None:
            found["coherence"] = _coherence(tracer, tokenizer, prompt, readings)
        if layer is not None:
            one = semantic_map(tracer, prompt, tokenizer, layer)
            found["map"] = {
                "layer": layer,
                "nodes": [vars(node) for node in one.nodes],
                "edges": [vars(edge) for edge in one.edges],
            }
        advance()
    return found


@contextlib.contextmanager
def _bar(show: bool, steps: int) -> Iterator[Callable[[], object]]:
    with Progress(disable=not show, transient=True) as bar:
        task = bar.add_task("trace", total=steps)
        yield lambda: bar.advance(task)


def _answer(tracer: Tracer, tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, given: str | None) -> list[int]:
    if given is None:
        generation = getattr(tracer.model, "generation_config", None)
        ends = getattr(generation, "eos_token_id", None) or []
        ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
        return tracer.answer(prompt, [end for end in ends if end is not None], MOST_NEW_TOKENS)
    ids = tokenizer(given, add_special_tokens=False)["input_ids"]
    if not ids:
        raise KeyeError("--answer is empty; give the text to trace, or leave it out for the model's own answer")
    return ids


def _commitment(tracer: Tracer, prompt: Prompt, look: Lens, first: int) -> dict[str, int | None]:
    """Blocks after which the answer's first token is settled; None if the model begins its answer with another one."""
    if look.top[-1] != first:
        return {"by_cut": None, "by_lens": None}
    return {"by_cut": commitment_by_cut(tracer, prompt), "by_lens": look.settled}


def _group(effect: Effect) -> dict[str, Any]:
    group = effect.group
    return {
        "name": group.name, "kind": group.kind, "tokens": len(group), "frame": group.frame, "seconds": group.seconds,
        "fast": group.fast, "nats": effect.nats, "answer_nats": effect.answer_nats, "kl": effect.kl,
        "flips": effect.flips, "attention": effect.attention, "windows": list(effect.windows),
    }  # fmt: skip


def _shares(effects: Sequence[Effect]) -> dict[str, dict[str, float | None]]:
    """Share of tokens, effect and attention of slow and of fast frames among both; None without an effect above 0."""
    both = {effect.group.kind: effect for effect in effects if effect.group.kind in ("slow", "fast")}
    tokens = sum(len(effect.group) for effect in both.values())
    attention = sum(effect.attention for effect in both.values())
    effect_of = shares(effects)
    return {
        kind: {
            "tokens": len(effect.group) / tokens,
            "effect": effect_of[kind] if effect_of[kind] == effect_of[kind] else None,
            "attention": effect.attention / attention if attention else None,
        }
        for kind, effect in both.items()
    }


def _compared(
    tracer: Tracer, tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, changed: Prompt, ids: list[int]
) -> dict[str, Any]:
    """The answer of the counterfactual prompt, and what states of the first one restore in its run."""
    wrong = _answer(tracer, tokenizer, changed, None)
    found: dict[str, Any] = {"answer": tokenizer.decode(wrong, skip_special_tokens=True).strip()}
    if wrong == ids:
        return {**found, "note": "the counterfactual has the same answer, so no state can restore it"}
    if not (prompt.positions.shape == changed.positions.shape and bool((prompt.positions == changed.positions).all())):
        found["note"] = "the prompts have different lengths, so only the state of the last token is patched"
        return {**found, "handed_over": handed_over(tracer, prompt, changed, (ids, wrong))}
    kinds = ("frame", "image", "slow", "fast", "timestamps", "question", "word")
    patched = patch(tracer, prompt, changed, (ids, wrong), of_kind(prompt.groups, *kinds))
    return {
        **found, "right": patched.right, "wrong": patched.wrong, "handed_over": patched.handed_over,
        "committed": patched.committed, "groups": [group.name for group in patched.groups],
        "restored": [[None if v != v else v for v in values] for values in patched.restored],
    }  # fmt: skip


def _coherence(
    tracer: Tracer, tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, readings: Readings
) -> dict[str, Any]:
    """CAS under each of the four choices, with its markers."""
    found = []
    for space in (False, True):
        for normed in (False, True):
            scores = cas_of(tracer, prompt, tokenizer, *readings, space=space, normed=normed).tolist()
            markers = vars(cas_markers(scores))
            found.append({"space": space, "normed": normed, "scores": scores, **markers})
    return {"intended": list(readings[0]), "competing": list(readings[1]), "cas": found}


def _question(messages: Sequence[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if "text" in part)


def _clips(sample: "Sample") -> list[dict[str, Any]]:
    """The plan of each clip, so that a page can show its frames."""
    return [
        {"source": plan.source, "frames": len(plan), "tokens": plan.tokens, "seconds": plan.timestamps.tolist()}
        for plan in sample.plans
    ]
