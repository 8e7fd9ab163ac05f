"""The single number in an answer, written in digits, in words, as a clock time or as a duration."""

import re
from decimal import Decimal
from fractions import Fraction

from keye.evaluation.words import COLOURS, DEGREE, FRAMING, SHAPES, THINGS, plain

__all__ = ["is_number", "parse_number", "same_number"]

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = {word: value for value, word in enumerate(_UNITS)}
_WORDS |= {word: 10 * (place + 2) for place, word in enumerate(_TENS)}
_WORDS |= {"once": 1, "twice": 2, "thrice": 3, "never": 0}
_WORDS |= {sign: value for value, sign in enumerate("零一二三四五六七八九十")} | {"两": 2}
_SECONDS = {
    "0.001": "ms msec millisecond milliseconds",
    "1": "s sec secs second seconds",
    "60": "min mins minute minutes",
    "3600": "h hr hrs hour hours",
}
_SCALES = {unit: Decimal(scale) for scale, units in _SECONDS.items() for unit in units.split()}

_CLOCK = re.compile(r"(?<![\d:.])(?:(\d{1,3}):)?(\d{1,2}):(\d{2}(?:\.\d{1,6})?)(?![\d:])")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_COMPOUND = re.compile(rf"\b({'|'.join(_TENS)})[\s-]+({'|'.join(_UNITS[1:10])})\b")
_HALF = re.compile(r"(?<=\d)\s+and\s+a\s+half\b")
_MIXED = re.compile(r"(?<![\w.])(\d{1,9})\s*&0(?=\.\d)")
"""What `2½` and `two and a half` become: `2 &0.5`."""
_MINUTES = re.compile(r"(?<![\w.])(\d{1,4})m\s?(?=\d{1,2}s\b)")
_PRONOUN = re.compile(r"\b(?:the|this|that|which)\s+(?:[a-z]+\s+)?one\b(?!\s+time)")
"""`one` as a pronoun: `The red one flashes three times.`"""
_CHINESE = (
    (re.compile("[小钟]时|小時|钟头"), " hours "),
    (re.compile(r"分钟|分鐘|(?<=\d)\s*分(?=\s*\d+(?:\.\d+)?\s*秒)"), " minutes "),
    (re.compile("毫秒"), " ms "),
    (re.compile("秒[钟鐘]?"), " seconds "),
    (re.compile("[一总總]共|共[计計]"), " "),
)
"""Units of time in Chinese, and words for "in all", whose first sign is a number."""
_DIGITS = r"(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,2}(?![\w]))?"
_TOKEN = re.compile(rf"(?P<number>(?<![\w.)\]+-])[-+]?{_DIGITS}|(?<![\w.]){_DIGITS})|[^\W\d_]+(?:'[^\W\d_]+)*|\S", re.I)
_NUMBER = re.compile(rf"[-+]?{_DIGITS}", re.I)
_LONGEST = 40
"""Longest number that is read, in characters."""

_PUNCTUATION = frozenset(".,;:!\"'()[]{}“”‘…。、；「」『』《》«»【】=–—-#*")
_HARMLESS = FRAMING | THINGS | COLOURS | SHAPES | DEGREE
_HARMLESS |= frozenset("second seconds into number count counted counts value code reads 次 个 個".split())
_RESCALING = re.compile(
    r"(?:minutes|hours|days|weeks|months|years|decades|dozens|scores|hundreds|thousands|\w+illions|percents|pairs|halves"
    r"|thirds|quarters|\w+ths|tens|tons|guesses|squares|less|plus|minus|versus|perhaps|unless|maybes|powers|factors|folds"
    r"|afterwards|\w+(?:ss|us|is)|\w+seconds|\w+mins|hrs)"
)
"""Words that end in -s and are not the name of what was counted."""


def parse_number(text: str) -> str | None:
    """Return the single number that `text` claims, as digits, without units and words around it.

    `1:05` is 65 seconds and so is `1 minute 5 seconds`; `1,000`, `minus three`, `twenty-one`, `2½`, `twice` and
    `three (3)` are numbers. `3, not 4` claims 3.

    Returns:
        The digits as written, with leading zeros, or None if the text has no number, several numbers, or a word or sign
        that may change the number (`at least 3`, `3k`, `hardly 3`).
    """
    tokens = _tokens(text)
    values, denied = [], set()
    at = 0
    while at < len(tokens):
        word = tokens[at][0]
        value, end = _value(tokens, at)
        if value is None:
            if not _is_harmless(tokens, at):
                return None
            at += 1
            continue
        if word == "not":
            denied.add(value)
        else:
            values.append(value)
        at = end
    if len(values) != 1 or values[0] in denied or len(values[0]) > _LONGEST:
        return None
    return values[0].lstrip("+")


def is_number(text: str) -> bool:
    """Whether `text` is only a number in digits, not too long to be read."""
    return len(text) <= _LONGEST and _NUMBER.fullmatch(plain(text).strip()) is not None


