"""The questions of SlowFastBench v1: drawn from the table by split and number, and frozen by checksums."""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keye.errors import ManifestError
from keye.world.scene import CELL, COLOURS
from keye.world.slowfastbench.family import Family
from keye.world.slowfastbench.film import Film, Painter
from keye.world.slowfastbench.real import REAL_CLIPS
from keye.world.slowfastbench.schedules import Schedule, scale
from keye.world.slowfastbench.table import FAMILIES

VERSION = 1
SPLITS = ("dev", "heldout", "train")
"""Choices are made on "dev" (and models trained on "train"); results are reported on "heldout"."""
EACH = 200
"""Questions of a family in a frozen split."""
FROZEN = Path(__file__).with_name("frozen.json")
TAG_COLOURS = tuple(name for name in COLOURS if name != "white")


@dataclass(frozen=True)
class Item:
    """One question about one clip.

    Attributes:
        clip: name of the clip; questions of "asks" groups share it.
        group: name of the group of questions with different answers.
        slices: length, height, motion and load of the clip, for tables by slice.
    """

    family: str
    split: str
    index: int
    clip: str
    group: str
    question: str
    answer: str
    options: tuple[str, ...] | None
    tolerance: float | None
    film: Film
    slices: dict[str, str]

    @property
    def name(self) -> str:
        """The id in the manifest."""
        return f"{self.split}-{self.family}-{self.index:05d}"

    def record(self) -> dict[str, Any]:
        """Everything that determines the question and its clip, as JSON values."""
        film = {field.name: getattr(self.film, field.name) for field in dataclasses.fields(Film)}
        film["states"] = hashlib.sha256(self.film.states.astype("<i4").tobytes()).hexdigest()
        values = {name: getattr(self, name) for name in ("clip", "group", "question", "answer", "options", "tolerance")}
        return {"id": self.name, **values, "film": film, "slices": self.slices}


def draw(
    family: str,
    split: str,
    index: int,
    length: int | None = None,
    height: int | None = None,
    motion: str | None = None,
) -> Item:
    """Question `index` of a family; the same arguments give the same question.

    Args:
        family: a name in `FAMILIES`.
        split: "dev", "heldout" or "train".
        index: 0 or more.
        length, height, motion: of the clip instead of the drawn ones, for tests and for the adversary.

    Raises:
        ManifestError: the family or the split is unknown.
    """
    row = row_of(family)
    if split not in SPLITS:
        raise ManifestError(f"there is no split {split!r}; choose among {', '.join(SPLITS)}")
    group, member = divmod(index, row.members)
    seed = (VERSION, SPLITS.index(split), zlib.crc32(family.encode()), group)
    rng = np.random.default_rng(seed)
    lengths = row.lengths()
    # Each length occurs as often as its weight in any len(lengths) groups: 11 has no divisor in common with it.
    drawn = lengths[group * 11 % len(lengths)]
    heights = row.heights(drawn)
    drawn_height = heights[int(rng.integers(len(heights)))]
    length, height = length or drawn, height or drawn_height
    cells = round(length / CELL)
    moves = row.motions[int(rng.integers(len(row.motions)))]
    motion = motion or ("still" if length >= 3600 and height > 240 else moves)
    tags = tuple(str(name) for name in rng.permutation(TAG_COLOURS)[: row.places]) if row.tags else ()
    offered = [tags[place] for place in rng.permutation(len(tags))]
    if row.group == "tags":
        tags = tuple(np.roll(tags, member).tolist())
    phrase = row.asks[int(rng.integers(len(row.asks)))]
    number = int(rng.permutation(row.members)[member]) if row.group == "asks" else 0
    cuts = int(rng.integers(row.cuts + 1)) if motion != "real" else 0
    side, strength = float(rng.uniform(*row.side)), int(rng.integers(row.strength[0], row.strength[1] + 1))
    schedule = row.schedule(rng, row, cells, member)
    film = Film(
        changes=row.changes, size=(height, _width(height)), cells=cells, fps=4 if length <= 60 else 2, motion=motion,
        seed=(*seed, 1), states=schedule.states, tags=_padded(tags, len(schedule.states)), side=side, strength=strength,
        texts=schedule.texts, cuts=_cuts(rng, cells, cuts, schedule), mirrored=schedule.names == "box",
        source=REAL_CLIPS[int(rng.integers(len(REAL_CLIPS)))] if row.real else None,
    )  # fmt: skip
    words, answer, options = _ask(schedule, film, number, offered)
    question = phrase.format(*words)
    if options:
        question += f" Options: {', '.join(options)}."
    clip = f"{family}-{group:05d}" + ("" if row.group == "asks" else f"-{member}")
    tolerance = CELL * scale(cells) if family == "when" else None
    return Item(family, split, index, clip, f"{family}-{group:05d}", question, answer, options or None, tolerance, film,
                slices_of(film))  # fmt: skip


