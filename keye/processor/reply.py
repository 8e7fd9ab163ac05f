"""The three modes of answering (report §5): the suffix of a question, and the parts of an answer.

`/think` at the end of a user's turn asks for a thought before the answer, `/no_think` for none, and without either the
model decides. An answer is `<think>…</think><answer>…</answer>`.
"""

import re
from dataclasses import dataclass
from typing import Literal

from keye.processor.stream import END_OF_TEXT, IM_END

Thinking = bool | Literal["as_answered"] | None
"""True, False: ask for a thought or for none. None: no suffix. "as_answered": as each given answer does."""

SUFFIXES = {True: "/think", False: "/no_think"}
_SUFFIX = re.compile(r"/(?:no_)?think\s*$")
_END = re.compile("|".join(map(re.escape, (IM_END, END_OF_TEXT))))
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """A model's reply. thinking: its thought, None if there is none; answer: the rest, stripped."""

    thinking: str | None
    answer: str


def parse_reply(text: str) -> Reply:
    """A reply as thought and answer, also if tags are missing.

    The answer is the last `<answer>…</answer>` after the thought; without one, all text after the thought. A thought
    without an end gives an empty answer. A `</think>` without a start ends a thought that began with the reply (the
    prompt may contain the start). An answer cut off by the limit of tokens reaches to the end.
    """
    text = _END.split(text, maxsplit=1)[0]
    before, closed, behind = text.partition("</think>")
    thinking = None
    if closed:
        thinking = before.partition("<think>")[2] if "<think>" in before else before
    elif "<think>" in text:
        behind, _, thinking = text.partition("<think>")
    else:
        behind = text
    answers = _ANSWER.findall(behind)
    answer = answers[-1] if answers else behind.replace("</answer>", "")
    return Reply(None if thinking is None else thinking.strip(), answer.strip())


def write_reply(reply: Reply) -> str:
    """The reply as `<think>…</think><answer>…</answer>`; without the first part if there is no thought."""
    thought = "" if reply.thinking is None else f"<think>{reply.thinking}</think>"
    return f"{thought}<answer>{reply.answer}</answer>"


def with_suffix(words: str, thinking: bool) -> str:
    """A question with the suffix `/think` or `/no_think`, which replaces one that is there."""
    return _SUFFIX.sub("", words) + SUFFIXES[thinking]
