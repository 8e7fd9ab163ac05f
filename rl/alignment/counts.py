"""Numbers of words, sentences, paragraphs, characters, list items and sections."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rl.alignment.base import Constraint, Counted, constraint, filled, require
from rl.alignment.text import BULLET, NUMBERED, paragraphs, sentences, words


@constraint("words")
@dataclass(frozen=True)
class Words(Counted):
    """The number of words."""

    def describe(self) -> str:
        return f"Answer with {self.amount('word')}."

    def number(self, text: str) -> int:
        return len(words(text))


@constraint("sentences")
@dataclass(frozen=True)
class Sentences(Counted):
    """The number of sentences; a list item or heading is one."""

    def describe(self) -> str:
        return f"Answer with {self.amount('sentence')}."

    def number(self, text: str) -> int:
        return len(sentences(text))


@constraint("paragraphs")
@dataclass(frozen=True)
class Paragraphs(Counted):
    """The number of paragraphs; blank lines separate them."""

    def describe(self) -> str:
        return f"Write {self.amount('paragraph')}, separated by blank lines."

    def number(self, text: str) -> int:
        return len(paragraphs(text))


@constraint("characters")
@dataclass(frozen=True)
class Characters(Counted):
    """The number of characters, with spaces and line breaks, without space around the answer."""

    def describe(self) -> str:
        return f"Use {self.amount('character')} in total, including spaces."

    def number(self, text: str) -> int:
        return len(text)


@constraint("bullets")
@dataclass(frozen=True)
class Bullets(Counted):
    """The number of bullet points: lines that begin with `-`, `*`, `+` or `•`."""

    def describe(self) -> str:
        return f"Include {self.amount('bullet point')}, each on a line that begins with '- '."

    def number(self, text: str) -> int:
        return len(BULLET.findall(text))


@constraint("numbered_items")
@dataclass(frozen=True)
class NumberedItems(Counted):
    """The number of items `1. …`, `2. …`, which must be numbered in order from 1."""

    def describe(self) -> str:
        return f"Include a numbered list (1., 2., …) with {self.amount('item')}."

    def number(self, text: str) -> int:
        return len(NUMBERED.findall(text))

    def holds(self, text: str) -> bool:
        numbers = [int(re.match(r"\s*(\d+)", line)[1]) for line in NUMBERED.findall(text)]
        return numbers == list(range(1, len(numbers) + 1)) and super().holds(text)


@constraint("sections")
@dataclass(frozen=True)
class Sections(Counted):
    """The number of sections, each begun by a line `<marker> <number>` and numbered in order from 1."""

    marker: str = "Section"

    def __post_init__(self) -> None:
        super().__post_init__()
        filled("marker", [self.marker])

    def describe(self) -> str:
        return (
            f"Write {self.amount('section')}. Begin each with a line '{self.marker} 1', '{self.marker} 2' and so on, "
            "followed by its text."
        )

    def number(self, text: str) -> int:
        return len(self._starts(text))

    def holds(self, text: str) -> bool:
        starts = self._starts(text)
        ends = [start.start() for start in starts[1:]] + [len(text)]
        full = all(any(c.isalnum() for c in text[s.end() : end]) for s, end in zip(starts, ends, strict=False))
        return full and [int(s[1]) for s in starts] == list(range(1, len(starts) + 1)) and super().holds(text)

    def _starts(self, text: str) -> list[re.Match[str]]:
        line = rf"^[ \t]*{re.escape(self.marker)} (\d{{1,3}})[.:]?[ \t]*$"
        return list(re.finditer(line, text, re.MULTILINE | re.IGNORECASE))


@constraint("sentence_length")
@dataclass(frozen=True)
class SentenceLength(Constraint):
    """Every sentence has at most `longest` words."""

    longest: int

    def __post_init__(self) -> None:
        require(self.longest >= 1, "longest must be at least 1")

    def describe(self) -> str:
        return f"Use at most {self.longest} words in every sentence."

    def holds(self, text: str) -> bool:
        return all(len(words(sentence)) <= self.longest for sentence in sentences(text))


@constraint("capital_words")
@dataclass(frozen=True)
class CapitalWords(Counted):
    """The number of words of two letters or more in capitals alone."""

    def describe(self) -> str:
        return f"Write {self.amount('word')} in all capital letters."

    def number(self, text: str) -> int:
        return sum(word.isupper() and sum(c.isalpha() for c in word) >= 2 for word in words(text))
