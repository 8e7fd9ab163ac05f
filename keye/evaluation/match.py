"""Whether a reply agrees with the correct answer: one strict, deterministic judge for evaluation and rewards.

A reply is judged in three steps:

1. *Extract.* The thought is removed; then the last `<answer>…</answer>` counts, or `\\boxed{…}`, or all of the rest
   (`extract_answer`).
2. *Read one claim*: an option (`choices`), a number (`numbers`), a box (`boxes`) or a few words. A denied alternative
   (`red, not blue`) is not a claim. A reply with two claims is wrong.
3. *Check the other words.* Every other word must be on a list of words that do not change the meaning (`words`): `The
   answer is`, `I would choose`, nouns and verbs of plain sentences. An unknown word, sign or question mark makes the
   reply wrong. So `hardly red`, `3k` and `3 or more` are wrong, and so is any hedge that is on no list.

The judge is a reward in `rl/`: a policy learns to exploit a rule that accepts unusual replies. The price is that some
correct replies in unusual sentences are refused; a prompt that asks for the answer alone avoids this. No content of a
reply raises an error.
"""

import re
from collections.abc import Sequence

from keye.evaluation.boxes import iou, parse_box
from keye.evaluation.choices import choose, explains, letter_of, pick, says, without_lead
from keye.evaluation.numbers import is_number, parse_number, same_number
from keye.evaluation.words import normalise, plain
from keye.processor.reply import parse_reply

__all__ = ["choose", "extract_answer", "iou", "match", "normalise", "parse_box", "parse_number"]

IOU = 0.5
"""Smallest intersection over union of a correct box, as in the grounding benchmarks (RefCOCO)."""

_LONGEST = 2_000
"""Longest reply that is read, in characters, plus twice those of answer and options. It bounds the work."""

_SPECIAL = re.compile(r"<\|[a-z_]{1,30}\|>")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}]*)\}")
_MATH = re.compile(r"\\[()\[\]]|\$\$?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_DENIED_BOX = re.compile(r"(?:\bnot|n['’]t|\bnever|\bno)\W*\\boxed\{", re.I)
_OPEN_DOUBT = re.compile(r"[?？]|(?<!\S)!(?=\w)")


def extract_answer(text: str) -> str:
    """The final answer in a reply, without thought, tags, special tokens and math markup.

    After the thought, the last `<answer>…</answer>` counts, or else the entire text; in it the content of `\\boxed{…}`,
    unless several boxes differ or the box is denied.
    """
    answer = _SPECIAL.sub(" ", parse_reply(text).answer)
    if "\\" in answer or "$" in answer:
        answer = _TEXT.sub(r"\1", answer)
        boxed = [inner.strip() for inner in _BOXED.findall(answer)]
        if len(set(boxed)) == 1 and not _DENIED_BOX.search(answer):
            answer = boxed[0]
        answer = _MATH.sub("", answer) if answer.count("$") % 2 == 0 else answer
    return answer.strip()


def match(
    prediction: str,
    answer: str,
    tolerance: float | None = None,
    options: Sequence[str] | None = None,
    finished: bool = True,
) -> bool:
    """Whether a reply agrees with the correct answer.

    Options: reply and answer are resolved to an option each, by letter or by words (`choose`), and must be the same.
    Boxes: IoU ≥ 0.5. Numbers: within `tolerance`, or equal without one; digits with leading zeros are codes and must be
    the same; a time is in seconds (`2 minutes` is 120). A single letter: the reply is that letter, alone or before
    other words (`B`, `(b)`, `B. blue`). Other answers: the same words, ignoring case, articles and punctuation.

    Args:
        prediction: the model's reply, with or without `<think>` and `<answer>` tags.
        answer: the correct answer; with options also the letter of one.
        tolerance: the largest accepted distance of a number.
        options: the texts to choose from.
        finished: False for a reply that the token limit cut off. Such a reply is wrong.
    """
    reply = extract_answer(prediction)
    known = " ".join([answer, *(options or ())])
    if len(reply) > _LONGEST + 2 * len(known) or (_OPEN_DOUBT.search(reply) and not _OPEN_DOUBT.search(known)):
        return False
    if not finished or not normalise(reply) or not normalise(answer):
        return False
    truth = pick(answer, options) if options else None
    if truth is not None:
        return pick(reply, options or ()) == truth
    box = parse_box(answer)
    if box is not None:
        found = parse_box(reply)
        return found is not None and iou(found, box) >= IOU
    if is_number(answer):
        return same_number(reply, answer, tolerance)
    if normalise(reply) == normalise(answer) or normalise(without_lead(plain(reply))) == normalise(answer):
        return True
    if re.fullmatch(r"[A-Z]", answer.strip()):
        letter, rest = letter_of(reply)
        return letter == answer.strip() and explains(rest)
    return says(reply, answer)
