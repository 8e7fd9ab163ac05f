"""Run a study: every setting on every clip, in processes. A killed process loses the setting at hand only."""

import multiprocessing
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from keye.errors import KeyeError, ManifestError
from keye.evaluation.study import answerers
from keye.evaluation.study.answerers import OBSERVER, Answerer
from keye.evaluation.study.clips import DrawnClip, events_seen
from keye.evaluation.study.settings import Setting
from keye.evaluation.study.store import Key, Store, append, identity
from keye.slowfast.plan import VideoPlan
from keye.world.slowfastbench import EACH, FAMILIES, SPLITS, VERSION, Item, draw
from keye.world.slowfastbench.write import check_slices, in_slices

QUIET = 20.0
"""Seconds between lines of progress where the output is no terminal."""


@dataclass(frozen=True)
class Task:
    """The questions of one clip, the settings that are missing, and who answers.

    items: (family, split, index). done: lines that exist already. checksum: of the family, first 12 digits.
    """

    clip: str
    items: tuple[tuple[str, str, int], ...]
    settings: tuple[Setting, ...]
    done: frozenset[Key]
    checksum: str
    observer: bool
    models: tuple[Answerer, ...]
    path: Path
    real: Path | None
    work: int


def run_study(
    out: str | Path,
    split: str,
    settings: Sequence[Setting],
    families: Sequence[str] | None = None,
    where: Mapping[str, Sequence[str]] | None = None,
    limit: int | None = None,
    models: Sequence[Answerer] = (),
    observer: bool = True,
    real: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
    command: str | None = None,
) -> None:
    """Measure settings on questions of SlowFastBench and write predictions to `out`; a second call continues the first.

    Args:
        out: folder of the study.
        split: "dev" for choices, "heldout" for results.
        settings: of `settings_of`; each budget needs the reference.
        families: names; by default all that the observer reads, those on real clips where `real` is given.
        where: slice → accepted values.
        limit: at most this many questions of a family in these slices.
        models: trained models that answer as well.
        observer: whether the ideal observer answers.
        real: folder of the real clips.
        workers: processes (default one per core; 0 runs in this one).
        progress: show a bar with the remaining time, or a line now and then if the output is no terminal.
        command: noted in the study with date and seconds.

    Raises:
        KeyeError: the folder is of another study, or there is nothing to measure.
    """
    folder = None if real is None else Path(real)
    known = [name for name in FAMILIES if not observer or answerers.observed(name)]
    families = families or [name for name in known if folder or not FAMILIES[name].real]
    if split not in SPLITS:
        raise ManifestError(f"there is no split {split!r}; choose among {', '.join(SPLITS)}")
    if not observer and not models:
        raise KeyeError("nobody answers the questions; give --model, or leave out --no-observer")
    for name in families:
        if name in FAMILIES and name not in known:
            raise KeyeError(f"the ideal observer does not read {name}; omit it, or give --model and --no-observer")
    check_slices(where or {})
    clips = _clips(families, split, where or {}, limit)
    found = identity(split, families, where or {}, limit, sum(map(len, clips.values())))
    store = Store(out, found, settings, answerers.summary(models))
    tasks, groups = [], {clip: items[0].group for clip, items in clips.items()}
    for clip, items in clips.items():
        keys = frozenset(key for item in items for key in store.done_of(item.name))
        film = items[0].film
        work = film.frames * film.size[0] * film.size[1] // 1_000_000 + 20
        sums = found["benchmark"]["checksums"][items[0].family][:12]
        names = tuple((item.family, item.split, item.index) for item in items)
        task = Task(clip, names, tuple(settings), keys, sums, observer, tuple(models), store.path, folder, work)
        if any(_missing(task, setting) for setting in settings):
            tasks.append(task)
    tasks.sort(key=lambda task: zlib.crc32(f"{task.items[0][0]} {groups[task.clip]}".encode()))  # groups end together
    began = time.monotonic()
    with _bar(tasks, len(clips), progress) as advance:
        for task in _finished(tasks, workers):
            advance(task)
    if command and tasks:
        facts = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "seconds": time.monotonic() - began}
        store.add_run({"command": command, **facts})


def _clips(
    families: Sequence[str], split: str, where: Mapping[str, Sequence[str]], limit: int | None
) -> dict[str, list[Item]]:
    """The questions by clip."""
    clips: dict[str, list[Item]] = {}
    for family in families:
        items = [item for item in (draw(family, split, index) for index in range(EACH)) if in_slices(item, where)]
        for item in items[:limit]:
            clips.setdefault(item.clip, []).append(item)
    if not clips:
        raise KeyeError(f"no question of {', '.join(families)} is in the slices {dict(where)}; widen them")
    return clips


