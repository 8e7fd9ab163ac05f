"""Marks the questions of a manifest that a model answers without their media: JSONL → JSONL with `blind_accuracy`.

Lines are written in order, a batch at a time, to `<out>.partial`. A run that was stopped continues after the last
complete batch and writes the same file as an uninterrupted one.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from keye.errors import KeyeError, ManifestError, writing
from keye.files import write_atomically
from keye.processor.processor import KeyeProcessor
from rl.blindness import kinds, without_media
from rl.questions.prompts import Prompt, read_question
from rl.questions.sampling import accuracy_of, judged
from rl.rewards import rewards_from
from rl.rollout import InProcessRollout
from rl.run.identity import model_files
from stages.distributed.checkpoints import checksum
from stages.distributed.weights import open_start

KEY = "blind_accuracy"

Answer = Callable[[list[Prompt], int], list[float]]
"""Questions and a seed → the accuracy of each without its media."""


@dataclass(frozen=True)
class Marking:
    """How the questions are asked. batch: lines that are asked together. model: a directory."""

    samples: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 32
    batch: int = 32
    seed: int = 0
    drop_above: float = 0.75
    model: str = ""

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise KeyeError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give at least 1")
        if self.temperature < 0:
            raise KeyeError(f"--temperature is {self.temperature}; give 0 for greedy answers, or more")


@dataclass(frozen=True)
class _Line:
    """A line of the manifest, its question if it is one, and otherwise why it cannot be used ("" for no question)."""

    raw: bytes
    prompt: Prompt | None
    reason: str = ""

    @classmethod
    def read(cls, raw: bytes, path: Path, number: int) -> _Line:
        raw = raw if raw.endswith(b"\n") else raw + b"\n"
        if not raw.strip():
            return cls(raw, None)
        try:
            return cls(raw, read_question(raw, path, number))
        except ManifestError as error:
            return cls(raw, None, str(error))

    @property
    def asked(self) -> bool:
        """Whether it is a question with media."""
        return self.prompt is not None and bool(kinds(self.prompt))

    def with_accuracy(self, accuracy: float) -> bytes:
        """The line with its blind accuracy."""
        return (json.dumps(json.loads(self.raw) | {KEY: accuracy}, ensure_ascii=False) + "\n").encode()


@dataclass
class Counts:
    """What a manifest has: lines, and the blind accuracies of its questions with media by family."""

    total: int = 0
    unusable: int = 0
    """Lines that are no question, with the first reason."""
    reason: str = ""
    families: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, line: _Line, accuracy: float | None) -> None:
        """Count one line."""
        self.total += 1
        self.unusable += bool(line.reason)
        self.reason = self.reason or line.reason
        if line.prompt is not None and accuracy is not None:
            self.families[line.prompt.family].append(accuracy)

    def lines(self, drop_above: float) -> list[str]:
        """A table: questions with media, mean blind accuracy and share answered blind, of each family."""
        every = [value for values in self.families.values() for value in values]
        found = [f"{self.total} lines, {len(every)} questions with media"]
        if self.unusable:
            found.append(f"{self.unusable} lines cannot be used, the first because {self.reason}")
        for name, values in [("all", every), *sorted(self.families.items())]:
            if values:
                share = fmean(value >= drop_above for value in values)
                found.append(
                    f"{name or '(no family)'}: {len(values)} questions, blind accuracy {fmean(values):.3f}, "
                    f"{share:.1%} of them at {drop_above} or more"
                )
        return found


def load_answerer(settings: Marking, device: str = "") -> Answer:
    """The model of `settings` as a function that answers questions without their media.

    Raises:
        CheckpointError: the directory has no model.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    processor = KeyeProcessor.from_pretrained(settings.model)
    model = open_start(settings.model).build(torch.bfloat16 if place.type == "cuda" else torch.float32, place)
    generator, reward = torch.Generator(place), rewards_from({"accuracy": 1.0})
    rollout = InProcessRollout(model, processor, generator)

    def answer(prompts: list[Prompt], seed: int) -> list[float]:
        generator.manual_seed(seed)
        samples = [processor.sample(without_media(p), p.base_dir, add_generation_prompt=True) for p in prompts]
        groups = rollout.generate(samples, settings.samples, settings.temperature, settings.max_new_tokens)
        return [accuracy_of(group) for group in judged(reward, list(zip(prompts, samples, strict=True)), groups)]

    return answer


