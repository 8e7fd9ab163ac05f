"""Chains of thought as steps, with the confidence of each."""

from __future__ import annotations

import re
from dataclasses import dataclass

from keye.processor.reply import parse_reply
from rl.endpoint import Answer

_LINES = re.compile(r"[^\n]*\S[^\n]*")
_SENTENCES = re.compile(r"\S.*?(?:[.!?。！？](?=\s|$)|$)", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """A step's text, and the mean log-probability of its tokens (≤ 0, natural), None where the endpoint gave none."""

    text: str
    confidence: float | None


def spans(thought: str) -> list[tuple[int, int]]:
    """(start, end) of each step: the lines that are not blank; of a single line, its sentences."""
    lines = [found.span() for found in _LINES.finditer(thought)]
    if len(lines) > 1:
        return lines
    return [found.span() for found in _SENTENCES.finditer(thought)]


def steps_of(thought: str) -> list[str]:
    """The texts of the steps of a thought."""
    return [thought[start:end].strip() for start, end in spans(thought)]


def read_chain(answer: Answer) -> tuple[list[Step], float | None]:
    """The steps of an answer's thought, and the mean log-probability of the tokens of its final answer."""
    reply = parse_reply(answer.text)
    thought = reply.thinking or ""
    written = "".join(answer.tokens or ())
    start = written.find(thought) if thought else -1
    steps = []
    for first, last in spans(thought):
        inside = (start + first, start + last) if start >= 0 else None
        steps.append(Step(thought[first:last].strip(), _mean(answer, inside)))
    place = written.rfind(reply.answer) if reply.answer else -1
    return steps, _mean(answer, (place, place + len(reply.answer)) if place >= 0 else None)


def _mean(answer: Answer, span: tuple[int, int] | None) -> float | None:
    """Mean log-probability of the tokens whose last character is in a span of the written text."""
    if answer.tokens is None or answer.logprobs is None or span is None:
        return None
    found, place = [], 0
    for token, value in zip(answer.tokens, answer.logprobs, strict=True):
        place += len(token)
        if token and span[0] < place <= span[1]:
            found.append(value)
    return sum(found) / len(found) if found else None
