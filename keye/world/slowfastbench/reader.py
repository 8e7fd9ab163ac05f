"""An ideal observer of SlowFastBench: it answers from the pictures and times that a plan gives to a model.

It is no model of a model. It knows how the clips of a family are made: where lamps, dials, cards and tags are, how they
look, which colours and digits there are, and by which rules events are placed. What happened in a clip it reads from
the pictures alone, by their likelihood under noise of a stated size, and it sums over everything that is possible. So
its accuracy measures what the plan has kept, as an upper bound for models that see no more sharply: with little noise,
what it cannot answer, no model can. What it can answer, a model may still miss. Without evidence it guesses by a hash
of the question's id.
"""

import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from keye.world.slowfastbench import posterior
from keye.world.slowfastbench.family import Family
from keye.world.slowfastbench.questions import Item
from keye.world.slowfastbench.reading import Layout, Picture, layout_of, state_likelihoods, tag_likelihoods
from keye.world.slowfastbench.schedules import ACROSS, HOLDS, NTH, PERIODS, RATES, WAYS, scale
from keye.world.slowfastbench.table import FAMILIES

NOISE = 256.0
"""Standard deviation in grey levels of the noise of each pixel of each picture.

An observer that knows exactly how everything looks reads digits 2 pixels high under noise of 8 grey levels, as no model
does. Chosen on the split dev so that text becomes legible where that of a screen does: under noise of 256, digits 5
pixels high are read (98 %; those of 5x7 dot-matrix characters are 7), those 2 pixels high are not (38 %).
"""
TIE = 1e-6
"""Answers whose logarithms of probability differ by less are equally probable."""


def read(item: Item, times: Sequence[float], pictures: Sequence[Picture], noise: float = NOISE) -> str:
    """The most probable answer to a question, given the pictures of a plan.

    Of the item it reads family, id, question and options, and of its film what `layout_of` reads; neither the answer
    nor the film's states, tags and texts.

    Args:
        item: the question.
        times: seconds of the pictures; a picture shows the half second in which its time lies.
        pictures: uint8, [h, w, 3] arrays or [3, h, w] tensors of any sizes; none for an answer without a picture.
            Equal pictures are read faster if they are the same object.
        noise: standard deviation of the noise of each pixel in grey levels. It depends on the question and on the time
            of a picture, and is the same for all plans.

    Returns:
        One of the options; the text of a box in the family ground.

    Raises:
        ValueError: the numbers of times and pictures differ, or the family is not read.
    """
    if len(times) != len(pictures):
        raise ValueError(f"there are {len(times)} times and {len(pictures)} pictures")
    kind = item.family.removeprefix("real_")
    if kind not in READERS:
        raise ValueError(f"the family {item.family} is not read; choose among {', '.join(READERS)}")
    return READERS[kind](_Evidence(item, list(times), list(pictures), noise))


def readable(family: str) -> bool:
    """Whether `read` answers questions of a family."""
    return family.removeprefix("real_") in READERS


class _Evidence:
    """A question and what the pictures say about it."""

    def __init__(self, item: Item, times: list[float], pictures: list[Picture], noise: float) -> None:
        self.name, self.options = item.name, item.options or ()
        self.row: Family = FAMILIES[item.family]
        self.words = words_of(self.row, item.question)
        places = 1 if self.row.changes == "card" else self.row.places + self.row.decoys
        self.layout: Layout = layout_of(item.film, places)
        self.scale = scale(self.layout.cells)
        self._seen = (times, pictures)
        self._noise, self._seed = noise, zlib.crc32(item.name.encode())

    @property
    def lengths(self) -> list[int]:
        """Half seconds that an event may last."""
        return [self.scale * length for length in range(self.row.hold[0], self.row.hold[1] + 1)]

    def states(self, texts: tuple[str, ...] = ()) -> np.ndarray:
        """See `state_likelihoods`."""
        return state_likelihoods(self.layout, *self._seen, self._noise, self._seed, texts)

    def lit(self) -> np.ndarray:
        """Log-likelihood ratio of a lit to a dark lamp: float64 [places, cells]."""
        return self.states()[:, :, 1].T

    def tags(self) -> list[str | None]:
        """The most probable colours of the tags, by place; None for a place without one."""
        named = {*self.options, *self.words} & {*TAGS}
        colours = tuple(sorted(named)) if len(named) == self.row.places else TAGS
        found = tag_likelihoods(self.layout, *self._seen, colours, self._noise, self._seed)
        untagged = [len(colours)] * (len(self.layout.places) - self.row.places)
        needed = {colours.index(name) for name in named}
        ways = {
            order
            for chosen in itertools.combinations(range(len(colours)), self.row.places)
            if needed <= {*chosen}
            for order in itertools.permutations([*chosen, *untagged])
        }
        best = max(ways, key=lambda order: (_total(found, order), order))
        return [colours[column] if column < len(colours) else None for column in best]

    def choose(self, values: Iterable[tuple[str | None, float]]) -> str:
        """The answer with the largest value; among equal ones the smallest hash decides."""
        known = {answer: value for answer, value in values if answer is not None}
        most = max(known.values())
        equal = [answer for answer, value in known.items() if value == most or value > most - TIE]
        return min(equal, key=lambda answer: zlib.crc32(f"{self.name} {answer}".encode()))


TAGS = ("red", "green", "blue", "yellow", "purple")


def _total(table: np.ndarray, columns: Sequence[int]) -> float:
    return float(sum(table[place, column] for place, column in enumerate(columns)))


