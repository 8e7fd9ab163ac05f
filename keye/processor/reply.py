"""The three modes of answering (report §5): what is asked for behind a question, and what an answer consists of.

`/think` behind the last words of a user's turn asks for a thought before the answer, `/no_think` for none, and without
either the model decides. An answer is `<think>…</think><answer>…</answer>`.
"""

import re
from dataclasses import dataclass
from typing import Literal

from keye.processor.stream import END_OF_TEXT, IM_END

Thinking = bool | Literal["as_answered"] | None
"""True, False: ask for a thought or for none. None: ask nothing. "as_answered": what each given answer does."""

SUFFIXES = {True: "/think", False: "/no_think"}
_SUFFIX = re.compile(r"/(?:no_)?think\s*$")
_END = re.compile("|".join(map(re.escape, (IM_END, END_OF_TEXT))))
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """What a model said. thinking: its thought, None where there is none; answer: the rest, stripped."""

    thinking: str | None
    answer: str


def parse_reply(text: str) -> Reply:
    """A reply as thought and answer, whatever of the form is missing.

    The answer is the last `<answer>…</answer>` behind the thought; without one all that follows the thought. A thought
    that never ends leaves an empty answer, a `</think>` that was never opened closes the thought that began with the
    reply (the opening may stand in the prompt), and an answer cut off by the limit of tokens goes to the end.
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
    """The reply in its form, `<think>…</think><answer>…</answer>`; without the thought's part where there is none."""
    thought = "" if reply.thinking is None else f"<think>{reply.thinking}</think>"
    return f"{thought}<answer>{reply.answer}</answer>"


def with_suffix(words: str, thinking: bool) -> str:
    """The words of a question with `/think` or `/no_think` at their end, in the place of one that stands there."""
    return _SUFFIX.sub("", words) + SUFFIXES[thinking]
