"""Letters and signs: case, script, language, frequency of a letter, digits, commas, quotation marks, dates."""

from __future__ import annotations

import datetime
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rl.alignment.base import Constraint, Counted, constraint, require
from rl.alignment.text import words

SCRIPTS = {
    "Latin": ("LATIN",), "Cyrillic": ("CYRILLIC",), "Greek": ("GREEK",), "Arabic": ("ARABIC",),
    "Hebrew": ("HEBREW",), "Devanagari": ("DEVANAGARI",), "Chinese": ("CJK",), "Korean": ("HANGUL", "CJK"),
    "Japanese": ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK"), "Thai": ("THAI",),
}  # fmt: skip
"""Script → first words of the Unicode names of its letters."""
LANGUAGES = {
    "en": "English", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese",
    "nl": "Dutch", "pl": "Polish", "ru": "Russian", "tr": "Turkish", "ar": "Arabic", "hi": "Hindi", "ja": "Japanese",
    "ko": "Korean", "zh": "Chinese",
}  # fmt: skip
"""Codes of ISO 639-1 that a constraint may ask for."""


def _cased(text: str) -> list[str]:
    return [c for c in text if c.isupper() or c.islower()]


@constraint("lowercase")
@dataclass(frozen=True)
class Lowercase(Constraint):
    """No capital letter, and at least one small one."""

    def describe(self) -> str:
        return "Write in lowercase letters only; use no capital letter."

    def holds(self, text: str) -> bool:
        return bool(_cased(text)) and all(c.islower() for c in _cased(text))


@constraint("uppercase")
@dataclass(frozen=True)
class Uppercase(Constraint):
    """No small letter, and at least one capital one."""

    def describe(self) -> str:
        return "Write in capital letters only."

    def holds(self, text: str) -> bool:
        return bool(_cased(text)) and all(c.isupper() for c in _cased(text))


@constraint("script")
@dataclass(frozen=True)
class Script(Constraint):
    """At least nine in ten letters are of this script."""

    script: str

    def __post_init__(self) -> None:
        require(self.script in SCRIPTS, f"script must be one of {', '.join(SCRIPTS)}")

    def describe(self) -> str:
        return f"Write your answer in the {self.script} script."

    def holds(self, text: str) -> bool:
        names = [unicodedata.name(c, "").partition(" ")[0] for c in text if c.isalpha()]
        own = sum(name in SCRIPTS[self.script] for name in names)
        needed = {"Japanese": ("HIRAGANA", "KATAKANA"), "Korean": ("HANGUL",)}.get(self.script)
        return own > 0 and own >= 0.9 * len(names) and (needed is None or any(name in needed for name in names))


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError:
        raise ValueError(
            "the constraint language needs py3langid; run: pip install 'keye[alignment]', or use the constraint script"
        ) from None
    found = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    found.set_languages(list(LANGUAGES))
    return found


@constraint("language")
@dataclass(frozen=True)
class Language(Constraint):
    """The language that py3langid finds, of `LANGUAGES`, with a probability of 0.9 or more, in five words or more."""

    language: str

    def __post_init__(self) -> None:
        require(self.language in LANGUAGES, f"language must be one of {', '.join(LANGUAGES)}")
        _identifier()  # a manifest is refused when it is read, and not in the middle of a run

    def describe(self) -> str:
        return f"Write your entire answer in {LANGUAGES[self.language]}."

    def holds(self, text: str) -> bool:
        if len(words(text)) < 5:
            return False
        found, probability = _identifier().classify(text)
        return found == self.language and probability >= 0.9


@constraint("letter_frequency")
@dataclass(frozen=True)
class LetterFrequency(Counted):
    """How often a letter occurs, in any case."""

    letter: str

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.letter) == 1 and self.letter.isalpha(), "letter must be one letter")

    def describe(self) -> str:
        return f"Use the letter '{self.letter}' {self.amount('time')}."

    def number(self, text: str) -> int:
        return text.casefold().count(self.letter.casefold())


@constraint("digits_only")
@dataclass(frozen=True)
class DigitsOnly(Constraint):
    """Only the digits 0 to 9."""

    def describe(self) -> str:
        return "Answer with digits only: no words, spaces or other signs."

    def holds(self, text: str) -> bool:
        return re.fullmatch(r"[0-9]{1,100}", text) is not None


@constraint("no_digits")
@dataclass(frozen=True)
class NoDigits(Constraint):
    """No digit of any script."""

    def describe(self) -> str:
        return "Use no digits; write numbers as words."

    def holds(self, text: str) -> bool:
        return not any(c.isdigit() for c in text)


@constraint("no_commas")
@dataclass(frozen=True)
class NoCommas(Constraint):
    """No comma of any script."""

    def describe(self) -> str:
        return "Use no commas."

    def holds(self, text: str) -> bool:
        return not any(c in ",،、，﹐" for c in text)


@constraint("quoted")
@dataclass(frozen=True)
class Quoted(Constraint):
    """The answer is enclosed in one pair of double quotation marks."""

    def describe(self) -> str:
        return "Enclose your entire answer in double quotation marks."

    def holds(self, text: str) -> bool:
        inside = text[1:-1]
        return len(text) > 2 and text[0] + text[-1] in ('""', "“”") and not any(c in '"“”' for c in inside)


@constraint("date")
@dataclass(frozen=True)
class Date(Constraint):
    """One date or more in this format, all of days that exist, and no date in the other formats."""

    format: str = "YYYY-MM-DD"

    FORMATS = {
        "YYYY-MM-DD": (r"(?<!\d)\d{4}-\d{2}-\d{2}(?!\d)", "%Y-%m-%d"),
        "DD/MM/YYYY": (r"(?<!\d)\d{2}/\d{2}/\d{4}(?!\d)", "%d/%m/%Y"),
        "DD.MM.YYYY": (r"(?<!\d)\d{2}\.\d{2}\.\d{4}(?!\d)", "%d.%m.%Y"),
    }

    def __post_init__(self) -> None:
        require(self.format in self.FORMATS, f"format must be one of {', '.join(self.FORMATS)}")

    def describe(self) -> str:
        return f"Mention a date, and write every date in the format {self.format}."

    def holds(self, text: str) -> bool:
        found = {name: re.findall(pattern, text) for name, (pattern, _) in self.FORMATS.items()}
        mine = found.pop(self.format)
        return bool(mine) and not any(found.values()) and all(map(self._exists, mine))

    def _exists(self, date: str) -> bool:
        try:
            return bool(datetime.datetime.strptime(date, self.FORMATS[self.format][1]))
        except ValueError:
            return False
