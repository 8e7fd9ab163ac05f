"""Does a reply agree with the true answer? One strict, deterministic judge for evaluation and for rewards.

A reply earns nothing when it is empty, unfinished, names several options, denies the right one or contradicts itself.
The judge is a reward in `rl/`, so a rule that is generous to an odd reply is a rule that a policy learns to exploit.
"""

import re
import unicodedata
from collections.abc import Sequence

from keye.evaluation.numbers import is_number, parse_number, same_number

__all__ = ["choose", "extract_answer", "iou", "match", "normalise", "parse_box", "parse_number"]

IOU = 0.5
"""A box is right from this intersection over union on, as in the grounding benchmarks (RefCOCO)."""

_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
_THINK = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)
_BOX = re.compile(r"\s*\[?\(?\s*(\d+)\s*,\s*(\d+)\s*\)?\s*,\s*\(?\s*(\d+)\s*,\s*(\d+)\s*\)?\]?\s*")
_EDGES = " \t\n.,;:!?\"'`*()[]{}“”‘’…"
_ARTICLES = ("a", "an", "the")
_LEAD = re.compile(
    r"[\s*_]*(?:so\W+)?(?:the\s+|my\s+)?(?:final\s+|correct\s+)?(?:answer|option|choice)\b"
    r"(?:\s+is\b)?[\s*_]*[:=]?[\s*_]*",
    re.I,
)
_LETTER = re.compile(
    r"""\s*(?:
        [\[({*"'`]+\s*(?P<enclosed>[A-Za-z])\s*[\])}*"'`]+[.):,;]*   # (B)  [b]  **B**
      | (?P<marked>[A-Za-z])\s*[.):,;](?!\w)                        # B.  b)  B:
      | (?P<bare>[A-Za-z])\s*$                                      # B
      | (?P<spaced>[B-Z])(?=\s)                                     # B blue; "A blue one" begins with an article
    )\s*""",
    re.VERBOSE,
)
_NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|none|nothing|without|except|excluding|cannot|unlike|instead|rather|wrong|incorrect"
    r"|false|opposite|other\s+than|anything\s+but)\b|n['’]t\b"
)
_POLAR = {"yes", "no", "true", "false"}


def extract_answer(text: str) -> str:
    """What a reply finally answers: the last `<answer>…</answer>`, else all that follows `<think>…</think>`."""
    found = _ANSWER.findall(text)
    answer = found[-1] if found else _THINK.sub("", text)
    answer = re.sub(r"<\|[a-z_]+\|>", "", answer)
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", answer)
    return (boxed[-1] if boxed else answer).strip()


