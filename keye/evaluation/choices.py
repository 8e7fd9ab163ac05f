"""The single option that a reply picks, by its letter, its words or its number."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from keye.evaluation.numbers import is_number, parse_number, same_number
from keye.evaluation.words import FRAMING, HEDGES, NEGATIONS, harmless, normalise, plain

__all__ = ["choose", "letter_of", "pick", "says"]

POLAR = (frozenset({"yes", "no"}), frozenset({"true", "false"}))
_LEAD = re.compile(
    r"\s*(?:(?:(?:i\s+(?=[a-z])|i['’](?:d|ll)|would|will|choose|pick|select|go|with|think|believe|say|so|thus|hence|therefore"
    r"|the|my|final|correct|best|answer|option|choice|is|it['’]s|it|must|be)\b(?![-'’])|[正确最终答案选選项項择擇应應该該因此所以故为為是])"
    r"(?:\s*[:=,]|\s+[-–—](?=\s))*\s*)+",
    re.I,
)
_LETTER = re.compile(
    r"""\s*(?:
        [\[({"']+\s*(?P<enclosed>[A-Za-z])\s*[\])}"']+[.):,;]*        # (B)  [b]
      | (?P<marked>[A-Za-z])\s*[.):,;。、!](?!\w)                     # B.  b)  B:
      | (?P<bare>[A-Za-z])\s*$                                      # B
      | (?P<spaced>[B-HJ-Z])(?=\s)                                  # B blue; "A blue one" and "I see" are no letters
    )\s*""",
    re.VERBOSE,
)
_LAST = re.compile(r"\s(?:[(\[]([A-Za-z])[)\]]|[-–—]\s*\(?([A-Z])\)?)\s*\.?\s*$")
_REASON = re.compile(r"\b(?:because|since)\b", re.I)
_SYNONYMS = (
    (re.compile(r"\b(?:from )?left to right\b"), "right"),
    (re.compile(r"\b(?:from )?right to left\b"), "left"),
    (re.compile(r"\b(?:from )?top to bottom\b"), "down"),
    (re.compile(r"\b(?:from )?bottom to top\b"), "up"),
    (re.compile(r"\bupper (?=left|right)"), "top "),
    (re.compile(r"\blower (?=left|right)"), "bottom "),
    (re.compile(r"\b(left|right|up|down)wards?\b"), r"\1"),
)
_KINDS = frozenset("colour color shape direction name word text".split())
"""What a short text may be: `The colour is blue`."""
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def _meaning(text: str) -> str:
    """`text` normalised, with one word for each direction and place."""
    text = normalise(text)
    for pattern, word in _SYNONYMS:
        text = pattern.sub(word, text)
    return text


@dataclass(frozen=True)
class _Claims:
    """What a text claims.

    Attributes:
        claimed: indices of the options that it names.
        denied: indices of the options that it denies.
        rest: the other words.
        count: number of mentions that are not denials.
    """

    claimed: frozenset[int] = frozenset()
    denied: frozenset[int] = frozenset()
    rest: tuple[str, ...] = ()
    count: int = 0


@dataclass(frozen=True)
class _Options:
    """Options in the form in which they are compared.

    Attributes:
        texts: the options as given.
        names: their normalised texts.
        allowed: the words that may accompany an option.
        first: first word of an option → (all its words, its index), longest first.
        read: how a text is normalised.
    """

    texts: Sequence[str]
    names: tuple[str, ...]
    allowed: frozenset[str]
    first: dict[str, list[tuple[tuple[str, ...], int]]]
    read: Callable[[str], str]

    @classmethod
    def of(cls, texts: Sequence[str], allowed: frozenset[str] | None = None) -> "_Options":
        """Options of these texts; `allowed` defaults to the words that are harmless next to them."""
        # A synonym may merge two options.
        read = _meaning if len(set(map(_meaning, texts))) == len(texts) else normalise
        names = tuple(map(read, texts))
        first: dict[str, list[tuple[tuple[str, ...], int]]] = {}
        for place, name in enumerate(names):
            if name:
                words = tuple(name.split())
                first.setdefault(words[0], []).append((words, place))
        for group in first.values():
            group.sort(key=lambda entry: -len(entry[0]))
        if allowed is None:
            allowed = harmless(frozenset(word for name in names for word in name.split()))
        return cls(texts, names, allowed, first, read)

    def claims(self, text: str) -> _Claims:
        """The options that `text` names, and its other words. `dark red` does not name `red` if both are options."""
        if all(map(is_number, self.texts)):
            return self._number(text)
        words = self.read(text).split()
        claimed, denied, rest, count, at, neither = set(), set(), [], 0, 0, False
        while at < len(words):
            place, end = self._at(words, at)
            no = words[at] in ("not", "neither") or (words[at] == "nor" and neither)
            if place is None and no:
                place, end = self._at(words, at + 1)
                if place is not None:
                    denied.add(place)
                    neither = neither or words[at] == "neither"
                    at = end + (words[end : end + 1] == ["but"])
                    continue
            if place is None:
                rest.append(words[at])
                at += 1
                continue
            claimed.add(place)
            count, at = count + 1, end
        return _Claims(frozenset(claimed), frozenset(denied), tuple(rest), count)

    def _at(self, words: Sequence[str], at: int) -> tuple[int | None, int]:
        if at < len(words):
            for name, place in self.first.get(words[at], ()):
                if tuple(words[at : at + len(name)]) == name:
                    return place, at + len(name)
        return None, at

    def _number(self, text: str) -> _Claims:
        number = parse_number(text)
        if number is None:
            return _Claims(rest=tuple(normalise(text).split()))
        places = frozenset(place for place, option in enumerate(self.texts) if same_number(number, option))
        return _Claims(places, count=1) if places else _Claims(rest=(number,))

    def agrees(self, text: str, place: int | None) -> int | None:
        """The option that `text` claims, or None. With `place`, the text must claim that option or none."""
        before, *reason = _REASON.split(text, maxsplit=1)
        found = self.claims(before)
        claimed = found.claimed | (frozenset() if place is None else {place})
        if len(claimed) != 1 or claimed & found.denied or not self.allowed.issuperset(found.rest):
            return self._polar(text) if place is None else None
        (option,) = claimed
        return option if not reason or self._explains(reason[0], option) else None

    def _explains(self, text: str, place: int, allowed: Iterable[str] = ()) -> bool:
        """Whether an explanation contains neither another option nor a hedge nor a negation."""
        found = self.claims(text)
        words = set(found.rest) - set(allowed)
        return (
            found.claimed <= {place}
            and place not in found.denied
            and not words & (NEGATIONS | HEDGES)
            and not any("n't" in word for word in words - set(allowed))
        )

    def _polar(self, text: str) -> int | None:
        """`No, it does not move.`: the word before the comma decides, the rest explains it."""
        found = re.match(r"\W*(yes|no|true|false)\s*[,.;:!]", text, re.I)
        if not found or set(self.names) not in POLAR or found[1].casefold() not in self.names:
            return None
        place = self.names.index(found[1].casefold())
        rest = text[found.end() :]
        negative = found[1].casefold() in ("no", "false")
        words = normalise(rest).split()
        allowed = {word for word in words if word in ("not", "never") or "n't" in word} if negative else set()
        return place if self._explains(re.sub(r"\bnot\b", " ", rest) if negative else rest, place, allowed) else None


def choose(reply: str, options: Sequence[str]) -> str | None:
    """The option that a reply picks by its words, its number or its letter; None if it picks none or several.

    A reply picks none if its letter and words name different options, if it denies what it names (`not red`), or if it
    contains other than harmless words (`hardly red`). `red, not blue` picks red.
    """
    place = pick(reply, options)
    return None if place is None else options[place]


def pick(reply: str, options: Sequence[str]) -> int | None:
    """Index of the option that `reply` picks, or None."""
    texts = _without_letters(options)
    known = _Options.of(texts)
    bare = plain(reply).strip()
    for text in (bare, without_lead(bare)):
        same = [place for place, name in enumerate(known.names) if name and known.read(text) == name]
        if same:
            return same[0] if len(same) == 1 else None
    letter, rest = letter_of(bare)
    if letter is None and (last := _LAST.search(bare)):
        letter, rest = (last[1] or last[2]).upper(), bare[: last.start()]
    place = ord(letter) - ord("A") if letter else len(texts)
    if place >= len(texts):
        place = known.agrees(bare, None)
        return place if place is None or letters_in(bare, len(texts)) <= {place} else None
    if known.read(rest) == known.names[place]:
        return place
    return known.agrees(rest, place) if letters_in(rest, len(texts)) <= {place} else None


def says(reply: str, answer: str) -> bool:
    """Whether a reply without options consists of the words of `answer` and harmless words."""
    for pair in POLAR:
        if normalise(answer) in pair:
            names = sorted(pair)
            place = _Options.of(names, FRAMING | {"statement", "claim", "sentence"}).agrees(reply, None)
            return place is not None and names[place] == normalise(answer)
    if _CJK.search(answer):
        answer = " ".join(plain(answer).split())
    found = _Options.of([answer], FRAMING).claims(reply)
    return found.count == 1 and not found.denied and (FRAMING | _KINDS).issuperset(found.rest)


def explains(text: str) -> bool:
    """Whether the text after a letter of unknown options contains no hedge, no negation and no second letter."""
    words = normalise(text).split()
    negated = (NEGATIONS | HEDGES).intersection(words) or any("n't" in word for word in words)
    second = any(len(word) == 1 and word.isalpha() and word not in "ai" for word in words)
    return not negated and not second and not letters_in(text, 26)


def letter_of(reply: str) -> tuple[str | None, str]:
    """(upper-case letter, the text after it), or (None, reply) if the reply does not begin with a single letter."""
    text = without_lead(plain(reply).strip())
    text = re.sub(r"^[-–—#>\s]+(?=\S)", "", text)
    found = _LETTER.match(text)
    if not found:
        return None, reply
    return next(filter(None, found.groups())).upper(), text[found.end() :]


def letters_in(text: str, count: int) -> set[int]:
    """Indices of the options whose letters are words of `text`; `A` or `I` before a word is not a letter."""
    found = re.findall(r"\b(?![AI]\s+[a-z])[A-Z]\b(?!['’])", text)
    return {place for place in (ord(letter) - ord("A") for letter in found) if place < count}


def without_lead(reply: str) -> str:
    """`reply` without a leading `The answer is`, `Answer:`, `I would choose option`."""
    found = _LEAD.match(reply)
    return reply[found.end() :] if found and found.end() < len(reply) else reply


def _without_letters(options: Sequence[str]) -> Sequence[str]:
    """`["A. red", "B. blue"]` as `["red", "blue"]`; other options unchanged."""
    found = [re.match(r"\s*\(?([A-Z])[.):]\s*(?=\S)", option) for option in options]
    if all(letter and ord(letter[1]) - ord("A") == place for place, letter in enumerate(found)):
        return [option[letter.end() :] for option, letter in zip(options, found, strict=True) if letter]
    return options