def same_number(reply: str, answer: str, tolerance: float | None = None) -> bool:
    """Whether `reply` claims the number `answer`, within `tolerance` if it is given.

    Without a tolerance the values are the same to the last digit. Digits with leading zeros are codes (`07` is not
    `7`): they must be the same digits.
    """
    number, answer = parse_number(reply), plain(answer).strip().lstrip("+")
    if number is None:
        return False
    if tolerance is not None:
        return abs(Fraction(number) - Fraction(answer)) <= tolerance + 1e-6
    if _is_code(number) or _is_code(answer):
        return number == answer
    return Decimal(number) == Decimal(answer)


Tokens = list[tuple[str, bool, bool]]
"""(word, number or sign; whether it is a number; whether no space separates it from the token before)."""


def _tokens(text: str) -> Tokens:
    for pattern, word in _CHINESE if not text.isascii() else ():
        text = pattern.sub(word, text)
    text = plain(text)
    large = re.sub(r"(?<=\d)\s*(?=[A-Z]\b)", " ^", text)  # `3 M` and `3K` are multiples
    text = _CLOCK.sub(_clock_seconds, _MINUTES.sub(r"\1 min ", large.lower()))
    text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    text = _COMPOUND.sub(lambda found: str(_WORDS[found[1]] + _WORDS[found[2]]), text)
    text = re.sub(r"[a-z]+|[^\W\d_]", lambda word: str(_WORDS.get(word[0], word[0])), _PRONOUN.sub(" ", text))
    text = re.sub(r"\bhalf\s+(?:a\s+)?second\b", "0.5 s", text)
    text = _MIXED.sub(r"\1", _HALF.sub(" &0.5", text)).replace("&0.", "0.")
    text = re.sub(r"\b(?:minus|negative)\s+(?=\d)", "-", text)
    text = re.sub(r"^\W*[a-z]\s*=", "=", text)  # `n = 3`
    ends = -1
    tokens = []
    for found in _TOKEN.finditer(text):
        tokens.append((found[0], found["number"] is not None, found.start() == ends))
        ends = found.end()
    return tokens


def _value(tokens: Tokens, at: int) -> tuple[str | None, int]:
    """The number that begins at `at` with its units, its restatement in brackets or its `not`, and where it ends."""
    if at < len(tokens) and tokens[at][0] == "not":
        value, end = _value(tokens, at + 1)
        return (value, end) if value is not None and tokens[at + 1][0] != "not" else (None, at)
    if at >= len(tokens) or not tokens[at][1]:
        return None, at
    value, end = _duration(tokens, at)
    again = [word for word, _, _ in tokens[end : end + 3]]
    if len(again) == 3 and again[0] in "([" and again[2] in ")]" and again[1] == tokens[at][0]:
        end += 3
    return value, end


def _duration(tokens: Tokens, at: int) -> tuple[str, int]:
    """A number, in seconds when units of time follow: `1 minute 30 seconds` is 90, `500 ms` is 0.5."""
    first, total, last, end = tokens[at][0], Decimal(0), None, at
    while end + 1 < len(tokens) and tokens[end][1] and len(tokens[end][0]) <= _LONGEST:
        unit = tokens[end + 1][0]
        scale = _SCALES.get(unit)
        if scale is None or (last is not None and scale >= last):
            break
        total, last, end = total + Decimal(tokens[end][0]) * scale, scale, end + 2
        if tokens[end : end + 1] and tokens[end][0] in ("and", ",") and end + 1 < len(tokens) and tokens[end + 1][1]:
            end += 1
    if last is None:
        return first, at + 1
    if tokens[end - 1][0] in ("and", ","):
        end -= 1
    return (first if last == 1 and end == at + 2 else f"{total.normalize():f}"), end


def _is_harmless(tokens: Tokens, at: int) -> bool:
    """Whether a token that is not a number leaves the number unchanged."""
    word, _, touches = tokens[at]
    after = at > 0 and tokens[at - 1][1]
    before = at + 1 < len(tokens) and tokens[at + 1][2]
    if word in ("-", "–", "—", "#", "*"):
        return not touches and not before  # list marker or dash, not an arithmetic sign
    if word == "!":
        return at > 0 and not before
    if word in _PUNCTUATION:
        return True
    if not word[0].isalpha():
        return False
    if touches and after:
        return word in ("x", "times", "次", "个", "個")
    if before and tokens[at + 1][1] and word.isascii():
        return False  # `b3`
    if word in ("times", "time", "x", "m"):
        factor = at + 1 < len(tokens) and tokens[at + 1][0] in ("the", "a", "of")
        return not factor and any(number for _, number, _ in tokens[:at])
    if word in _HARMLESS:
        return True
    return after and len(word) > 3 and word.endswith("s") and word.isalpha() and not _RESCALING.fullmatch(word)


def _clock_seconds(clock: re.Match[str]) -> str:
    hours, minutes, seconds = clock.groups()
    return f"{(int(hours or 0) * 3600 + int(minutes) * 60 + Decimal(seconds)).normalize():f}"


def _is_code(digits: str) -> bool:
    return len(digits) > 1 and digits[0] == "0" and "." not in digits
