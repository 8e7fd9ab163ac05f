"""When things change: the state of every place in every half second, and what can be asked about it.

A schedule is a function `(rng, row, cells, member) -> Schedule`. `cells` is the number of half seconds. `member` is the
number of the clip in its group: the random state is the same for all clips of a group, and only the schedules of
"time" groups depend on `member`.
"""

import math
from dataclasses import dataclass

import numpy as np

from keye.world.slowfastbench.family import Family

NTH = ("first", "second", "third", "fourth")
RATES = {
    "an eighth clockwise": 1, "an eighth counter-clockwise": -1, "a quarter clockwise": 2,
    "a quarter counter-clockwise": -2,
}  # fmt: skip
"""What a dial does in half a second → eighths of a turn."""
PERIODS = {"fastest": 2, "second fastest": 4, "second slowest": 8, "slowest": 16}
"""Half seconds; a lamp is lit for half of its period."""
HOLDS = {"shortest": 1, "second shortest": 2, "second longest": 4, "longest": 8}
ACROSS = {"goes on": (0, 1), "goes off": (1, 0), "stays lit": (1, 1), "stays dark": (0, 0)}
RING = 6
"""Places on the ring of a disc, clockwise from the top."""
WAYS = ("clockwise", "counter-clockwise")


@dataclass
class Schedule:
    """States and questions of one clip.

    Attributes:
        states: int [P, cells], the state of each place; 0 is the state at rest.
        asks: for each question the words that it names, and its answer: a place, or a value.
        names: "tag" if the answer is a place, named by its tag; "value" if the words are a place, named by its tag;
            "box"; "word" if the answer is a word; "tags" if both are places.
        texts: texts of the cards; state k shows text k - 1.
        cut: the cell of a cut that belongs to the question, or 0.
        options: the words to choose from, if they are not tags.
    """

    states: np.ndarray
    asks: list[tuple[object, object]]
    names: str = "tag"
    texts: tuple[str, ...] = ()
    cut: int = 0
    options: tuple[str, ...] = ()


class TooShortError(ValueError):
    """A clip is too short for the events of its family."""


def scale(cells: int) -> int:
    """By how much events are longer: 1 up to ten minutes; an event of an hour covers a frame of 1,200 even ones."""
    return math.ceil(cells / 1200)


def slots(rng: np.random.Generator, cells: int, holds: list[int]) -> list[int]:
    """Starts of events of `holds` cells, from cell 1, with at least one free cell between two; all are equally likely.

    Raises:
        TooShortError: the clip is too short for them.
    """
    number, gap = len(holds), scale(cells)
    free = cells - 1 - sum(holds) - gap * (number - 1)
    if free < 0:
        raise TooShortError(f"{cells} half seconds are too few for events of {holds}")
    places = sorted(rng.choice(free + number, number, replace=False).tolist())
    before = np.concatenate([[0], np.cumsum(holds[:-1])]).astype(int).tolist()
    return [1 + place - i + before[i] + gap * i for i, place in enumerate(places)]


def hold(rng: np.random.Generator, row: Family, cells: int) -> int:
    """Cells of one event of the clip; equal for all of its events."""
    low, high = row.hold
    return int(rng.integers(low, high + 1)) * scale(cells)


def _each_once(rng: np.random.Generator, row: Family, cells: int, shift: int = 0) -> tuple[np.ndarray, list, list]:
    """Every place has one event: states, places in the order of time, starts in the order of time."""
    length = hold(rng, row, cells)
    starts = slots(rng, cells, [length] * row.places)
    places = np.roll(rng.permutation(row.places), shift).tolist()
    states = np.zeros((row.places, cells), int)
    for place, start in zip(places, starts, strict=True):
        states[place, start : start + length] = 1
    return states, places, starts


def one(rng: np.random.Generator, row: Family, cells: int, member: int) -> Schedule:
    """One tagged place has an event, and each decoy has one."""
    length, total = hold(rng, row, cells), row.places + row.decoys
    who = [0, *range(row.places, total)]
    states = np.zeros((total, cells), int)
    for place, start in zip(rng.permutation(who), slots(rng, cells, [length] * len(who)), strict=True):
        states[place, start : start + length] = 1
    return Schedule(states, [(None, 0)])


def order(rng: np.random.Generator, row: Family, cells: int, member: int) -> Schedule:
    """Every place has one event; the clips of a group have the same frames in another order."""
    asked = int(rng.integers(row.places))
    states, places, _ = _each_once(rng, row, cells, shift=member)
    return Schedule(states, [(NTH[asked], places[asked])])


def when(rng: np.random.Generator, row: Family, cells: int, member: int) -> Schedule:
    """Every place has one event; the options are the seconds of all events."""
    states, places, starts = _each_once(rng, row, cells)
    seconds = [f"{start / 2:g}" for start in starts]
    return Schedule(states, list(zip(places, seconds, strict=True)), "value", options=tuple(seconds))


