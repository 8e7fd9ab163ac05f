"""Draws sets of constraints that one answer can satisfy: the proof is a witness text (`rl.alignment.witness`)."""

from __future__ import annotations

import random
from collections.abc import Callable

from keye.errors import KeyeError
from rl.alignment import counts, keywords, layout, letters, phrases
from rl.alignment.base import Constraint
from rl.alignment.conflicts import compatible
from rl.alignment.witness import witness

Rng = random.Random
ATTEMPTS = 100


def _amount(rng: Rng, least: tuple[int, int], most: tuple[int, int], exact: tuple[int, int]) -> tuple[str, int]:
    relation = rng.choice(["at least", "at most", "exactly"])
    return relation, rng.randint(*{"at least": least, "at most": most, "exactly": exact}[relation])


def _some(rng: Rng, low: int, high: int) -> tuple[str, int]:
    """At least or exactly a number of list items and the like."""
    return rng.choice(["at least", "exactly"]), rng.randint(low, high)


def _letter(rng: Rng) -> letters.LetterFrequency:
    relation, count = _some(rng, 2, 5)
    return letters.LetterFrequency(relation, count, rng.choice("bkmpvg" if relation == "at least" else "zxj"))


def _date(rng: Rng) -> letters.Date:
    return letters.Date(rng.choice(list(letters.Date.FORMATS)))


DRAWS: dict[str, Callable[[Rng, str], Constraint]] = {
    "words": lambda r, _: counts.Words(*_amount(r, (30, 120), (70, 150), (50, 90))),
    "sentences": lambda r, _: counts.Sentences(*_amount(r, (3, 8), (6, 12), (5, 7))),
    "paragraphs": lambda r, _: counts.Paragraphs(*_amount(r, (2, 5), (3, 5), (3, 5))),
    "characters": lambda r, _: counts.Characters(*_amount(r, (200, 700), (600, 1000), (600, 900))),
    "bullets": lambda r, _: counts.Bullets(*_some(r, 2, 5)),
    "numbered_items": lambda r, _: counts.NumberedItems(*_some(r, 2, 5)),
    "sections": lambda r, _: counts.Sections(*_some(r, 2, 3), r.choice(["Section", "Part"])),
    "sentence_length": lambda r, _: counts.SentenceLength(r.randint(10, 20)),
    "capital_words": lambda r, _: counts.CapitalWords(*_some(r, 1, 4)),
    "keywords_present": lambda r, _: keywords.KeywordsPresent(tuple(r.sample(phrases.KEYWORDS, r.randint(1, 3)))),
    "keywords_absent": lambda r, _: keywords.KeywordsAbsent(tuple(r.sample(phrases.ABSENT, r.randint(2, 4)))),
    "keyword_frequency": lambda r, _: keywords.KeywordFrequency(*_some(r, 2, 4), r.choice(phrases.FREQUENT)),
    "keyword_order": lambda r, _: keywords.KeywordOrder(tuple(r.sample(phrases.ORDERED, r.randint(2, 3)))),
    "sentence_start": lambda r, _: keywords.SentenceStart(r.choice("sctmpwr")),
    "paragraph_start": lambda r, _: keywords.ParagraphStart(r.randint(2, 3), r.choice(phrases.PARAGRAPH_STARTS)),
    "start_phrase": lambda r, _: keywords.StartPhrase(r.choice(phrases.STARTS)),
    "end_phrase": lambda r, _: keywords.EndPhrase(r.choice(phrases.ENDS)),
    "json": lambda r, _: layout.Json(tuple(r.sample(phrases.KEYS, r.randint(1, 4)))),
    "heading": lambda r, _: layout.Heading(*_some(r, 1, 3), r.randint(1, 3)),
    "table": lambda r, _: layout.Table(r.randint(2, 4), r.randint(1, 3)),
    "code_block": lambda r, _: layout.CodeBlock(r.choice(["python", "text", "html"])),
    "highlights": lambda r, _: layout.Highlights(*_some(r, 1, 3)),
    "title": lambda r, _: layout.Title(),
    "placeholders": lambda r, _: layout.Placeholders(*_some(r, 1, 4)),
    "postscript": lambda r, _: layout.Postscript(r.choice(["P.S.", "P.P.S."])),
    "repeat_prompt": lambda _, request: layout.RepeatPrompt(request),
    "two_answers": lambda r, _: layout.TwoAnswers(),
    "choice": lambda r, _: layout.Choice(r.choice(phrases.CHOICES)),
    "lowercase": lambda r, _: letters.Lowercase(),
    "uppercase": lambda r, _: letters.Uppercase(),
    "script": lambda r, _: letters.Script(r.choice(list(phrases.SCRIPT_SENTENCES))),
    "language": lambda r, _: letters.Language(r.choice(list(phrases.LANGUAGE_SENTENCES))),
    "letter_frequency": lambda r, _: _letter(r),
    "digits_only": lambda r, _: letters.DigitsOnly(),
    "no_digits": lambda r, _: letters.NoDigits(),
    "no_commas": lambda r, _: letters.NoCommas(),
    "quoted": lambda r, _: letters.Quoted(),
    "date": lambda r, _: _date(r),
}
"""Kind → draws its parameters, from a random generator and the request of the prompt."""


def draw_constraints(rng: Rng, request: str, number: int, kinds: tuple[str, ...] = ()) -> tuple[Constraint, ...]:
    """A set of constraints of different kinds that one answer can satisfy.

    Kinds that leave no room for others, such as `json`, make a smaller set.

    Args:
        request: the text of the prompt, which `repeat_prompt` asks to repeat.
        number: constraints of the set, 1 or more.
        kinds: the kinds to draw from; empty = all but `language`, which needs py3langid.

    Raises:
        KeyeError: no set of these kinds can be satisfied.
    """
    allowed = set(kinds or (kind for kind in DRAWS if kind != "language"))
    for _ in range(ATTEMPTS):
        chosen: list[str] = []
        while len(chosen) < number and (open_ := [k for k in compatible(set(chosen)) if k in allowed]):
            chosen.append(rng.choice(open_))
        drawn = tuple(DRAWS[kind](rng, request) for kind in chosen)
        if witness(drawn) is not None:
            return drawn
    raise KeyeError(
        f"no set of {number} constraints of the kinds {', '.join(sorted(allowed))} can be satisfied for the request "
        f"{request!r:.60}; draw fewer, or allow more kinds"
    )
