"""Five hints for a question of SlowFastWorld: concept, strategy, tools, first steps, solution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Meta = dict[str, Any]


def world_hints(line: dict[str, Any]) -> list[str] | None:
    """The hints of levels 1 to 5 for a manifest's line; None for a family without them.

    Levels 1 to 3 do not depend on the answer, level 4 narrows it down, and level 5 solves the question. `caption` and
    `text` have none, and neither has a line without the family's ground truth in `meta`.
    """
    write, meta = _FAMILIES.get(line.get("family", "")), line.get("meta")
    if write is None or not isinstance(meta, dict):
        return None
    try:
        return [*write(meta, str(line["answer"]), _question(line))]
    except (KeyError, IndexError, TypeError, StopIteration):
        return None


def _question(line: dict[str, Any]) -> str:
    """The text of the first user turn."""
    content = next(message["content"] for message in line["messages"] if message["role"] == "user")
    return content if isinstance(content, str) else " ".join(part.get("text") or "" for part in content)


_NUMBERS = {1: "a single digit", 2: "two digits", 3: "three digits", 4: "four digits"}


def _read(meta: Meta, code: str, _: str) -> tuple[str, ...]:
    event = meta["events"][0]
    return (
        "A card with digits is shown for a short time.",
        "Find the frames with the card and read its digits from left to right.",
        f"The card says {_NUMBERS[len(code)]}.",
        f"The card is shown from {event['start']:g} to {event['end']:g} seconds."
        + (f" Its first digit is {code[0]}." if len(code) > 1 else ""),
        f"The card is shown from {event['start']:g} to {event['end']:g} seconds. It says {code}.",
    )


def _image_read(_: Meta, code: str, __: str) -> tuple[str, ...]:
    return (
        "The image shows a card with digits.",
        "Find the card and read its digits from left to right.",
        f"The card says {_NUMBERS[len(code)]}.",
        f"The first digit is {code[0]}." if len(code) > 1 else f"The digit is {code} or {(int(code) + 5) % 10}.",
        f"The card says {code}.",
    )


def _count(meta: Meta, answer: str, _: str) -> tuple[str, ...]:
    colour, flashes = meta["colour"], meta["events"]
    own = [f"{event['start']:g}" for event in flashes if event["colour"] == colour]
    if len(own) != int(answer):
        raise KeyError("events")
    others = len(flashes) - len(own)
    return (
        f"Two shapes flash, and only the {colour} one counts.",
        f"Go through the frames and note each time at which the {colour} one is bright.",
        f"The {colour} flashes are all flashes without those of the other shape. There are {len(flashes)} in all.",
        f"The first {colour} flash is at {own[0]} seconds. The other shape flashes {_times(others)}.",
        f"It flashes at {', '.join(own)} seconds. The {colour} one flashes {_times(len(own))}: {answer}.",
    )


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _order(meta: Meta, answer: str, question: str) -> tuple[str, ...]:
    shown = meta["events"]
    which = "last" if "last" in question.lower() else "first"
    other = next(event for event in shown if event["colour"] != answer)
    listed = ", then ".join(event["colour"] for event in shown)
    return (
        "Shapes of different colours are shown one after the other.",
        "Note the time at which each colour is seen, and compare the times.",
        f"The colour with the {'largest' if which == 'last' else 'smallest'} time came {which}.",
        f"The {other['colour']} shape comes at {other['start']:g} seconds; it did not come {which}.",
        f"The colours are {listed}. The {which} colour is {answer}.",
    )


def _when(meta: Meta, answer: str, _: str) -> tuple[str, ...]:
    start = float(answer)
    cells = max(1.0, start - 1), start + 1
    return (
        "The picture has another colour every half second, and once it is white.",
        "Find the first frame that is white and read its time.",
        "The time is before each frame, in seconds.",
        f"It is white between {cells[0] - 0.5:g} and {cells[1]:g} seconds.",
        f"It is white at {answer} seconds.",
    )


def _motion(meta: Meta, answer: str, _: str) -> tuple[str, ...]:
    first, last = meta["from"], meta["to"]
    axis = "left or right" if answer in ("left", "right") else "up or down"
    return (
        "One shape moves, and nothing else does.",
        "Compare the place of the shape in the first frame and in the last frame.",
        "It moves left or right if it stays at its height, and up or down otherwise.",
        f"It moves {axis}.",
        f"Its corner moves from row {first[0]}, column {first[1]} to row {last[0]}, column {last[1]}: {answer}.",
    )


def _find(meta: Meta, answer: str, _: str) -> tuple[str, ...]:
    event = meta["events"][0]
    return (
        "A coloured shape is shown for half a second.",
        "Find the frames that are not like the frames before and after them.",
        "The colour is that of the shape that is in one or two frames only.",
        f"The flash is at {event['start']:g} seconds.",
        f"The flash at {event['start']:g} seconds is {answer}.",
    )


def _image_ground(meta: Meta, answer: str, _: str) -> tuple[str, ...]:
    left, top, _right, _bottom = (int(part) for part in answer.strip("[] ").split(","))
    return (
        f"The {meta['colour']} {meta['shape']} covers a box of the image.",
        "Find its left, top, right and bottom edge.",
        "An edge is its place divided by the width or height of the image, times 1000.",
        f"Its left edge is at {left}, its top edge at {top}.",
        f"Its box is {answer}.",
    )


def _image_place(meta: Meta, answer: str, _: str) -> tuple[str, ...]:
    half = answer.split()[0]
    return (
        "Every shape is in another corner.",
        "Find the shape, and see whether it is in the upper or lower and in the left or right half.",
        "A corner is named by its height first and its side second.",
        f"It is in the {half} half.",
        f"It is in the corner {answer}.",
    )


_FAMILIES: dict[str, Callable[[Meta, str, str], tuple[str, ...]]] = {
    "read": _read, "count": _count, "order": _order, "when": _when, "motion": _motion, "find": _find,
    "image_read": _image_read, "image_ground": _image_ground, "image_place": _image_place,
}  # fmt: skip