def words_of(row: Family, question: str) -> tuple[str, ...]:
    """The words that a question names.

    Raises:
        ValueError: the question is not one of the family's.
    """
    asked = question.partition(" Options: ")[0]
    for phrase in row.asks:
        found = re.fullmatch(re.escape(phrase).replace(r"\{\}", "(.+)"), asked)
        if found:
            return found.groups()
    raise ValueError(f"{asked!r} is not a question of the family that needs {row.needs}")


def _over(lengths: Sequence[int], value: Callable[[int], np.ndarray]) -> np.ndarray:
    """Log-likelihoods summed over the lengths of an event."""
    return posterior.log_sum(np.stack([value(length) for length in lengths]), 0)


def _one(seen: _Evidence) -> str:
    lit = seen.lit()
    return seen.choose(zip(seen.tags(), _over(seen.lengths, lambda n: posterior.one_event(lit, n)), strict=True))


def _nth(seen: _Evidence) -> np.ndarray:
    lit, nth = seen.lit(), NTH.index(seen.words[0])

    def value(length: int) -> np.ndarray:
        return posterior.nth_event(posterior.gains_of(lit, length), length, seen.scale, nth)

    return _over(seen.lengths, value)


def _order(seen: _Evidence) -> str:
    return seen.choose(zip(seen.tags(), _nth(seen), strict=True))


def _ground(seen: _Evidence) -> str:
    height, width = seen.layout.size
    boxes = []
    for top, bottom, left, right in seen.layout.places:
        shares = (left / width, top / height, right / width, bottom / height)
        boxes.append(str([min(999, round(1000 * share)) for share in shares]))
    return seen.choose(zip(boxes, _nth(seen), strict=True))


def _when(seen: _Evidence) -> str:
    lit, asked = seen.lit(), seen.tags().index(seen.words[0])
    starts = [round(2 * float(option)) for option in seen.options]

    def value(length: int) -> np.ndarray:
        return posterior.assigned(posterior.gains_of(lit, length)[:, starts])[asked]

    return seen.choose(zip(seen.options, _over(seen.lengths, value), strict=True))


def _count(seen: _Evidence) -> str:
    lit, (length,) = seen.lit(), seen.lengths
    asked = seen.tags().index(seen.words[0])
    numbers = np.stack([posterior.numbers_of_events(row, len(lit), length, seen.scale) for row in lit])
    values = posterior.assigned(numbers)[asked]
    return seen.choose((str(number), value) for number, value in enumerate(values, 1))


def _duration(seen: _Evidence) -> str:
    lit = seen.lit()

    def value(unit: int) -> np.ndarray:
        table = np.stack([posterior.one_event(lit, hold * unit) for hold in HOLDS.values()], 1)
        return posterior.assigned(table)[:, [*HOLDS].index(seen.words[0])]

    return seen.choose(zip(seen.tags(), _over(seen.lengths, value), strict=True))


def _together(seen: _Evidence) -> str:
    lit, tags = seen.lit(), seen.tags()
    asked = tags.index(seen.words[0])
    found = []
    for partner in (place for place in range(len(lit)) if place != asked):
        others = [place for place in range(len(lit)) if place not in (asked, partner)]
        pairs = np.stack([lit[[asked, partner]].sum(0), lit[others].sum(0)])
        value = posterior.log_sum(np.array([posterior.one_event(pairs, n).sum() for n in seen.lengths]))
        found.append((tags[partner], float(value)))
    return seen.choose(found)


def _compare(seen: _Evidence) -> str:
    table = posterior.across_cut(seen.lit(), [*ACROSS.values()])
    return seen.choose(zip(seen.tags(), table[:, [*ACROSS].index(seen.words[0])], strict=True))


def _flicker(seen: _Evidence) -> str:
    table = posterior.blinking(seen.lit())
    return seen.choose(zip(seen.tags(), table[:, [*PERIODS].index(seen.words[0])], strict=True))


def _alias(seen: _Evidence) -> str:
    table = posterior.turning(seen.states().transpose(1, 0, 2))
    return seen.choose(zip(seen.tags(), table[:, [*RATES].index(seen.words[0])], strict=True))


def _turn(seen: _Evidence) -> str:
    table = posterior.going_round(seen.states().transpose(1, 0, 2), seen.lengths)
    return seen.choose(zip(seen.tags(), table[:, WAYS.index(seen.words[0])], strict=True))


def _cards(seen: _Evidence) -> str:
    orders = [*itertools.permutations(seen.options)]
    states = seen.states(tuple(map(" ".join, orders)))[:, 0].T
    place, card = NTH.index(seen.words[0]), NTH.index(seen.words[1]) if len(seen.words) > 1 else 0

    def value(length: int) -> np.ndarray:
        gains = posterior.gains_of(states, length)
        return posterior.nth_text(gains, length, seen.scale, seen.row.places, card)

    texts = _over(seen.lengths, value)
    return seen.choose(
        (digit, float(posterior.log_sum(texts[[order[place] == digit for order in orders]]))) for digit in seen.options
    )


READERS: dict[str, Callable[[_Evidence], str]] = {
    "find": _one, "coverage": _one, "detail": _cards, "read": _cards, "order": _order, "turn": _turn, "alias": _alias,
    "flicker": _flicker, "count": _count, "when": _when, "duration": _duration, "together": _together,
    "compare": _compare, "ground": _ground,
}  # fmt: skip
"""Family → the function that answers its questions."""