def mark(
    manifest: str | Path,
    out: str | Path,
    settings: Marking,
    answer: Answer,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Counts:
    """Write the lines of `manifest` with `blind_accuracy` to `out`.

    Args:
        progress: called with the lines that are done, and all lines.

    Raises:
        ManifestError: the manifest does not exist, or `out` exists.
        KeyeError: `<out>.partial` is of another manifest or other settings.
    """
    source, target = Path(manifest), Path(out)
    if not source.is_file():
        raise ManifestError(f"{source} does not exist; give a .jsonl manifest")
    if target.exists():
        raise ManifestError(f"{target} exists; remove it to mark the questions again, or give another --out")
    if source.parent.resolve() != target.parent.resolve():
        raise ManifestError(f"the media of {source} are relative to its folder; give an --out in {source.parent}")
    partial, record = target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.partial.json")
    with writing(target, kind=ManifestError):
        files = model_files(Path(settings.model)) if settings.model else {}
        read = {"manifest": f"{source.stat().st_size} bytes, CRC-32 {checksum(source)}", "files": files}
        _claim(record, read | asdict(settings))
        with source.open("rb") as file:
            total = sum(1 for _ in file)
        counts, done = Counts(), _written(partial, settings.batch, total)
        with source.open("rb") as lines, partial.open("r+b") as sink:
            for begin in range(0, total, settings.batch):
                part = islice(lines, settings.batch)
                batch = [_Line.read(raw, source, number) for number, raw in enumerate(part, begin + 1)]
                if begin < done:
                    written = [sink.readline() for _ in batch]
                else:
                    written = _marked(batch, settings.seed * 1_000_003 + begin, answer)
                    sink.write(b"".join(written))
                    sink.flush()
                for line, marked in zip(batch, written, strict=True):
                    counts.add(line, json.loads(marked).get(KEY) if line.asked else None)
                progress(min(total, begin + settings.batch), total)
            os.fsync(sink.fileno())
        os.replace(partial, target)
        record.unlink()
    return counts


def _claim(record: Path, now: dict[str, Any]) -> None:
    """Record what a partial file is made from, or compare it with the record."""
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        if before.get("files", now["files"]) != now["files"]:  # a record of an earlier version has none
            raise ManifestError(
                f"{record.with_suffix('')} was begun with another model in {now['model']}; remove it to begin again"
            )
        for key in now.keys() - {"drop_above", "files"}:
            if before.get(key) != now[key]:
                raise ManifestError(
                    f"{record.with_suffix('')} was begun with {key} = {before.get(key)!r}, and now it is {now[key]!r}; "
                    "remove it to begin again, or put that back"
                )
    write_atomically(record, json.dumps(now) + "\n")


def _written(partial: Path, batch: int, total: int) -> int:
    """The number of lines in whole batches of a partial file, which is cut after them."""
    lines, size, end = 0, 0, 0
    with partial.open("ab+") as file:
        file.seek(0)
        for raw in file:
            if raw.endswith(b"\n"):
                lines, size = lines + 1, size + len(raw)
                if lines % batch == 0 or lines == total:
                    end = size
        file.truncate(end)
    return lines if lines == total else lines - lines % batch


def _marked(batch: list[_Line], seed: int, answer: Answer) -> list[bytes]:
    """The lines of a batch, with `blind_accuracy` where there is a question with media."""
    asked = [line.prompt for line in batch if line.asked]
    found = iter(answer(asked, seed) if asked else ())
    return [line.with_accuracy(next(found)) if line.asked else line.raw for line in batch]
