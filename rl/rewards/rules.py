"""Rule-based rewards: the answer is right; the answer is well formed."""

from __future__ import annotations

import re

from keye.evaluation.match import match
from rl.rewards.base import Judgement, register

_TAGS = re.compile(r"</?(?:think|answer)>")
_TAGGED = re.compile(r"\s*(?:<think>.*?</think>\s*)?<answer>(.+?)</answer>\s*", re.DOTALL)
_FORMS = (["<think>", "</think>", "<answer>", "</answer>"], ["<answer>", "</answer>"])


@register("accuracy")
class Accuracy:
    """1 when the completion ended by itself and gives the manifest's answer, by the rule of `keye.evaluation.match`."""

    def __call__(self, judgement: Judgement) -> float:
        prompt = judgement.prompt
        return float(match(judgement.text, prompt.answer, prompt.tolerance, prompt.options, judgement.finished))


@register("format")
class Format:
    """1 when the completion ended by itself and is either one plain line or `<think>…</think><answer>…</answer>`.

    The thought may be left out (`/no_think`); each tag occurs once, there is no text outside, and the answer is not
    blank.
    """

    def __call__(self, judgement: Judgement) -> float:
        if not judgement.finished or not judgement.text.strip():
            return 0.0
        if not _TAGS.search(judgement.text):
            return float("\n" not in judgement.text.strip())
        tagged = _TAGGED.fullmatch(judgement.text)
        return float(tagged is not None and bool(tagged[1].strip()) and _TAGS.findall(judgement.text) in _FORMS)
