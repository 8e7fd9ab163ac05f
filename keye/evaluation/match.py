"""Does an answer agree with the truth? One strict, deterministic judge for evaluation and for rewards."""

import re
from collections.abc import Sequence

NUMBER_WORDS = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10", "once": "1", "twice": "2", "never": "0",
}  # fmt: skip
IOU = 0.5
"""A box is right from this intersection over union on, as in the grounding benchmarks (RefCOCO)."""

_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
_THINK = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)
_CLOCK = re.compile(r"\b(?:(\d+):)?(\d{1,2}):(\d{2}(?:\.\d+)?)\b")
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?")
_BOX = re.compile(r"\s*\[?\(?\s*(\d+)\s*,\s*(\d+)\s*\)?\s*,\s*\(?\s*(\d+)\s*,\s*(\d+)\s*\)?\]?\s*")
_LETTER = re.compile(r"\(?([A-Z])\)?[.):]?(?:\s|$)")
_EDGES = " \t\n.,;:!?\"'`*()[]{}"


def extract_answer(text: str) -> str:
    """What a reply finally answers: the last `<answer>…</answer>`, else all that follows `<think>…</think>`."""
    found = _ANSWER.findall(text)
    answer = found[-1] if found else _THINK.sub("", text)
    answer = re.sub(r"<\|[a-z_]+\|>", "", answer)
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", answer)
    return (boxed[-1] if boxed else answer).strip()


def normalise(text: str) -> str:
    """Lower case, one space between words, without articles and without marks at the edges of words."""
    words = (word.strip(_EDGES) for word in text.lower().split())
    return " ".join(word for word in words if word and word not in ("a", "an", "the"))


def parse_box(text: str) -> tuple[int, int, int, int] | None:
    """`[x1, y1, x2, y2]`, also with inner brackets as in `(x1,y1),(x2,y2)`; None when it is not exactly one box."""
    found = _BOX.fullmatch(text.strip())
    return tuple(map(int, found.groups())) if found else None


def iou(one: Sequence[float], two: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 for a box without area."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    if width <= 0 or height <= 0 or min(areas) <= 0:
        return 0.0
    return width * height / (sum(areas) - width * height)


def parse_number(text: str) -> str | None:
    """The one number in `text` as digits, units and words around it dropped; None when there are none or several.

    `1:05` is 65 seconds, `three` and `twice` are numbers.
    """

    def to_seconds(clock: re.Match[str]) -> str:
        hours, minutes, seconds = clock.groups()
        return f"{int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds):g}"

    text = _CLOCK.sub(to_seconds, text.lower())
    text = re.sub(r"[a-z]+", lambda word: NUMBER_WORDS.get(word[0], word[0]), text)
    found = _NUMBER.findall(text)
    return found[0].lstrip("+") if len(found) == 1 else None


def match(prediction: str, answer: str, tolerance: float | None = None, options: Sequence[str] | None = None) -> bool:
    """Whether a reply agrees with the true answer.

    Boxes: IoU ≥ 0.5. Numbers: within `tolerance`, or equal without one; digits with leading zeros are codes and must
    be the same. Options: the reply is one option's text or letter (`B`, `(b)`), or names one option and no other.
    All else: the same words, whatever their case, articles and punctuation.
    """
    reply = extract_answer(prediction)
    box = parse_box(answer)
    if box is not None:
        found = parse_box(reply)
        return found is not None and iou(found, box) >= IOU
    if options and normalise(reply) != normalise(answer):
        chosen = choose(reply, options)
        return chosen is not None and normalise(chosen) == normalise(answer)
    if _NUMBER.fullmatch(answer.strip()):
        return _same_number(reply, answer.strip(), tolerance)
    return normalise(reply) == normalise(answer)


def _same_number(reply: str, answer: str, tolerance: float | None) -> bool:
    number = parse_number(reply)
    if number is None:
        return False
    if tolerance is not None:
        return abs(float(number) - float(answer)) <= tolerance + 1e-6
    if _is_code(number) or _is_code(answer):
        return number == answer
    return float(number) == float(answer)


def _is_code(digits: str) -> bool:
    return len(digits) > 1 and digits[0] == "0" and "." not in digits


def choose(reply: str, options: Sequence[str]) -> str | None:
    """The option a reply picks: by its words, its number or its letter; None when it picks none or several."""
    plain = normalise(reply)
    for option in options:
        if plain == normalise(option):
            return option
    letter = _LETTER.match(reply.strip() if len(reply.strip()) > 1 else reply.strip().upper())
    if letter or re.fullmatch(r"\([a-z]\)", reply.strip()):
        place = ord((letter[1] if letter else reply.strip()[1]).upper()) - ord("A")
        bare = len(reply.strip(_EDGES)) == 1
        if place < len(options) and (bare or normalise(reply.strip()[letter.end() :]) == normalise(options[place])):
            return options[place]
    if all(_NUMBER.fullmatch(option) for option in options):
        number = parse_number(reply)
        named = [option for option in options if number is not None and float(number) == float(option)]
    else:
        named = [option for option in options if re.search(rf"\b{re.escape(normalise(option))}\b", plain)]
    return named[0] if len(named) == 1 else None
