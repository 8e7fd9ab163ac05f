"""Rule-based rewards on text: the right answer, the right option, the same words, the right form, the length.

All are bounded: a reply longer than `LONGEST` characters, or than its rule allows, earns nothing without being read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from keye.errors import RecipeError
from keye.evaluation.choices import pick
from keye.evaluation.match import match, normalise
from rl.rewards.base import Judgement, register

LONGEST = 100_000
"""Longest answer in characters that a rule reads."""

_TAGS = re.compile(r"</?(?:think|answer)>")
_TAGGED = re.compile(r"\s*(?:<think>.*?</think>\s*)?<answer>(.+?)</answer>\s*", re.DOTALL)
_THOUGHT = re.compile(r"\s*<think>(.+?)</think>", re.DOTALL)
_FORMS = (["<think>", "</think>", "<answer>", "</answer>"], ["<answer>", "</answer>"])
_SUFFIX = re.compile(r"/(no_)?think\s*$")
MODES = ("any", "think", "no_think", "auto", "prompt")


@register("accuracy")
class Accuracy:
    """1 when the completion ended by itself and gives the manifest's answer, by the rule of `keye.evaluation.match`."""

    in_process = True

    def __call__(self, judgement: Judgement) -> float:
        prompt = judgement.prompt
        return float(match(judgement.text, prompt.answer, prompt.tolerance, prompt.options, judgement.finished))


@register("choice")
class Choice:
    """1 when the answer picks the right one of the manifest's `options`, by letter or by text, and no other.

    Raises:
        ValueError: when called, a question without options or whose answer is none of them.
    """

    in_process = True

    def __call__(self, judgement: Judgement) -> float:
        prompt = judgement.prompt
        if not prompt.options or pick(prompt.answer, prompt.options) is None:
            raise ValueError(f"the manifest's answer {prompt.answer!r:.80} is none of its options")
        return float(match(judgement.text, prompt.answer, None, prompt.options, judgement.finished))


def accepted(judgement: Judgement) -> list[str]:
    """The accepted answers of a question: its `answer`, and the list `answers` of its manifest line.

    Raises:
        ValueError: `answers` is not a list of texts.
    """
    more = judgement.prompt.extra.get("answers", [])
    if not isinstance(more, list) or not all(isinstance(text, str) for text in more):
        raise ValueError(f"answers is {more!r:.80}, but must be a list of texts")
    return [judgement.prompt.answer, *more]


@register("exact")
class Exact:
    """1 when the answer has the words of an accepted one, ignoring case, articles and punctuation at their edges."""

    in_process = True

    def __call__(self, judgement: Judgement) -> float:
        known = accepted(judgement)
        answer = judgement.answer
        if len(answer) > 2 * max(map(len, known)) + 100:
            return 0.0
        words = normalise(answer)
        return float(bool(words) and words in map(normalise, known))


@register("anls")
@dataclass(frozen=True)
class Anls:
    """Average normalised Levenshtein similarity (arXiv 1907.00490) to the nearest accepted answer.

    1 − distance / length of the longer text, in lower case and with single spaces; 0 up to `threshold`.
    """

    threshold: float = 0.5
    """Similarity above which the answer earns something."""

    in_process = True

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise RecipeError(f"the key threshold of the reward anls is {self.threshold}; set it above 0 and up to 1")

    def __call__(self, judgement: Judgement) -> float:
        answer, known = judgement.answer, accepted(judgement)
        if len(answer) > 4 * max(map(len, known)) + 100:
            return 0.0
        best = max(similarity(" ".join(answer.lower().split()), " ".join(text.lower().split())) for text in known)
        return best if best > self.threshold else 0.0


def similarity(one: str, two: str) -> float:
    """1 − Levenshtein distance / length of the longer text; 0 if one is empty or less than half as long."""
    if not one or not two or 2 * min(len(one), len(two)) < max(len(one), len(two)):
        return 0.0  # the distance is at least the difference of the lengths, so the similarity is below 0.5
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(two, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return 1 - row[-1] / max(len(one), len(two))


@register("format")
@dataclass(frozen=True)
class Format:
    """1 when the completion ended by itself and is either one plain line or `<think>…</think><answer>…</answer>`.

    The thought may be left out (`/no_think`); each tag occurs once, there is no text outside, and the answer is not
    blank. `mode` demands a form.
    """

    mode: str = "any"
    """ "any" and "auto": as above. "think": a thought that is not blank, and an answer, both in tags. "no_think": no
    thought. "prompt": as the suffix `/think` or `/no_think` of the question asks, "auto" without one."""

    in_process = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RecipeError(f"the key mode of the reward format is {self.mode!r}; use one of {', '.join(MODES)}")

    def __call__(self, judgement: Judgement) -> float:
        text = judgement.text
        if not judgement.finished or not text.strip() or len(text) > 20 * LONGEST:
            return 0.0
        mode = mode_of(judgement.prompt.messages) if self.mode == "prompt" else self.mode
        tags = _TAGS.findall(text)
        if not tags:
            return float("\n" not in text.strip() and mode != "think")
        tagged = _TAGGED.fullmatch(text) if tags in _FORMS else None
        if tagged is None or not tagged[1].strip():
            return 0.0
        thought = _THOUGHT.match(text)
        if mode == "think":
            return float(thought is not None and bool(thought[1].strip()))
        return float(mode != "no_think" or len(tags) == 2)


def mode_of(messages: list[dict[str, Any]]) -> str:
    """The mode that the last user turn asks for by its suffix: "think", "no_think", or "auto" without one."""
    content = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    if not isinstance(content, str):
        texts = [part["text"] for part in content if "text" in part]
        content = texts[-1] if texts else ""
    found = _SUFFIX.search(content)
    return "auto" if found is None else "no_think" if found[1] else "think"


@register("length")
@dataclass(frozen=True)
class Length:
    """1 for an answer of up to `full` tokens, falling linearly to 0 at `zero` tokens (DAPO, arXiv 2503.14476, eq. 13).

    0 for a truncated or blank completion, whose length says nothing.

    Raises:
        ValueError: when called, a judgement without a number of tokens.
    """

    full: int
    """Tokens up to which the reward is 1."""

    zero: int
    """Tokens from which the reward is 0; at most `gspo.max_new_tokens`."""

    in_process = True

    def __post_init__(self) -> None:
        if not 0 < self.full < self.zero:
            raise RecipeError("the keys of the reward length need 0 < full < zero; correct them")

    def __call__(self, judgement: Judgement) -> float:
        if not judgement.finished or not judgement.text.strip():
            return 0.0
        if judgement.tokens < 1:
            raise ValueError("the number of tokens is not known")
        return min(1.0, max(0.0, (self.zero - judgement.tokens) / (self.zero - self.full)))