def row_of(family: str) -> Family:
    """The row of a family; ManifestError if there is none."""
    if family not in FAMILIES:
        raise ManifestError(f"SlowFastBench has no family {family!r}; choose among {', '.join(FAMILIES)}")
    return FAMILIES[family]


def _width(height: int) -> int:
    return 2 * round(height * 16 / 9 / 2)


def _padded(tags: tuple[str, ...], places: int) -> tuple[str | None, ...]:
    return (*tags, *[None] * (places - len(tags))) if tags else ()


def _cuts(rng: np.random.Generator, cells: int, number: int, schedule: Schedule) -> tuple[int, ...]:
    if schedule.cut:
        return (schedule.cut,)
    return tuple(sorted(rng.choice(np.arange(1, cells), number, replace=False).tolist()))


def _ask(
    schedule: Schedule, film: Film, number: int, offered: Sequence[str]
) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    """(words of the question, answer, options) of question `number` of a schedule; `offered` are the tags to choose."""
    word, answer = schedule.asks[number]
    tags = [str(tag) for tag in film.tags]
    words = word if isinstance(word, tuple) else (word,)
    if schedule.names == "box":
        return words, box_text(film, int(answer)), ()
    if schedule.names in ("value", "tags"):
        words = (tags[int(word)],)
    if schedule.names in ("tag", "tags"):
        return words, tags[int(answer)], tuple(tag for tag in offered if tag not in words)
    return words, str(answer), tuple(sorted(schedule.options, key=_number))


def _number(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return 0.0, text


def box_text(film: Film, place: int) -> str:
    """The box of a place in integers of [0, 1000)."""
    height, width = film.size
    left, top, right, bottom = Painter(film).box(place)
    shares = (left / width, top / height, right / width, bottom / height)
    return str([min(999, round(1000 * share)) for share in shares])


def slices_of(film: Film) -> dict[str, str]:
    """The slices of a clip: names and values for tables.

    `length` is the smallest of 16 seconds, 1 and 10 minutes, and 1 hour that holds the clip. `load` compares the tokens
    of all half seconds at full size, at most 768 a frame, with the released budget of 65,536: "light" below a quarter
    of it, "heavy" above it.
    """
    seconds, (height, width) = film.cells * CELL, film.size
    tokens = film.cells * min(768, max(48, height * width // 784))
    return {
        "length": "16s" if seconds <= 16 else "1min" if seconds <= 60 else "10min" if seconds <= 600 else "1h",
        "height": f"{height}p",
        "motion": film.motion,
        "load": "light" if tokens < 16_384 else "medium" if tokens <= 65_536 else "heavy",
    }  # fmt: skip


def questions(family: str, split: str, number: int = EACH) -> Iterator[Item]:
    """The first `number` questions of a family."""
    return (draw(family, split, index) for index in range(number))


def checksum(family: str, split: str, number: int = EACH) -> str:
    """SHA-256 of the first `number` questions of a family and of all that determines their clips."""
    digest = hashlib.sha256()
    for item in questions(family, split, number):
        digest.update(json.dumps(item.record(), sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def frozen() -> dict[str, Any]:
    """The committed checksums: split → family → SHA-256."""
    return json.loads(FROZEN.read_text(encoding="utf-8"))


def freeze() -> None:
    """Write the checksums of all families into `FROZEN`; a new benchmark needs a new `VERSION`."""
    sums = {split: {family: checksum(family, split) for family in FAMILIES} for split in ("dev", "heldout")}
    values = {"benchmark": "SlowFastBench", "version": VERSION, "questions": EACH, "checksums": sums}
    FROZEN.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def check_frozen(family: str, split: str) -> None:
    """Check that a family is drawn as it was frozen.

    Raises:
        ManifestError: its questions differ from the frozen ones, or it is not frozen.
    """
    expected = frozen()["checksums"].get(split, {}).get(family)
    if expected != checksum(family, split):
        raise ManifestError(
            f"the {split} questions of {family} differ from those of SlowFastBench v{VERSION} in {FROZEN.name}; "
            "results cannot be compared. Use the versions of keye and numpy that froze it, or give a new version"
        )
