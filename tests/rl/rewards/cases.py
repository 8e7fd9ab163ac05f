"""Questions with their right answers for every rule, and answers that nobody may earn from."""

from pathlib import Path
from typing import Any

from rl.questions.prompts import Prompt
from rl.rewards import Judgement

SCHEMA = {
    "type": "object", "required": ["colour", "count"], "additionalProperties": False,
    "properties": {"colour": {"type": "string", "minLength": 1}, "count": {"type": "integer"}},
}  # fmt: skip
ASKED = "Which is it: red, blue, green or yellow?"


def question(answer: str, options: tuple[str, ...] = (), tolerance: float | None = None, **extra: Any) -> Prompt:
    messages = [{"role": "user", "content": ASKED}]
    return Prompt("q1", "read", messages, answer, tolerance, options, Path(), "train.jsonl:1", extra)


def judged(prompt: Prompt, text: str, finished: bool = True) -> Judgement:
    return Judgement(prompt, text, finished, 5)


CONSTRAINTS = [{"kind": "no_commas"}, {"kind": "words", "relation": "at most", "count": 2}, {"kind": "lowercase"}]
OPTIONS = ("red", "blue", "green", "yellow")
TABLE: dict[str, Any] = {
    "length": {"full": 10, "zero": 20},
    "json": {"values": True},
    "markdown": {"elements": ["table"]},
}
"""Options of the rewards that need some."""

RIGHT: dict[str, tuple[Prompt, str]] = {
    "accuracy": (question("3"), "3"),
    "choice": (question("blue", OPTIONS), "B"),
    "exact": (question("Old Town"), "old town"),
    "anls": (question("Old Town"), "Old Twn"),
    "number": (question("1.2 km"), "1200 m"),
    "iou": (question("[100, 100, 200, 200]"), "[100, 100, 200, 210]"),
    "temporal_iou": (question("3.5 - 10"), "3.5 - 9.5"),
    "seconds": (question("12.5", (), 0.5), "12.2 s"),
    "math": (question(r"\frac{1}{2}"), "0.5"),
    "json": (question('{"colour": "red", "count": 3}', schema=SCHEMA), '{"count": 3, "colour": "red"}'),
    "markdown": (question("-"), "| a | b |\n|---|---|\n| 1 | 2 |"),
    "format": (question("3"), "<think>so</think><answer>3</answer>"),
    "length": (question("3"), "three"),
    "constraints": (question("3", constraints=CONSTRAINTS), "two words"),
    "all_constraints": (question("3", constraints=CONSTRAINTS), "two words"),
}
"""Reward → a question and an answer that earns more than 0.7."""

FORM_ONLY = ("format", "length", "constraints", "all_constraints")
"""Rewards of the form alone: any text that has it earns 1."""
