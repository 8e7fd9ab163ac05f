"""Rewards on quantities, boxes and times: a distance from the truth instead of right or wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from keye.errors import RecipeError
from keye.evaluation.boxes import iou, parse_box
from keye.evaluation.choices import without_lead
from keye.evaluation.numbers import parse_number
from keye.evaluation.words import plain
from rl.rewards.base import Judgement, register
from rl.rewards.rules import LONGEST
from rl.rewards.units import Quantity, parse_quantity, parse_unit

_SECONDS = parse_quantity("1 s")
_CLIP_TAG = re.compile(r"<\|clip_time_(?:start|end)\|>")
_TIME = r"(?:[0-9]{1,3}:)?[0-9]{1,3}:[0-9]{2}(?:\.[0-9]{1,6})?|[0-9]{1,6}(?:\.[0-9]{1,6})?"
_SECOND = r"(?:s|secs?\.?|seconds?|秒)?"
_SPAN = re.compile(
    rf"(?:from|between|从|從|在)?\s*[\[(]?\s*({_TIME})\s*{_SECOND}\s*(?:-|–|—|~|→|,|to|and|until|到|至|\s)\s*({_TIME})"
    rf"\s*{_SECOND}\s*[\])]?\s*[.。]?",
    re.IGNORECASE,
)


@register("number")
@dataclass(frozen=True)
class Number:
    """1 when the answer is the manifest's quantity after conversion of units: `1.2 km` is `1200 m`.

    The answer is a single number with its unit and nothing else (`rl.rewards.units`). Two values are the same within
    the manifest's `tolerance`, in the unit of its answer, or within `relative` of the truth; without both, exactly.

    Raises:
        ValueError: when called, a manifest's answer that is no quantity.
    """

    relative: float = 0.0
    """Largest accepted difference as a share of the truth."""

    unit_optional: bool = False
    """Whether a number without a unit counts as in the unit of the manifest's answer."""

    in_process = True

    def __post_init__(self) -> None:
        if not 0 <= self.relative < 1:
            raise RecipeError(f"the key relative of the reward number is {self.relative}; set it from 0 up to below 1")

    def __call__(self, judgement: Judgement) -> float:
        truth = parse_quantity(judgement.prompt.answer)
        if truth is None:
            raise ValueError(f"the manifest's answer {judgement.prompt.answer!r:.80} is no number with a known unit")
        reply = parse_quantity(judgement.answer)
        if reply is None:
            return 0.0
        if truth.unit is not None and reply.unit is None and self.unit_optional:
            reply = Quantity(reply.number, truth.unit)
        truth, reply = (_share(one, other) for one, other in ((truth, reply), (reply, truth)))
        if (truth.unit is None) != (reply.unit is None):
            return 0.0
        if truth.unit is not None and truth.unit.dimension != reply.unit.dimension:
            return 0.0
        factor = truth.unit.factor if truth.unit is not None else 1
        accepted = max(
            Fraction(judgement.prompt.tolerance or 0) * factor, Fraction(self.relative) * abs(truth.number * factor)
        )
        # Angles and units such as oz have factors in floats' decimals, hence the billionth.
        return float(abs(truth.base - reply.base) <= accepted + abs(truth.base) / 10**9)


def _share(one: Quantity, other: Quantity) -> Quantity:
    """A number without a unit beside percent as a share of 1: `0.5` is `50 %`."""
    percent = parse_unit("%")
    return (
        replace(one, unit=replace(percent, factor=Fraction(1))) if one.unit is None and other.unit == percent else one
    )


@register("iou")
@dataclass(frozen=True)
class BoxIou:
    """Intersection over union of the answer's only box and the manifest's (`keye.evaluation.boxes`); 0 below `least`.

    Raises:
        ValueError: when called, a manifest's answer that is no box with an area.
    """

    least: float = 0.3
    """Smallest overlap that earns anything, because a box around the entire picture overlaps every other one."""

    in_process = True

    def __post_init__(self) -> None:
        _check_least("iou", self.least)

    def __call__(self, judgement: Judgement) -> float:
        truth = parse_box(judgement.prompt.answer)
        if truth is None or iou(truth, truth) == 0:
            raise ValueError(f"the manifest's answer {judgement.prompt.answer!r:.80} is no box [x1, y1, x2, y2]")
        answer = judgement.answer
        box = parse_box(answer) if len(answer) <= 500 else None
        overlap = 0.0 if box is None else iou(box, truth)
        return overlap if overlap >= self.least else 0.0


def _check_least(name: str, least: float) -> None:
    if not 0 <= least <= 1:
        raise RecipeError(f"the key least of the reward {name} is {least}; set it from 0 to 1")


def parse_span(text: str) -> tuple[float, float] | None:
    """The only span of time in a text, in seconds: `3.5 - 10 s`, `from 0:03 to 0:10`, `[3.5, 10]`, in clip-time tags.

    Returns:
        (start, end) with start ≤ end; None for any other text.
    """
    text = without_lead(plain(_CLIP_TAG.sub(" ", text))).strip() if len(text) <= 200 else ""
    found = _SPAN.fullmatch(text)
    if found is None:
        return None
    start, end = (_clock(time) for time in found.groups())
    return (start, end) if start <= end else None


def _clock(text: str) -> float:
    seconds = 0.0
    for part in text.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds


@register("temporal_iou")
@dataclass(frozen=True)
class TemporalIou:
    """Intersection over union of the answer's span of time and the manifest's (`parse_span`); 0 below `least`.

    Raises:
        ValueError: when called, a manifest's answer that is no span with a length.
    """

    least: float = 0.3
    """Smallest overlap that earns anything, because the entire clip overlaps every span."""

    in_process = True

    def __post_init__(self) -> None:
        _check_least("temporal_iou", self.least)

    def __call__(self, judgement: Judgement) -> float:
        truth = parse_span(judgement.prompt.answer)
        if truth is None or truth[0] == truth[1]:
            raise ValueError(f"the manifest's answer {judgement.prompt.answer!r:.80} is no span of time, start – end")
        span = parse_span(judgement.answer)
        if span is None:
            return 0.0
        inside = min(span[1], truth[1]) - max(span[0], truth[0])
        overlap = max(0.0, inside) / (max(span[1], truth[1]) - min(span[0], truth[0]))
        return overlap if overlap >= self.least else 0.0


@register("seconds")
@dataclass(frozen=True)
class Seconds:
    """1 for a time within the manifest's `tolerance` of its answer, falling linearly to 0 `fall` seconds further.

    Raises:
        ValueError: when called, a manifest's answer that is no time.
    """

    fall: float = 0.0
    """Seconds beyond the tolerance at which the reward reaches 0; 0 = all or nothing."""

    in_process = True

    def __post_init__(self) -> None:
        if self.fall < 0:
            raise RecipeError(f"the key fall of the reward seconds is {self.fall}; set it from 0 on")

    def __call__(self, judgement: Judgement) -> float:
        truth = parse_number(judgement.prompt.answer)
        if truth is None:
            raise ValueError(f"the manifest's answer {judgement.prompt.answer!r:.80} is no time")
        answer = _CLIP_TAG.sub(" ", judgement.answer)
        reply = parse_number(answer) if len(answer) <= min(200, LONGEST) else None
        if reply is None:
            return 0.0
        beyond = abs(Fraction(reply) - Fraction(truth)) - Fraction(judgement.prompt.tolerance or 0)
        if beyond <= Fraction(1, 10**6):
            return 1.0
        return max(0.0, 1.0 - float(beyond) / self.fall) if self.fall else 0.0
