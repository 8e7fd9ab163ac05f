"""A sample before it is written, and the phrasing of its questions."""

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
    """One sample before it is written.

    Attributes:
        question: the text of the user turn.
        answer: the correct answer.
        options: the texts to choose from, if there are any.
        tolerance: largest accepted distance of a number from the answer.
        meta: ground truth for tests and reports: events, boxes in pixels, colours.
        draw: frame index → picture [H, W, 3] uint8 RGB; None for text.
        frames: number of frames, 1 for an image.
        still: whether the sample is an image.
        fps: frames per second of a clip.
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
    """A random phrasing of a question."""
    return pick(rng, QUESTIONS[name]).format(*words)


def event(what: str, first: int, last: int, **more: Any) -> dict[str, Any]:
    """An entry of `meta["events"]` over the cells first … last-1: seconds [start, end)."""
    return {"what": what, "start": first * CELL, "end": last * CELL, **more}


def seconds(cell: int) -> str:
    """The start of a cell in seconds in the format of answers: `3` or `3.5`."""
    return f"{cell * CELL:g}"
