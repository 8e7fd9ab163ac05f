"""Writes a text that satisfies a set of constraints: the proof that the set is satisfiable.

The text has no meaning. Words that constraints ask for are spread over sentences of filler words, lists and the like
follow the last paragraph, and the number of words and sentences is corrected until all constraints hold.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle, islice

from rl.alignment import phrases
from rl.alignment.base import Constraint, Counted

ROUNDS = 1500


def witness(constraints: Sequence[Constraint]) -> str | None:
    """A text that satisfies all `constraints`, as their own `check` decides; None if none was found."""
    by_kind = {constraint.kind: constraint for constraint in constraints}
    for kind, write in _ENTIRE.items():
        if kind in by_kind:
            return _proved(write(by_kind[kind]), constraints)
    for kind, bank in (("language", phrases.LANGUAGE_SENTENCES), ("script", phrases.SCRIPT_SENTENCES)):
        if kind in by_kind:
            sentences = bank.get(getattr(by_kind[kind], kind), ())
            wanted = by_kind.get("paragraphs")
            return _proved(_in_paragraphs(list(sentences), wanted.count if wanted else 1), constraints)
    return _Writer(by_kind).write()


def _proved(text: str, constraints: Sequence[Constraint]) -> str | None:
    return text if all(constraint.check(text) for constraint in constraints) else None


_ENTIRE = {
    "json": lambda c: json.dumps({key: "filler" for key in c.keys or ("answer",)}),
    "digits_only": lambda _: "42",
    "choice": lambda c: c.options[0],
}


def _in_paragraphs(sentences: list[str], number: int) -> str:
    """The sentences in `number` paragraphs of about equal length."""
    ends = [round(i * len(sentences) / number) for i in range(number + 1)]
    parts = (" ".join(sentences[begin:end]) for begin, end in zip(ends, ends[1:], strict=False))
    return "\n\n".join(part for part in parts if part)


def _continued(sentence: str) -> str:
    """A sentence as it follows other words of the same sentence."""
    return sentence[:1].lower() + sentence[1:]


class _Writer:
    """A text of body sentences, followed by what has its own lines."""

    def __init__(self, constraints: dict[str, Constraint]) -> None:
        self.wanted = constraints
        # Words with a letter are added before the total is corrected.
        self.order = sorted(constraints, key=lambda kind: kind != "letter_frequency")
        letter = self._get("letter_frequency", "letter")
        limited = letter is not None and self.wanted["letter_frequency"].relation != "at least"
        usable = [word for word in phrases.FILLER if not (limited and letter in word)]
        start = self._get("sentence_start", "letter")
        openers = [word for word in usable if start is None or word.startswith(start)]
        self.filler, self.openers = cycle(usable), cycle(openers)
        self.opening = list(islice(self.openers, 40))
        with_letter = [word for word in phrases.FILLER if letter and letter in word]
        self.letter_words = cycle(phrases.RARE[letter].split() if letter in phrases.RARE else with_letter or usable)
        self.needed = self._needed()
        self.padding: list[str] = []
        paragraphs = [self._get("paragraphs", "count") or 1, self._get("paragraph_start", "paragraph") or 1]
        self.paragraphs = max(paragraphs)
        self.sentences = max(self.paragraphs, 2, -(-len(self.needed) // 6))
        self.tail = self._tail()

    def _get(self, kind: str, field: str) -> int | str | None:
        return getattr(self.wanted[kind], field) if kind in self.wanted else None

    def _count(self, kind: str) -> int:
        """How many are written of something; none for "at most"."""
        found = self.wanted.get(kind)
        return found.count if isinstance(found, Counted) and found.relation != "at most" else 0

    def _take(self, number: int) -> list[str]:
        return list(islice(self.filler, number))

    def _needed(self) -> list[str]:
        """Words of the body that constraints ask for, in order."""
        words: list[str] = []
        for kind in ("keyword_order", "keywords_present"):
            words += self.wanted[kind].words if kind in self.wanted else ()
        words += [self._get("keyword_frequency", "word")] * self._count("keyword_frequency")
        words += [word.upper() for word in self._take(self._count("capital_words"))]
        words += [f"**{word}**" for word in self._take(self._count("highlights"))]
        words += [f"[{name}]" for name in phrases.PLACEHOLDERS[: self._count("placeholders")]]
        formats = {"YYYY-MM-DD": "2024-05-17", "DD/MM/YYYY": "17/05/2024", "DD.MM.YYYY": "17.05.2024"}
        return words + ([formats[self.wanted["date"].format]] if "date" in self.wanted else [])

    def write(self) -> str | None:
        """The text after corrections, or None if they do not help."""
        for _ in range(ROUNDS):
            text = self._render()
            failed = next((self.wanted[kind] for kind in self.order if not self.wanted[kind].check(text)), None)
            if failed is None:
                return text
            if not self._correct(failed, text):
                return None
        return None

    def _correct(self, failed: Constraint, text: str) -> bool:
        """Change the body so that `failed` is nearer to holding; False if there is no way."""
        if failed.kind == "sentence_length":
            self.sentences += 1
            return True
        if failed.kind not in ("words", "sentences", "characters", "letter_frequency"):
            return False
        more = failed.relation != "at most" and failed.number(text) < failed.count
        if failed.kind == "sentences":
            self.sentences += 1 if more else -1
            return self.sentences >= self.paragraphs
        if more and failed.kind == "letter_frequency":
            self.needed.append(next(self.letter_words))
        elif more:
            self._pad(failed.count - failed.number(text) if failed.kind == "characters" else 99)
        elif self.padding and failed.kind != "letter_frequency":
            self.padding.pop()
        else:
            return False
        if "sentences" not in self.wanted:
            self.sentences = max(self.sentences, (len(self.needed) + len(self.padding)) // 12)
        return True

    def _pad(self, characters: int) -> None:
        """Add a word; one of `characters` with the space before it if so few are missing."""
        if characters > 14:
            self.padding += self._take(1)
        elif characters > 1:
            self.padding.append("".join(islice(cycle(next(self.filler)), characters - 1)))
        else:
            last = self.padding or self.needed or self.opening
            last[-1] += last[-1][-1]

    def _render(self) -> str:
        words = self.needed + self.padding
        openers = islice(cycle(self.opening), self.sentences)
        ends = [round(i * len(words) / self.sentences) for i in range(self.sentences + 1)]
        sentences = [
            " ".join([opener.capitalize(), *words[begin:end]]) + "."
            for opener, begin, end in zip(openers, ends, ends[1:], strict=False)
        ]
        sentences[0] = self._opened(sentences[0])
        body = _in_paragraphs(sentences, self.paragraphs)
        if "paragraph_start" in self.wanted:
            blocks = body.split("\n\n")
            place = self.wanted["paragraph_start"].paragraph - 1
            blocks[place] = f"{self.wanted['paragraph_start'].word} {_continued(blocks[place])}"
            body = "\n\n".join(blocks)
        return self._finished("\n".join([body, *self.tail]))

    def _opened(self, sentence: str) -> str:
        """The first sentence with what precedes it."""
        if "start_phrase" in self.wanted:
            sentence = f"{self.wanted['start_phrase'].phrase} {_continued(sentence)}"
        if "title" in self.wanted:
            sentence = f"<<{' '.join(self.opening[:2])}>>\n{sentence}"
        if "repeat_prompt" in self.wanted:
            sentence = f"{self.wanted['repeat_prompt'].request}\n{sentence}"
        return sentence

    def _line(self, number: int = 2) -> str:
        return " ".join([next(self.openers).capitalize(), *self._take(number - 1)])

    def _tail(self) -> list[str]:
        """Lines after the body, in an order in which none breaks another; the last one is text."""
        lines = [f"{'#' * (self._get('heading', 'level') or 1)} {self._line()}" for _ in range(self._count("heading"))]
        for number in range(1, self._count("sections") + 1):
            lines += [f"{self.wanted['sections'].marker} {number}", f"{self._line(3)}."]
        lines += [f"- {self._line()}" for _ in range(self._count("bullets"))]
        lines += [f"{number}. {self._line()}" for number in range(1, self._count("numbered_items") + 1)]
        if "table" in self.wanted:
            columns = self.wanted["table"].columns
            row = [f"| {' | '.join([self._line(1), *self._take(columns - 1)])} |" for _ in range(4)]
            lines += [row[0], f"|{'---|' * columns}", *row[1 : 1 + self.wanted["table"].rows]]
        if "code_block" in self.wanted:
            lines += [f"```{self.wanted['code_block'].language}", *self._take(1), "```"]
        if "two_answers" in self.wanted:
            lines += ["******"]
        lines += [f"{self._line(3)}."] if lines else []
        lines += [self.wanted["end_phrase"].phrase] if "end_phrase" in self.wanted else []
        return lines + ([f"{self.wanted['postscript'].marker} {self._line(3)}."] if "postscript" in self.wanted else [])

    def _finished(self, text: str) -> str:
        text = text.lower() if "lowercase" in self.wanted else text.upper() if "uppercase" in self.wanted else text
        return f'"{text}"' if "quoted" in self.wanted else text
