"""Questions without images or videos: the `text` family."""

import re
import zlib

import numpy as np

from keye.world.draft import Draft
from keye.world.scene import COLOURS, SHAPES, Setting

DIRECTIONS = ("left", "right", "up", "down")


def text_items() -> list[tuple[str, str]]:
    """Every question and answer of the text family."""
    items = [(f"{a} + {b} =", str(a + b)) for a in range(10) for b in range(10)]
    items += [(f"{a} - {b} =", str(a - b)) for a in range(10) for b in range(a + 1)]
    items += [
        (f"Count from {a} to {b}.", " ".join(map(str, range(a, b + 1)))) for a in range(8) for b in range(a + 1, 10)
    ]
    items += [(f"Which is larger, {a} or {b}?", str(max(a, b))) for a in range(10) for b in range(10) if a != b]
    items += [(f"Repeat: {a} {b} {c}", f"{a} {b} {c}") for a in COLOURS for b in SHAPES for c in DIRECTIONS]
    for name in COLOURS:
        for shape in SHAPES:
            for way in DIRECTIONS:
                story = f"A {name} {shape} moves {way}."
                items += [(f"{story} What colour is it?", name), (f"{story} Which way does it move?", way)]
    return items


def is_heldout(question: str) -> bool:
    """Whether a text question is in the held-out split: a fifth of them, by a checksum of their content.

    Questions with the same content are in the same split: `2 + 3 =` and `3 + 2 =`, `2 or 3` and `3 or 2`, and the two
    questions about one story.
    """
    story = re.match(r"A \w+ \w+ moves \w+\.", question)
    content = story[0] if story else question
    if "+" in question or "larger" in question:
        content = " ".join(sorted(re.findall(r"\w+", question)))
    return zlib.crc32(content.encode()) % 5 == 0


def text(rng: np.random.Generator, setting: Setting, target: str | None, index: int, heldout: bool = False) -> Draft:
    """A question without media: sums, counting, comparing, repeating, one-sentence stories."""
    items = [item for item in text_items() if is_heldout(item[0]) == heldout]
    question, answer = items[int(rng.integers(len(items)))]
    return Draft(question=question, answer=answer)
