"""A sample before it is written, and the words in which families ask and tell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keye.world.scene import CELL

QUESTIONS = {
    "read": ("What does the card say?", "Read the code."),
    "count": ("How often does the {} one flash?", "Count the {} flashes."),
    "order": ("Which colour came first, {}?", "First colour: {}?"),
    "order_last": ("Which colour came last, {}?", "Last colour: {}?"),
    "when": ("At what second is it white?", "When is it white?"),
    "motion": ("Which way does it move?", "Direction of motion?"),
    "find": ("What colour was the short flash?", "Colour of the flash?"),
    "image_read": ("What does the card say?", "Read the code."),
    "image_ground": ("Where is the {}? Give its box.", "Box of the {}?"),
    "image_place": ("In which corner is the {}?", "Corner of the {}?"),
    "caption_image": ("Describe the image.", "What is shown?"),
    "caption_video": ("Describe the video.", "What happens?"),
}


@dataclass
class Draft:
    """One sample before it is written: what to draw, what to ask, and the truth.

    draw: frame index → [H, W, 3] uint8, or None for text; frames: how many (1 and still=True for an image).
    """

    question: str
    answer: str
    options: list[str] | None = None
    tolerance: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    draw: Callable[[int], np.ndarray] | None = None
    frames: int = 1
    still: bool = False
    fps: int = 0


def pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    """One of `choices` as a plain string."""
    return choices[int(rng.integers(len(choices)))]


def ask(rng: np.random.Generator, name: str, *words: str) -> str:
    """One of the phrasings of a question."""
    return pick(rng, QUESTIONS[name]).format(*words)


def event(what: str, first: int, last: int, **more: Any) -> dict[str, Any]:
    """An event over the cells first … last-1, as it stands in `meta["events"]`: seconds [start, end)."""
    return {"what": what, "start": first * CELL, "end": last * CELL, **more}


def seconds(cell: int) -> str:
    """The beginning of a cell in seconds, as answers write it: `3` or `3.5`."""
    return f"{cell * CELL:g}"
