"""Words that must or must not occur, how often, in which order and where."""

from __future__ import annotations

from dataclasses import dataclass

from rl.alignment.base import Constraint, Counted, constraint, filled, require
from rl.alignment.text import as_whole, count_word, paragraphs, sentences, words


def _listed(texts: tuple[str, ...]) -> str:
    return ", ".join(f"'{text}'" for text in texts)


@constraint("keywords_present")
@dataclass(frozen=True)
class KeywordsPresent(Constraint):
    """Each of the words occurs, in any case."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        filled("words", self.words)

    def describe(self) -> str:
        return f"Use each of these words at least once: {_listed(self.words)}."

    def holds(self, text: str) -> bool:
        return all(count_word(text, word) for word in self.words)


@constraint("keywords_absent")
@dataclass(frozen=True)
class KeywordsAbsent(Constraint):
    """None of the words occurs, in any case."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        filled("words", self.words)

    def describe(self) -> str:
        return f"Do not use any of these words: {_listed(self.words)}."

    def holds(self, text: str) -> bool:
        return not any(count_word(text, word) for word in self.words)


@constraint("keyword_frequency")
@dataclass(frozen=True)
class KeywordFrequency(Counted):
    """How often a word occurs, in any case."""

    word: str

    def __post_init__(self) -> None:
        super().__post_init__()
        filled("word", [self.word])

    def describe(self) -> str:
        return f"Use the word '{self.word}' {self.amount('time')}."

    def number(self, text: str) -> int:
        return count_word(text, self.word)


@constraint("keyword_order")
@dataclass(frozen=True)
class KeywordOrder(Constraint):
    """The words occur, and the first occurrences are in this order."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        filled("words", self.words)
        require(len(self.words) > 1, "words must have two or more words")

    def describe(self) -> str:
        return f"Use these words, and introduce them in this order: {_listed(self.words)}."

    def holds(self, text: str) -> bool:
        found = [as_whole(word).search(text) for word in self.words]
        places = [match.start() for match in found if match]
        return len(places) == len(self.words) and places == sorted(places)


@constraint("sentence_start")
@dataclass(frozen=True)
class SentenceStart(Constraint):
    """Every sentence begins with a word of this first letter."""

    letter: str

    def __post_init__(self) -> None:
        require(len(self.letter) == 1 and self.letter.isalpha(), "letter must be one letter")

    def describe(self) -> str:
        return f"Begin every sentence with a word that starts with the letter '{self.letter.upper()}'."

    def holds(self, text: str) -> bool:
        firsts = [(words(sentence) or ["0"])[0] for sentence in sentences(text)]
        return all(word[0].casefold() == self.letter.casefold() for word in firsts)


@constraint("paragraph_start")
@dataclass(frozen=True)
class ParagraphStart(Constraint):
    """The paragraph `paragraph` (from 1) begins with the word `word`, in any case."""

    paragraph: int
    word: str

    def __post_init__(self) -> None:
        require(self.paragraph >= 1, "paragraph must be at least 1")
        filled("word", [self.word])

    def describe(self) -> str:
        return f"Begin paragraph {self.paragraph} with the word '{self.word}'; separate paragraphs by blank lines."

    def holds(self, text: str) -> bool:
        found = paragraphs(text)
        if len(found) < self.paragraph:
            return False
        first = words(found[self.paragraph - 1])[:1]
        return bool(first) and first[0].casefold() == self.word.casefold()


@constraint("start_phrase")
@dataclass(frozen=True)
class StartPhrase(Constraint):
    """The answer begins with this phrase, letter by letter, and goes on."""

    phrase: str

    def __post_init__(self) -> None:
        filled("phrase", [self.phrase])

    def describe(self) -> str:
        return f'Begin your answer with exactly this phrase: "{self.phrase}"'

    def holds(self, text: str) -> bool:
        rest = text[len(self.phrase) :]
        return text.startswith(self.phrase) and any(c.isalnum() for c in rest)


@constraint("end_phrase")
@dataclass(frozen=True)
class EndPhrase(Constraint):
    """The answer ends with this phrase, letter by letter, after other text."""

    phrase: str

    def __post_init__(self) -> None:
        filled("phrase", [self.phrase])

    def describe(self) -> str:
        return f'End your answer with exactly this phrase and nothing after it: "{self.phrase}"'

    def holds(self, text: str) -> bool:
        before = text[: -len(self.phrase)]
        return text.endswith(self.phrase) and any(c.isalnum() for c in before)
