"""Draw a split of SlowFastWorld into a directory: clips, stills and the manifest."""

import multiprocessing
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from keye.errors import ManifestError, writing
from keye.world.draft import QUESTIONS
from keye.world.families import FAMILIES, deal
from keye.world.manifest import question_line, write_manifest
from keye.world.render import write_mp4, write_png
from keye.world.scene import COLOURS, PHOTOGRAPHS, SHAPES, Setting, photograph
from keye.world.words import is_heldout, text, text_items

SPLITS = ("train", "heldout")
_POOL_FROM = 100
"""With fewer samples, a pool of processes costs more than it saves."""


@dataclass(frozen=True)
class Job:
    """One sample to make. These fields determine its content."""

    family: str
    split: str
    seed: int
    index: int
    setting: Setting

    @property
    def name(self) -> str:
        """The id in the manifest and the name of the media file."""
        return f"{self.split}-{self.family}-{self.index:05d}"


def make(job: Job, out_dir: Path) -> dict[str, Any]:
    """Draw one sample, write its media and return its manifest line."""
    split = SPLITS.index(job.split)
    rng = np.random.default_rng([job.seed, split, zlib.crc32(job.family.encode()), job.index])
    if job.family == "text":
        draft = text(rng, job.setting, None, job.index, heldout=job.split == "heldout")
    else:
        target = deal(job.family, job.setting, 2 * job.seed + split, job.index)
        draft = FAMILIES[job.family](rng, job.setting, target, job.index)
    content: list[dict[str, str]] = [{"type": "text", "text": draft.question}]
    meta = {"difficulty": job.setting.difficulty, "seed": job.seed, **draft.meta}
    if draft.draw and draft.still:
        path = f"stills/{job.name}.png"
        write_png(out_dir / path, draft.draw(0))
        content.insert(0, {"type": "image", "image": path})
        meta["size"] = list(job.setting.size)
    elif draft.draw:
        path = f"clips/{job.name}.mp4"
        write_mp4(out_dir / path, map(draft.draw, range(draft.frames)), draft.fps, uniform=True)
        content.insert(0, {"type": "video", "video": path})
        meta |= {"size": list(job.setting.size), "fps": draft.fps, "duration": draft.frames / draft.fps}
    return question_line(job.name, job.family, content, draft.answer, draft.options, draft.tolerance, meta)


def generate(
    out_dir: str | Path,
    split: str = "train",
    counts: Mapping[str, int] | None = None,
    seed: int = 0,
    size: tuple[int, int] = (112, 112),
    duration: float = 8.0,
    difficulty: float | Mapping[str, float] = 0.3,
    fps: int = 4,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write `<out_dir>/<split>.jsonl` with its clips and stills and return the path of the manifest.

    The same arguments give the same manifest and the same pixels for any number of workers.

    Args:
        out_dir: folder to write to.
        split: "train" or "heldout"; splits draw from disjoint seeds.
        counts: samples per family (default 100 of each).
        seed: 0 or more.
        size: (height, width) in pixels, even.
        duration: seconds of a clip; `find` clips are twice as long.
        difficulty: 0 (easy) to 1 (hard) for all families, or per family (others 0.3).
        fps: frames per second, even.
        workers: processes (default one per core).
        progress: show a bar.

    Raises:
        ManifestError: a split or family is unknown, a number is out of range, the counts give no samples, or `out_dir`
            is not writable.
    """
    counts = dict.fromkeys(FAMILIES, 100) if counts is None else dict(counts)
    hardness = difficulty if isinstance(difficulty, Mapping) else dict.fromkeys(FAMILIES, difficulty)
    _check(split, [*counts, *hardness])
    _check_numbers(counts, seed, workers)
    try:
        jobs = [
            Job(family, split, seed, index, Setting(size, duration, fps, hardness.get(family, 0.3)))
            for family, number in counts.items()
            for index in range(number)
        ]
    except ValueError as error:
        raise ManifestError(f"the world cannot be drawn: {error}") from error
    out_dir = Path(out_dir)
    path = out_dir / f"{split}.jsonl"
    with writing(out_dir, "the world", ManifestError):
        for folder in ("clips", "stills"):
            (out_dir / folder).mkdir(parents=True, exist_ok=True)
        write_manifest(path, _track(_run(jobs, out_dir, workers), len(jobs), f"world {split}", progress))
    return path


def _check(split: str, families: Iterable[str]) -> None:
    if split not in SPLITS:
        raise ManifestError(f"there is no split {split!r}; choose {' or '.join(SPLITS)}")
    for family in families:
        if family not in FAMILIES:
            raise ManifestError(f"there is no family {family!r}; choose among {', '.join(FAMILIES)}")


def _check_numbers(counts: Mapping[str, int], seed: int, workers: int | None) -> None:
    for family, number in counts.items():
        if number < 0:
            raise ManifestError(f"the count {family}={number} is negative; give 0 or more")
    if not sum(counts.values()):
        raise ManifestError("the counts give no samples; give at least 1 of one family")
    if seed < 0:
        raise ManifestError(f"seed {seed} is negative; give 0 or more")
    if workers is not None and workers < 1:
        raise ManifestError(f"workers {workers} is not a number of processes; give at least 1, or leave it out")


def _run(jobs: list[Job], out_dir: Path, workers: int | None) -> Iterator[dict[str, Any]]:
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers == 1 or len(jobs) < _POOL_FROM:
        yield from map(partial(make, out_dir=out_dir), jobs)
        return
    # A forked process would inherit locks that threads of the caller hold (torch, a tokenizer).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_warm_up) as pool:
        yield from pool.map(partial(make, out_dir=out_dir), jobs, chunksize=16)


def _warm_up() -> None:
    for name in PHOTOGRAPHS:
        photograph(name)


def _track(samples: Iterator[dict[str, Any]], total: int, title: str, show: bool) -> Iterator[dict[str, Any]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), disable=not show) as bar:
        task = bar.add_task(title, total=total)
        for sample in samples:
            bar.advance(task)
            yield sample


def texts(seed: int = 0, samples: int = 400) -> list[str]:
    """Text to train a tokenizer on: questions, answers, captions, boxes and time stamps of all kinds.

    The list contains no held-out text question. The same seed gives the same list.

    Args:
        seed: 0 or more.
        samples: samples of each family to draw; they are not rendered.
    """
    lines: list[str] = []
    for family, build in FAMILIES.items():
        for index in range(samples):
            setting = Setting(difficulty=(index % 11) / 10)
            rng = np.random.default_rng([seed, len(SPLITS), zlib.crc32(family.encode()), index])
            draft = build(rng, setting, deal(family, setting, seed, index), index)
            lines += [draft.question, draft.answer]
            if draft.options:
                lines.append(", ".join(draft.options))
    lines += [line for item in text_items() if not is_heldout(item[0]) for line in item]
    lines += [f"{tenth / 10:.1f}" for tenth in range(0, 640)]
    lines += [str(number) for number in range(1000)]
    lines += [phrase for phrases in QUESTIONS.values() for phrase in phrases]
    lines += [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    return lines
