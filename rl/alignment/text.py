"""How the constraints read an answer: visible text, words, sentences, paragraphs and list items."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_UNSPACED = "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
"""Kana and Han, which are written without spaces; each character counts as a word."""


def _marks() -> str:
    """The inside of a class of a regular expression: combining marks, such as accents and the vowels of Devanagari."""
    places = [place for place in range(0x300, 0x20000) if _is_mark(place)]
    starts = [place for place in places if not _is_mark(place - 1)]
    ends = [place for place in places if not _is_mark(place + 1)]
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in zip(starts, ends, strict=True))


def _is_mark(place: int) -> bool:
    return unicodedata.category(chr(place))[0] == "M"


_MARKS = _marks()
_PART = rf"(?:(?!{_UNSPACED})[^\W_][{_MARKS}]*)+"
_WORD = re.compile(rf"{_UNSPACED}|{_PART}(?:['’\-]{_PART})*")
_ABBREVIATION = re.compile(r"(?<![^\W_])(?:e\.g|i\.e|p\.p\.s|p\.s|mrs?|ms|dr|prof|vs)\.$", re.IGNORECASE)
# A match begins at the first mark of a run only: a long run that is no end would take quadratic time otherwise.
_END = re.compile(r"(?<![.!?…؟۔।॥])[.!?…؟۔।॥]+[\"'”’»)\]*_]*(?=\s|$)|[。！？]+[”’」』）]*")
_HEADING = re.compile(r"\s*#{1,6}\s")
_ITEM = re.compile(r"\s*(?:[-*+•]\s|\d{1,3}[.)]\s|\||```)")
_MARKER = re.compile(r"^\s*(?:[-*+•]|\d{1,3}[.)]|#{1,6})\s+")
BULLET = re.compile(r"^[ \t]*[-*+•][ \t]+\S.*$", re.MULTILINE)
NUMBERED = re.compile(r"^[ \t]*\d{1,3}[.)][ \t]+\S.*$", re.MULTILINE)

LONGEST = 200_000
"""Characters of an answer that are read. A longer one satisfies no constraint; it bounds the work."""


@lru_cache(maxsize=16)
def visible(text: str) -> str:
    """The text as a reader sees it: no control or format characters, lines end with a newline, no space around it."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    kept = (c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    return "".join(kept).strip()


@lru_cache(maxsize=16)
def has_content(text: str) -> bool:
    """Whether a visible text can satisfy a constraint at all: it has a letter or digit and does not repeat itself.

    Repetition is what a policy falls into that is rewarded for length: of 20 words or more at least three in ten (60 in
    a long answer) must be different, and no sentence of five words or more may occur more than twice.
    """
    if len(text) > LONGEST or not any(c.isalnum() for c in text):
        return False
    said = [word.casefold() for word in words(text)]
    if len(said) >= 20 and len(set(said)) < min(0.3 * len(said), 60):
        return False
    counts: dict[str, int] = {}
    for sentence in sentences(text):
        if len(words(sentence)) >= 5:
            counts[sentence.casefold()] = counts.get(sentence.casefold(), 0) + 1
    return max(counts.values(), default=0) <= 2


def words(text: str) -> list[str]:
    """Words: letters and digits, joined by apostrophes and hyphens; each Han or kana character is one."""
    return _WORD.findall(text)


@lru_cache(maxsize=16)
def sentences(text: str) -> tuple[str, ...]:
    """Sentences with their end mark. A paragraph, list item or heading ends one as well; `1.5` and `e.g.` do not."""
    found: list[str] = []
    for block in (part for paragraph in paragraphs(text) for part in _blocks(paragraph)):
        block, begin = _MARKER.sub("", block), 0
        for end in _END.finditer(block):
            if _ABBREVIATION.search(block, max(begin, end.start() - 10), end.end()):
                continue
            found.append(block[begin : end.end()].strip())
            begin = end.end()
        found.append(block[begin:].strip())
    return tuple(sentence for sentence in found if any(c.isalnum() for c in sentence))


def _blocks(paragraph: str) -> list[str]:
    """A paragraph's headings, list items and rows of tables, each alone, and the lines between them."""
    found: list[list[str]] = []
    alone = True
    for line in paragraph.split("\n"):
        heading = _HEADING.match(line) is not None
        if alone or heading or _ITEM.match(line):
            found.append([])
        found[-1].append(line)
        alone = heading
    return ["\n".join(lines) for lines in found]


def paragraphs(text: str) -> list[str]:
    """Blocks of text with blank lines between them."""
    return [block.strip() for block in re.split(r"\n[ \t]*\n\s*", text) if block.strip()]


def count_word(text: str, word: str) -> int:
    """Occurrences of a word or phrase as a whole, in any case."""
    return len(as_whole(word).findall(text))


@lru_cache(maxsize=256)
def as_whole(word: str) -> re.Pattern[str]:
    """A word or phrase that no letter, digit or mark continues; beside Han and kana, which have no spaces, any may."""
    before = "" if re.match(_UNSPACED, word) else rf"(?<!(?!{_UNSPACED})[^\W_])"
    after = "" if re.match(_UNSPACED, word[-1:]) else rf"(?!(?!{_UNSPACED})[^\W_]|[{_MARKS}])"
    return re.compile(before + re.escape(word) + after, re.IGNORECASE)
