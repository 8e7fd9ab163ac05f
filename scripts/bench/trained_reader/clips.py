"""What a reader gets: the pictures, times and kinds of a plan, questions in numbers, and controls of both.

Clips of one split and family are drawn once; a cached file has them under every setting. Training clips also have
labels of what a half second shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from keye.evaluation.study.clips import DrawnClip, events_seen
from keye.evaluation.study.settings import Setting
from keye.files import atomic_file
from keye.slowfast.plan import VideoPlan
from keye.slowfast.policies import SLOW
from keye.world.slowfastbench import FAMILIES, Item, draw
from keye.world.slowfastbench.questions import TAG_COLOURS
from keye.world.slowfastbench.reader import words_of
from keye.world.slowfastbench.schedules import ACROSS, NTH, WAYS

FAMILIES_ASKED = ("find", "order", "when", "together", "compare", "turn")
"""Families whose events fit into eight seconds and whose answers are tags or seconds."""
LENGTH, HEIGHT = 8, 144
CELLS = 2 * LENGTH
GRID = (48, 80)
"""Pixels to which every picture is scaled."""
COLUMNS = GRID[1] // 4
WORDS = ("", *TAG_COLOURS, *NTH, *ACROSS, *WAYS)
"""Words that a question may name."""
ANSWERS = (*TAG_COLOURS, *(f"{cell / 2:g}" for cell in range(CELLS)))
OPTIONS = 4
NOTHING, DARK_LAMP, DISC = 0, 1, 3
"""Labels of a column: nothing; a dark lamp (a lit one is one more); a disc (plus its place on the ring)."""
STATES = DISC + 6
CONTROLS = ("zeroed", "other", "one_frame", "shuffled")


@dataclass(frozen=True)
class Seen:
    """Clips of one setting. E entries of plans, U different pictures, C clips, Q questions.

    Attributes:
        pictures: uint8 [U, 3, 48, 80]; equal half seconds of a still clip have one picture.
        picture: of each entry, int64 [E].
        cells: half second of each entry, int64 [E].
        slow: whether an entry is slow, bool [E].
        starts: first entry of each clip, and E, int64 [C + 1].
        tokens, share, events, event_tokens: of each clip: tokens, share of slow entries, share of the events of which
            an entry is shown, and mean tokens of the largest of these entries, float64 [C].
        clip, family, word: of each question, int64 [Q].
        options: int64 [Q, 4], places in `ANSWERS`, -1 where there are fewer.
        answers: place of the answer among the options, int64 [Q].
        states: labels of each half second and column, int64 [C, 16, 20].
        tags: place of the colour in `TAG_COLOURS` plus one of each column, 0 without a tag, int64 [C, 20].
        names: ids of the questions, str [Q].
    """

    pictures: torch.Tensor
    picture: torch.Tensor
    cells: torch.Tensor
    slow: torch.Tensor
    starts: torch.Tensor
    tokens: np.ndarray
    share: np.ndarray
    events: np.ndarray
    event_tokens: np.ndarray
    clip: torch.Tensor
    family: torch.Tensor
    word: torch.Tensor
    options: torch.Tensor
    answers: torch.Tensor
    states: torch.Tensor
    tags: torch.Tensor
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def entries(self, clip: int) -> slice:
        """The entries of a clip."""
        return slice(int(self.starts[clip]), int(self.starts[clip + 1]))


def items_of(family: str, split: str, number: int) -> list[Item]:
    """The first questions of a family about clips of `LENGTH` and `HEIGHT`."""
    return [draw(family, split, index, LENGTH, HEIGHT) for index in range(number)]


def draw_family(
    path: Path, family: str, split: str, number: int, settings: Sequence[Setting], reference: Setting | None
) -> None:
    """Draw and plan the clips of a family under every setting, into one file.

    Args:
        number: clips.
        reference: the setting whose tokens the others are given. A clip's target makes up for what a setting spent too
            much or too little on the clips before, as few sizes meet the tokens of one short clip.
    """
    members = FAMILIES[family].members if FAMILIES[family].group == "asks" else 1
    items = items_of(family, split, number * members)
    found: dict[str, list] = {}
    owed = dict.fromkeys((setting.label for setting in settings), 0)
    for place in range(number):
        asked = items[place * members : (place + 1) * members]
        clip = DrawnClip(asked[0].clip, asked[0].film)
        scaled: dict[int, torch.Tensor] = {}
        wanted = None if reference is None else clip.plan(reference)
        for setting in settings:
            if wanted is None or setting == reference:
                plan = wanted or clip.plan(setting)
            else:
                plan = clip.plan_of_tokens(setting, max(wanted.tokens // 2, wanted.tokens + owed[setting.label]))
                owed[setting.label] += wanted.tokens - plan.tokens
            for name, value in _planned(clip, plan, scaled).items():
                found.setdefault(f"{setting.label}/{name}", []).append(value)
        states, tags = labels(asked[0])
        found.setdefault("states", []).append(states[None])
        found.setdefault("tags", []).append(tags[None])
        for item in asked:
            for name, value in _asked(item).items():
                found.setdefault(name, []).append(np.asarray([value]))
        found.setdefault("clip", []).append(np.full(members, place))
    with atomic_file(path) as part, part.open("wb") as file:
        np.savez(file, **{name: np.concatenate(values) for name, values in found.items()})


def _planned(clip: DrawnClip, plan: VideoPlan, scaled: dict[int, torch.Tensor]) -> dict[str, np.ndarray]:
    pictures = clip.pictures_of(plan)
    places: dict[int, int] = {}  # the clip keeps its pictures, so that an id stays that of one picture
    for picture in pictures:
        places.setdefault(id(picture), len(places))
        if id(picture) not in scaled:
            scaled[id(picture)] = to_grid(picture)
    seen, tokens = events_seen(clip.film, plan)
    return {
        "pictures": torch.stack([scaled[name] for name in places]).numpy(),
        "picture": np.array([places[id(picture)] for picture in pictures]),
        "cells": np.clip((plan.timestamps.numpy() * 2 + 1e-3).astype(int), 0, CELLS - 1),
        "slow": plan.frame_types.numpy() == SLOW,
        "counts": np.array([[len(plan), len(places)]]),
        "clips": np.array([[plan.tokens, plan.slow_share, seen, tokens]], float),
    }


def to_grid(picture: torch.Tensor) -> torch.Tensor:
    """A picture uint8 [3, h, w] at the size of the grid; a small one stays blurred."""
    scaled = functional.interpolate(picture[None].float(), GRID, mode="bilinear", antialias=True, align_corners=False)
    return scaled[0].round().clamp(0, 255).byte()


def labels(item: Item) -> tuple[np.ndarray, np.ndarray]:
    """(states int64 [16, 20], tags int64 [20]) of the columns of a clip, see `Seen`."""
    from keye.world.slowfastbench import painter_of

    film, painter = item.film, painter_of(item.film)
    centres = (np.arange(COLUMNS) + 0.5) * film.size[1] / COLUMNS
    states, tags = np.zeros((CELLS, COLUMNS), int), np.zeros(COLUMNS, int)
    for place, row in enumerate(film.states):
        share = film.size[1] / len(film.states)
        middle = (painter.columns[place] + 0.5) * share
        if film.tags and film.tags[place]:
            tags[np.abs(centres - middle) < 0.3 * share] = 1 + TAG_COLOURS.index(film.tags[place])
        if film.changes == "disc":
            states[:, np.abs(centres - middle) < share / 10] = DISC + row[:, None]
        else:
            states[:, np.abs(centres - middle) < max(painter.pixels / 2, 7)] = DARK_LAMP + row[:, None]
    return states, tags


def _asked(item: Item) -> dict[str, object]:
    words, options = words_of(FAMILIES[item.family], item.question), list(item.options or ())
    numbers = [ANSWERS.index(option) for option in options]
    return {
        "names": item.name, "family": FAMILIES_ASKED.index(item.family), "word": WORDS.index("".join(words)),
        "options": numbers + [-1] * (OPTIONS - len(numbers)), "answers": options.index(item.answer),
    }  # fmt: skip


def load(paths: Sequence[Path], setting: Setting) -> Seen:
    """The clips of several files under one setting."""
    parts: dict[str, list[np.ndarray]] = {}
    clips = 0
    for path in paths:
        with np.load(path) as file:
            for name in ("pictures", "picture", "cells", "slow", "counts", "clips"):
                parts.setdefault(name, []).append(file[f"{setting.label}/{name}"])
            for name in ("family", "word", "options", "answers", "states", "tags", "names"):
                parts.setdefault(name, []).append(file[name])
            parts.setdefault("clip", []).append(file["clip"] + clips)
            clips += len(file["states"])
    values = {name: np.concatenate(found) for name, found in parts.items()}
    counts, pictures = values.pop("counts").T
    starts = np.concatenate([[0], np.cumsum(counts)])
    values["picture"] += np.repeat(np.cumsum(pictures) - pictures, counts)
    tokens, share, events, event_tokens = values.pop("clips").T
    names = values.pop("names")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in values.items()}
    return Seen(starts=torch.from_numpy(starts), tokens=tokens, share=share, events=events, event_tokens=event_tokens,
                names=names, **tensors)  # fmt: skip


def controlled(seen: Seen, control: str, seed: int = 0) -> Seen:
    """The clips with something missing; entries, half seconds, kinds and questions stay.

    Args:
        control: "zeroed": all pixels are zero; "other": the pictures of the next clip of the family with other
            questions, repeated or cut to the number of entries; "one_frame": every entry has the picture of the slow
            entry nearest to the middle; "shuffled": the pictures of a clip in random order.
        seed: of the order.
    """
    if control == "zeroed":
        return replace(seen, pictures=torch.zeros_like(seen.pictures))
    rng, source = np.random.default_rng(seed), seen.picture.numpy().copy()
    of_clip = {int(clip): int(family) for clip, family in zip(seen.clip, seen.family, strict=True)}
    for clip in range(len(seen)):
        here = seen.entries(clip)
        own, slow = seen.picture[here].numpy(), seen.slow[here].numpy()
        if control == "shuffled":
            source[here] = rng.permutation(own)
        elif control == "one_frame":
            distance = np.abs(seen.cells[here].numpy() - CELLS / 2)
            source[here] = own[np.where(slow | ~slow.any(), distance, np.inf).argmin()]
        else:
            same = [other for other in of_clip if of_clip[other] == of_clip[clip]]
            # A group has up to four clips, so that the fifth next clip is of another group.
            other = seen.picture[seen.entries(same[(same.index(clip) + 5) % len(same)])]
            source[here] = np.resize(other.numpy(), len(own))
    return replace(seen, picture=torch.from_numpy(source))
