"""Which kinds of constraints are not drawn together, and why."""

from __future__ import annotations

from rl.alignment.base import KINDS

ENTIRE = {"json", "digits_only", "choice"}
"""They determine the entire answer, so they stand alone."""

FOREIGN = {"language", "script"}
WITH_FOREIGN = {"paragraphs", "no_digits", "no_commas"}
"""All that is asked for beside a language or script: the words and phrases of other kinds are English."""

WITH_REPEATED = {
    "words", "paragraphs", "bullets", "numbered_items", "sections", "table", "heading", "code_block",
    "keywords_present", "end_phrase", "two_answers",
}  # fmt: skip
"""All that is asked for beside `repeat_prompt`, because the words of the request are not known."""

PAIRS = {
    "lowercase": {"uppercase", "capital_words", "start_phrase", "end_phrase"},
    # The tag of a code block is in small letters.
    "uppercase": {"capital_words", "start_phrase", "end_phrase", "code_block"},
    # Each wants the first, or the last, characters of the answer.
    "start_phrase": {"title", "quoted"},
    "end_phrase": {"quoted", "postscript"},
    "title": {"quoted"},
    # These begin a sentence with a word of their own.
    "sentence_start": {
        "sections", "postscript", "code_block", "title", "start_phrase", "end_phrase", "paragraph_start",
        "letter_frequency",
    },
    # Items, rows and headings count as sentences, which a reader may see otherwise.
    "sentences": {"bullets", "numbered_items", "table", "sections", "heading", "code_block"},
    # Their numbers limit each other.
    "characters": {"words", "sentences"},
    "no_digits": {"date", "numbered_items", "sections"},
}  # fmt: skip


def conflict(one: str, other: str) -> bool:
    """Whether two kinds are not drawn together; a kind conflicts with itself."""
    if one == other or {one, other} & ENTIRE:
        return True
    for special, allowed in ((FOREIGN, WITH_FOREIGN), ({"repeat_prompt"}, WITH_REPEATED)):
        if one in special or other in special:
            return (one if other in special else other) not in allowed
    return other in PAIRS.get(one, ()) or one in PAIRS.get(other, ())


def compatible(kinds: set[str]) -> list[str]:
    """The kinds that can be added to a set of kinds, in the order of `KINDS`."""
    return [kind for kind in KINDS if not any(conflict(kind, chosen) for chosen in kinds)]
