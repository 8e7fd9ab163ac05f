"""Write SlowFastBench v1 into a folder: clips and a manifest, in parallel; a second call continues the first."""

import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from keye.errors import ManifestError, writing
from keye.world.manifest import question_line, write_manifest
from keye.world.render import write_mp4
from keye.world.slowfastbench import real
from keye.world.slowfastbench.family import HEIGHTS, MOTIONS
from keye.world.slowfastbench.film import Film, Painter
from keye.world.slowfastbench.questions import EACH, VERSION, Item, draw, row_of
from keye.world.slowfastbench.table import FAMILIES

MARK = "slowfastbench.json"


def write(
    out: str | Path,
    split: str = "heldout",
    families: Sequence[str] | None = None,
    each: int = EACH,
    where: Mapping[str, Sequence[str]] | None = None,
    clips: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write `<out>/<split>.jsonl` and its clips; return the path of the manifest.

    Clips that a former call finished are kept, so that an interrupted call can be repeated.

    Args:
        out: folder to write to.
        split: "dev" for choices, "heldout" for results, "train" to learn from.
        families: names in `FAMILIES`; by default all, those on real clips only where `clips` is given.
        each: questions of a family; the first `each` of the frozen ones.
        where: slice → accepted values, such as {"length": ["16s"], "height": ["144p", "240p"]}.
        clips: folder of the real clips, see `keye.world.slowfastbench.real`.
        workers: processes (default one per core).
        progress: show a bar with the remaining time.

    Raises:
        ManifestError: a name or number is unknown or out of range, no question is left, a real clip is missing, `out`
            holds another version, or it is not writable.
    """
    folder = None if clips is None else Path(clips)
    families = families or [name for name, row in FAMILIES.items() if folder or not row.real]
    if each < 1 or (workers is not None and workers < 1):
        raise ManifestError(f"each={each} and workers={workers} must be at least 1")
    check_slices(where or {})
    items = [item for name in families for item in _items(name, split, each) if in_slices(item, where or {})]
    if not items:
        raise ManifestError(
            f"no question of {', '.join(families)} is in all of the slices {_text(where or {})}; widen them"
        )
    for source in sorted({item.film.source for item in items if item.film.source}):
        real.find_clip(folder, source)
    out = Path(out)
    path = out / f"{split}.jsonl"
    with writing(out, "the benchmark", ManifestError):
        (out / "clips").mkdir(parents=True, exist_ok=True)
        _mark(out / MARK)
        films = {out / clip_path(item): item.film for item in items}
        missing = [(place, film) for place, film in films.items() if not place.exists()]
        # Long films first: the last ones should not run alone.
        missing.sort(key=lambda pair: -pair[1].cells * pair[1].size[0] * pair[1].size[1])
        _render(missing, folder, workers, progress)
        write_manifest(path, map(sample, items))
    return path


def _text(where: Mapping[str, Sequence[str]]) -> str:
    return " ".join(f"{name}={','.join(values)}" for name, values in where.items())


def _items(family: str, split: str, each: int) -> Iterator[Item]:
    row_of(family)
    return (draw(family, split, index) for index in range(each))


SLICES = {
    "length": ("16s", "1min", "10min", "1h"),
    "height": tuple(f"{height}p" for height in HEIGHTS[4]),
    "motion": (*dict.fromkeys(MOTIONS), "real"),
    "load": ("light", "medium", "heavy"),
}
"""Slice → its values."""


def check_slices(where: Mapping[str, Sequence[str]]) -> None:
    """ManifestError for a slice or a value that does not exist."""
    for name, values in where.items():
        if name not in SLICES:
            raise ManifestError(f"there is no slice {name!r}; choose among {', '.join(SLICES)}")
        for value in values:
            if value not in SLICES[name]:
                raise ManifestError(f"the slice {name} has no {value!r}; choose among {', '.join(SLICES[name])}")


def in_slices(item: Item, where: Mapping[str, Sequence[str]]) -> bool:
    """Whether a question is in all slices."""
    return all(item.slices[name] in values for name, values in where.items())


def _mark(path: Path) -> None:
    mark = {"benchmark": "SlowFastBench", "version": VERSION}
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else mark
    except ValueError as error:
        raise ManifestError(f"{path} is damaged; delete it, or give an empty folder") from error
    if found != mark:
        raise ManifestError(f"{path.parent} holds another version of the benchmark; give an empty folder")
    path.write_text(json.dumps(mark) + "\n", encoding="utf-8")


def clip_path(item: Item) -> str:
    """The path of an item's clip, relative to the manifest."""
    return f"clips/{item.split}-{item.clip}.mp4"


def _render(films: list[tuple[Path, Film]], folder: Path | None, workers: int | None, progress: bool) -> None:
    workers = min((os.cpu_count() or 1) if workers is None else workers, len(films))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), disable=not progress) as bar:
        # Pixels, not clips, tell how much is left.
        task = bar.add_task("SlowFastBench", total=sum(_work(film) for _, film in films))
        for film in _rendered(films, folder, workers):
            bar.advance(task, _work(film))


def _work(film: Film) -> int:
    return film.frames * film.size[0] * film.size[1] // 1_000_000 + 1


def _rendered(films: list[tuple[Path, Film]], folder: Path | None, workers: int) -> Iterator[Film]:
    if workers <= 1:
        yield from map(partial(render, folder=folder), films)
        return
    context = multiprocessing.get_context("spawn")  # a forked process would inherit locks of the caller's threads
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        # As they finish: one of an hour would hold back all after it.
        yield from (done.result() for done in as_completed([pool.submit(render, film, folder) for film in films]))


def render(film: tuple[Path, Film], folder: Path | None) -> Film:
    """Encode one film to its path; returns the film."""
    path, what = film
    painter = painter_of(what, folder)
    write_mp4(path, map(painter.frame, range(what.frames)), what.fps, crf=18 if what.cells <= 120 else 23)
    return what


def painter_of(film: Film, folder: Path | None = None) -> Painter:
    """The painter of a film; `folder` has the real clips.

    Raises:
        ManifestError: the film's real clip is missing.
    """
    if film.source is None:
        return Painter(film)
    return Painter(film, real.pictures(real.find_clip(folder, film.source), film.size, film.fps))


def sample(item: Item) -> dict[str, Any]:
    """The manifest line of a question."""
    content = [{"type": "video", "video": clip_path(item)}, {"type": "text", "text": item.question}]
    film = item.film
    meta = {
        "benchmark": f"SlowFastBench v{VERSION}",
        "group": item.group,
        "slices": item.slices,
        "size": list(film.size),
        "fps": film.fps,
        "duration": film.cells / 2,
        "events": events(film),
    }
    return question_line(item.name, item.family, content, item.answer, item.options, item.tolerance, meta)


def events(film: Film) -> list[dict[str, Any]]:
    """Changes of state: place, its tag, new state and second, without those of dials and blinking lamps over 40."""
    where = np.argwhere(np.diff(film.states, axis=1))[:40].tolist()
    tags = film.tags or (None,) * len(film.states)
    return [
        {"place": place, "tag": tags[place], "state": int(film.states[place, cell + 1]), "second": (cell + 1) / 2}
        for place, cell in where
    ]
