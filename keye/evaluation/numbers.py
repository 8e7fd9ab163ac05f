"""The one number that an answer names, whether it is written in digits, in words or as a clock time."""

import re

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = {word: value for value, word in enumerate(_UNITS)}
_WORDS |= {word: 10 * (place + 2) for place, word in enumerate(_TENS)}
_WORDS |= {"once": 1, "twice": 2, "thrice": 3, "never": 0}

_CLOCK = re.compile(r"(?<![\d:.])(?:(\d+):)?(\d{1,2}):(\d{2}(?:\.\d+)?)(?![\d:])")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_TENS_AND_UNITS = re.compile(rf"\b({'|'.join(_TENS)})[\s-]+({'|'.join(_UNITS[1:10])})\b")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+(?![a-z]))?")
_MAGNITUDE = re.compile(r"\b(?:hundreds?|thousands?|millions?|billions?|dozens?|half|halves|quarters?)\b|\d\s*/\s*\d")
"""Words and forms that change the value of the number beside them. A reply that holds one names no plain number."""
_PRONOUN = re.compile(r"\b(?:the|this|that|which)\s+(?:[a-z]+\s+)?one\b(?!\s+time)")
"""`one` that stands for a thing: `The red one flashes three times.`"""
_INEQUALITY = re.compile(
    r"\b(?:more|less|fewer|greater|larger|smaller|higher|lower|other)\s+than\b|\bat\s+(?:least|most)\b"
    r"|\bup\s+to\b|\b(?:over|under|above|below)\s+(?=[-+.\d])|[<>≤≥≠~]"
)


def parse_number(text: str) -> str | None:
    """Returns the one number in `text` as digits, without the units and words around it.

    `1:05` is 65 seconds, `1,000` is 1000, `minus three`, `twenty-one` and `twice` are numbers.

    Returns:
        The digits as they were written (leading zeros stay), or None when the text names no number, several numbers,
        a bound (`at least 3`), or a number whose value depends on a further word (`3 hundred`, `a half`).
    """
    text = text.lower().replace("−", "-")
    if _MAGNITUDE.search(text) or _INEQUALITY.search(text):
        return None
    text = _CLOCK.sub(_clock_seconds, text)
    text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    text = _TENS_AND_UNITS.sub(lambda found: str(_WORDS[found[1]] + _WORDS[found[2]]), text)
    text = _PRONOUN.sub(" ", text)
    text = re.sub(r"[a-z]+", lambda word: str(_WORDS.get(word[0], word[0])), text)
    text = re.sub(r"\b(?:minus|negative)\s+(?=\d)", "-", text)
    found = _NUMBER.findall(text)
    return found[0].lstrip("+") if len(found) == 1 else None


def is_number(text: str) -> bool:
    """Whether `text` is a number in digits and nothing else."""
    return _NUMBER.fullmatch(text.strip()) is not None


def same_number(reply: str, answer: str, tolerance: float | None = None) -> bool:
    """Whether `reply` names the number `answer`, within `tolerance` when there is one.

    Digits with leading zeros are codes (`07` is not `7`): they must be the same digits.
    """
    number, answer = parse_number(reply), answer.strip().lstrip("+")
    if number is None:
        return False
    if tolerance is not None:
        return abs(float(number) - float(answer)) <= tolerance + 1e-6
    if _is_code(number) or _is_code(answer):
        return number == answer
    return float(number) == float(answer)


def _clock_seconds(clock: re.Match[str]) -> str:
    hours, minutes, seconds = clock.groups()
    return f"{int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds):g}"


def _is_code(digits: str) -> bool:
    return len(digits) > 1 and digits[0] == "0" and "." not in digits