def _finished(tasks: Sequence[Task], workers: int | None) -> Iterator[Task]:
    count = min((os.cpu_count() or 1) if workers is None else workers, len(tasks))
    if count <= 1:
        yield from map(measure, tasks)
        return
    context = multiprocessing.get_context("spawn")  # a forked process would inherit locks of the caller's threads
    with ProcessPoolExecutor(count, mp_context=context, initializer=partial(torch.set_num_threads, 1)) as pool:
        pending = {pool.submit(measure, task) for task in tasks}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            for future in pending:
                future.cancel()


def measure(task: Task) -> Task:
    """Encode a clip under every missing setting, and append the answers to the file of predictions."""
    items = [draw(*name) for name in task.items]
    clip = DrawnClip(task.clip, items[0].film, task.real)
    targets: dict[int, int] = {}
    for setting in task.settings:
        missing = _missing(task, setting)
        if not missing:
            continue
        plan = _plan(clip, setting, targets, task.settings)
        append(task.path, _lines(task, setting, clip, items, plan, missing))
    return task


def _plan(clip: DrawnClip, setting: Setting, targets: dict[int, int], settings: Sequence[Setting]) -> VideoPlan:
    """The plan at the tokens of the reference with the same budget, or at the setting's own budget."""
    if setting.budget is None or setting.is_reference:
        return clip.plan(setting)
    if setting.budget not in targets:
        reference = next(other for other in settings if other.is_reference and other.budget == setting.budget)
        targets[setting.budget] = clip.plan(reference).tokens
    return clip.plan_of_tokens(setting, targets[setting.budget])


def _missing(task: Task, setting: Setting) -> list[tuple[Answerer | None, int]]:
    """Who has not answered which of the clip's questions; None is the observer."""
    who: list[Answerer | None] = [None] if task.observer else []
    who += [model for model in task.models if model.policy in (None, setting.policy)]
    return [(one, place) for one in who for place, name in enumerate(task.items)
            if (_id(name), setting.label, one.by if one else OBSERVER) not in task.done]  # fmt: skip


def _id(name: tuple[str, str, int]) -> str:
    family, split, index = name
    return f"{split}-{family}-{index:05d}"


def _lines(
    task: Task,
    setting: Setting,
    clip: DrawnClip,
    items: Sequence[Item],
    plan: VideoPlan,
    missing: Sequence[tuple[Answerer | None, int]],
) -> Iterator[dict[str, Any]]:
    pictures = clip.pictures_of(plan)
    psnr, ssim = clip.detail_of(plan)
    seen, tokens = events_seen(clip.film, plan)
    encoded = {
        "tokens": plan.tokens, "entries": len(plan), "slow": round(plan.slow_share, 4), "psnr": round(psnr, 2),
        "ssim": round(ssim, 4), "events": round(seen, 4), "event_tokens": round(tokens, 2),
    }  # fmt: skip
    for one in dict.fromkeys(one for one, _ in missing):
        asked = [items[place] for other, place in missing if other is one]
        if one is None:
            replies = [answerers.observe(item, plan, pictures) for item in asked]
        else:
            replies = answerers.ask(one, asked, plan, pictures)
        for item, reply in zip(asked, replies, strict=True):
            yield {
                "id": item.name, "family": item.family, "group": item.group, **item.slices, "version": VERSION,
                "checksum": task.checksum, "setting": setting.label, **encoded, "by": one.by if one else OBSERVER,
                "answer": reply, "truth": item.answer, "right": answerers.right(item, reply),
                "chance": round(answerers.chance(item), 4),
            }  # fmt: skip


@contextmanager
def _bar(tasks: Sequence[Task], clips: int, progress: bool) -> Iterator[Any]:
    total, began, last = sum(task.work for task in tasks), time.monotonic(), time.monotonic()
    finished, done = clips - len(tasks), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), disable=not progress) as bar:
        live, shown = bar.console.is_terminal, bar.add_task(f"study of {clips} clips", total=total)

        def advance(task: Task) -> None:
            nonlocal finished, done, last
            finished, done, now = finished + 1, done + task.work, time.monotonic()
            bar.advance(shown, task.work)
            if progress and not live and (now - last > QUIET or finished == clips):
                left, last = (now - began) / done * (total - done), now
                print(f"{finished} of {clips} clips, {now - began:.0f} s, about {left:.0f} s left", flush=True)

        yield advance