def normalise(text: str) -> str:
    """Lower case, one space between words, without articles and without punctuation at the edges of words.

    A text of articles alone keeps them: `A` is an answer. Hyphens between letters are spaces: `top-left`.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(sign for sign in text if unicodedata.category(sign) != "Cf")
    text = re.sub(r"(?<=[^\W\d_])[-‐–](?=[^\W\d_])", " ", text)
    words = [word for word in (word.strip(_EDGES) for word in text.split()) if word]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


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


def match(
    prediction: str,
    answer: str,
    tolerance: float | None = None,
    options: Sequence[str] | None = None,
    finished: bool = True,
) -> bool:
    """Whether a reply agrees with the true answer.

    Options: reply and answer are resolved to an option each, by letter or by words (`choose`), and must be the same.
    Boxes: IoU ≥ 0.5. Numbers: within `tolerance`, or equal without one; digits with leading zeros are codes and must be
    the same. A single letter: the reply is that letter, alone or before further words (`B`, `(b)`, `B. blue`). All
    else: the same words, whatever their case, articles and punctuation.

    Args:
        prediction: the model's reply, with or without `<think>` and `<answer>` tags.
        answer: the truth; with options also the letter of one.
        tolerance: the largest right distance of a number.
        options: the texts to choose from.
        finished: False for a reply that was cut off by the token limit. It is wrong, whatever it says so far.
    """
    reply = extract_answer(prediction)
    if not finished or not normalise(reply) or not normalise(answer):
        return False
    truth = _place(answer, options) if options else None
    if truth is not None:
        return _place(reply, options) == truth
    box = parse_box(answer)
    if box is not None:
        found = parse_box(_without_lead(reply))
        return found is not None and iou(found, box) >= IOU
    if is_number(answer):
        # "never" is a number here (0); beside another number there are two, which is none.
        denied = _NEGATION.search(reply.casefold().replace("never", ""))
        return not denied and same_number(reply, answer, tolerance)
    if normalise(reply) == normalise(answer) or normalise(_without_lead(reply)) == normalise(answer):
        return True
    return re.fullmatch(r"[A-Z]", answer.strip()) is not None and _letter(reply)[0] == answer.strip()


def choose(reply: str, options: Sequence[str]) -> str | None:
    """The option that a reply picks: by its words, its number or its letter; None when it picks none or several.

    A reply whose letter and words name different options contradicts itself and picks none, and so does one that
    denies what it names (`not red`).
    """
    place = _place(reply, options)
    return None if place is None else options[place]


def _place(reply: str, options: Sequence[str]) -> int | None:
    """Index of the option that `reply` picks."""
    options = _without_letters(options)
    plain = [normalise(option) for option in options]
    for text in (reply, _without_lead(reply)):
        same = [place for place, option in enumerate(plain) if option and normalise(text) == option]
        if same:
            return same[0] if len(same) == 1 else None
    letter, rest = _letter(reply)
    place = ord(letter) - ord("A") if letter else len(options)
    if place >= len(options):
        return _named(reply, options, plain)
    if not normalise(rest) or normalise(rest) == plain[place]:
        return place
    # "B, because …" and "B) 4 times": further words may not name another option nor deny this one.
    named = _names(rest, options, plain) | _letters(rest, len(options))
    return place if named <= {place} and not _denies(rest, plain) else None


def _without_letters(options: Sequence[str]) -> Sequence[str]:
    """`["A. red", "B. blue"]` as `["red", "blue"]`; other options as they are."""
    found = [re.match(r"\s*\(?([A-Z])[.):]\s*(?=\S)", option) for option in options]
    if all(letter and ord(letter[1]) - ord("A") == place for place, letter in enumerate(found)):
        return [option[letter.end() :] for option, letter in zip(options, found, strict=True) if letter]
    return options


def _named(reply: str, options: Sequence[str], plain: Sequence[str]) -> int | None:
    named = _names(reply, options, plain)
    return named.pop() if len(named) == 1 and not _denies(reply, plain) else None


def _names(text: str, options: Sequence[str], plain: Sequence[str]) -> set[int]:
    """Indices of the options that `text` names; `dark red` does not name `red`."""
    if all(is_number(option) for option in options):
        number = parse_number(text)
        return {i for i, option in enumerate(options) if number is not None and same_number(number, option)}
    words = normalise(text)
    spans = [
        (found.start(), found.end(), place)
        for place, option in enumerate(plain)
        if option
        for found in re.finditer(rf"(?<!\w){re.escape(option)}(?!\w)", words)
    ]
    return {
        place
        for start, end, place in spans
        if not any(s <= start and end <= e and (s, e) != (start, end) for s, e, _ in spans)
    }


def _denies(text: str, plain: Sequence[str]) -> bool:
    """Whether `text` holds a negation that is not part of an option it names.

    Where the options are yes and no, the first word decides: `No, it does not move.`
    """
    words = normalise(text)
    if set(plain) <= _POLAR and words.split(" ")[0].strip(_EDGES) in plain:
        return False
    for option in sorted(filter(None, plain), key=len, reverse=True):
        words = re.sub(rf"(?<!\w){re.escape(option)}(?!\w)", " ", words)
    return _NEGATION.search(words) is not None


def _letter(reply: str) -> tuple[str | None, str]:
    """(letter in upper case, what follows it), or (None, reply) for a reply that does not begin with a letter alone."""
    text = _without_lead(reply)
    found = _LETTER.match(text)
    if not found:
        return None, reply
    return next(filter(None, found.groups())).upper(), text[found.end() :]


def _letters(text: str, count: int) -> set[int]:
    """Indices of the options whose letters stand alone in `text`; an `A` before a word is an article."""
    found = re.findall(r"\b(?!A\s+[a-z])[A-Z]\b", text)
    return {place for place in (ord(letter) - ord("A") for letter in found) if place < count}


def _without_lead(reply: str) -> str:
    """`reply` without `The answer is`, `Answer:`, `Option` in front."""
    found = _LEAD.match(reply)
    return reply[found.end() :] if found and found.end() < len(reply) else reply