def ground(rng: np.random.Generator, row: Family, cells: int, member: int) -> Schedule:
    """Every place has one event; the answer is the box of one of them."""
    states, places, _ = _each_once(rng, row, cells)
    return Schedule(states, list(zip(NTH, places, strict=True)), "box")


def count(rng: np.random.Generator, row: Family, cells: int, member: int) -> Schedule:
    """The places have 1, 2, 3 and 4 events; the total is the same in every clip."""
    length, numbers = hold(rng, row, cells), list(range(1, row.places + 1))
    who = rng.permutation(np.repeat(np.arange(row.places), numbers))
    states = np.zeros((row.places, cells), int)
    for place, start in zip(who, slots(rng, cells, [length] * len(who)), strict=True):
        states[place, start : start + length] = 1
    return Schedule(states, [(place, str(number)) for place, number in enumerate(numbers)], "value",
                    options=tuple(map(str, numbers)))  # fmt: skip


def duration(rng: np.random.Generator, row: Family, cells: int, member: int) -> Schedule:
    """The events last one, two, four and eight units, in random order."""
    unit, lengths = hold(rng, row, cells), list(HOLDS.values())
    places = rng.permutation(row.places).tolist()
    states = np.zeros((row.places, cells), int)
    for place, start in zip(places, slots(rng, cells, [lengths[place] * unit for place in places]), strict=True):
        states[place, start : start + lengths[place] * unit] = 1
    return Schedule(states, list(zip(HOLDS, range(row.places), strict=True)))


def together(rng: np.random.Generator, row: Family, cells: int, member: int) -> Schedule:
    """Two pairs of places have an event each; the question names one place and asks for the other of its pair."""
    length = hold(rng, row, cells)
    states = np.zeros((row.places, cells), int)
    for pair, start in zip(([0, 1], [2, 3]), slots(rng, cells, [length] * 2), strict=True):
        states[pair, start : start + length] = 1
    return Schedule(states, [(place, place ^ 1) for place in range(row.places)], "tags")


def compare(rng: np.random.Generator, row: Family, cells: int, member: int) -> Schedule:
    """Two lamps are lit before the cut and two after it; one of each is the same."""
    cut = int(rng.integers(cells // 4, cells - cells // 4 + 1))
    states = np.array([[before] * cut + [after] * (cells - cut) for before, after in ACROSS.values()])
    return Schedule(states, list(zip(ACROSS, range(row.places), strict=True)), cut=cut)


def blink(rng: np.random.Generator, row: Family, cells: int, member: int) -> Schedule:
    """For 8 to 12 seconds all lamps blink, each with another period."""
    length = min(int(rng.integers(16, 25)), cells - 1)
    start = int(rng.integers(1, cells - length + 1))
    states = np.zeros((row.places, cells), int)
    for place, period in enumerate(PERIODS.values()):
        steps = np.arange(length)
        states[place, start : start + length] = steps % period < period // 2
    return Schedule(states, list(zip(PERIODS, range(row.places), strict=True)))


def spin(rng: np.random.Generator, row: Family, cells: int, member: int) -> Schedule:
    """For 4 to 8 seconds all dials turn, each at another rate or in another direction."""
    length = min(int(rng.integers(8, 17)), cells - 1)
    start = int(rng.integers(1, cells - length + 1))
    turned = np.clip(np.arange(cells) - start + 1, 0, length)
    first = rng.integers(0, 8, row.places)
    states = (first[:, None] + np.array(list(RATES.values()))[:, None] * turned) % 8
    return Schedule(states, list(zip(RATES, range(row.places), strict=True)))


def turn(rng: np.random.Generator, row: Family, cells: int, member: int) -> Schedule:
    """Two discs go round once on mirrored rings, one clockwise; the second clip has these frames in reverse order."""
    length = hold(rng, row, cells)
    start = int(rng.integers(1, cells - RING * length + 2))
    asked = int(rng.integers(2))
    clockwise = np.clip((np.arange(cells) - start) // length + 1, 0, RING) % RING
    states = np.stack([clockwise, -clockwise % RING])
    return Schedule(states if not member else states[::-1], [(WAYS[asked], asked ^ member)])


def cards(rng: np.random.Generator, row: Family, cells: int, member: int) -> Schedule:
    """Cards with the same four digits in different orders; which digit is at a place?"""
    digits, length = rng.permutation(10)[:4], hold(rng, row, cells)
    orders = [rng.permutation(digits).tolist() for _ in range(row.places)]
    asked = int(rng.integers(row.places))
    states = np.zeros((1, cells), int)
    for number, start in enumerate(slots(rng, cells, [length] * row.places), 1):
        states[0, start : start + length] = number
    asks = [((nth, NTH[asked]), str(digit)) for nth, digit in zip(NTH, orders[asked], strict=True)]
    texts = tuple(" ".join(map(str, digits)) for digits in orders)
    return Schedule(states, asks, "word", texts, options=tuple(map(str, sorted(digits.tolist()))))
