"""Bounding boxes: the single box in an answer, and the overlap of two boxes."""

import re
from collections.abc import Sequence

from keye.evaluation.words import COLOURS, FRAMING, SHAPES, THINGS, normalise, plain

__all__ = ["iou", "parse_box"]

_SIDE = r"(\d{1,6}(?:\.\d{1,6})?)"
_GAP = r"\s*,\s*"
_BOX = re.compile(
    rf"(?<![\w.,-])(?<![\w.,-]\s)[\[(]{{0,2}}\s*{_SIDE}{_GAP}{_SIDE}\s*[\])]?(?:{_GAP}|\s+to\s+)"
    rf"[\[(]?\s*{_SIDE}{_GAP}{_SIDE}\s*[\])]{{0,2}}(?![\w-]|[.,]\d|\s*,\s*\d)"
)
_FIELDS = re.compile(r"\"(?:bbox_2d|bbox|box)\"\s*:|\"label\"\s*:\s*\"[^\"]*\"|^\s*```(?:json)?|```\s*$|</?box>")
_HARMLESS = FRAMING | THINGS | COLOURS | SHAPES | {"bounding", "box", "bbox", "located", "coordinates"}
_HARMLESS |= frozenset("坐 标 標 框 位 置".split())


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """Return the single box `[x1, y1, x2, y2]` in `text`.

    Inner brackets as in `(x1,y1),(x2,y2)`, a sentence such as `The box is […].` and JSON with `bbox_2d` are understood.

    Returns:
        The four numbers as written, or None if `text` has no box, several boxes, or words that may change the meaning.
    """
    text = plain(_FIELDS.sub(" ", text))
    found = list(_BOX.finditer(text))
    if len(found) != 1 or any(text.count(a) != text.count(b) for a, b in ("[]", "()", "{}")):
        return None
    rest = normalise(_BOX.sub(" ", text))
    if "?" in text or not _HARMLESS.issuperset(rest.split()):
        return None
    x1, y1, x2, y2 = map(float, found[0].groups())
    return x1, y1, x2, y2


def iou(one: Sequence[float], two: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 for a box without area."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    if width <= 0 or height <= 0 or min(areas) <= 0:
        return 0.0
    return width * height / (sum(areas) - width * height)
