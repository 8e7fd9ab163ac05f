"""What the adversary of SlowFastBench sees: the words of a question, plans under each measure, and the file's packets.

Clips are drawn at the smallest height of their family (144p, coverage 240p, detail 480p) and 8 to 32 seconds. Plans
use the frames in memory, 2 a second; packets are those of the encoded clip. Each input of each 200 groups of questions
has a file in .cache/bench/adversary, so that an interrupted run continues and later runs add inputs and questions. The
name of a file has a checksum of the first groups, drawn and measured again: files are used only while the drawing and
the measures give the same values.
"""

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import av
import numpy as np
import torch

from keye import SlowFastEncoder
from keye.evaluation.match import parse_box
from keye.slowfast.frame_classifier import FrameClassifier
from keye.slowfast.measures import Measure
from keye.world.render import write_mp4
from keye.world.scene import Backdrop
from keye.world.slowfastbench import film
from keye.world.slowfastbench.questions import TAG_COLOURS, Item, draw
from keye.world.slowfastbench.table import FAMILIES
from keye.world.slowfastbench.write import painter_of
from scripts.bench.common.record import ROOT

MEASURES = ("change", "mse", "patch_l1", "patch_cosine", "lab")
INPUTS = (*MEASURES, "packets")
"""Inputs besides the text, which is part of each."""
CACHE = ROOT / ".cache/bench/adversary"
CLIPS = ROOT / ".cache/clips"
CHUNK = 200
"""Groups in one file of the cache."""
CHECKED = 4
"""Groups that are drawn again to decide whether the files of the cache are used."""
EVENTS = 12
"""Lowest similarities that are given in the order of time, with their times."""
LOWEST = 0
"""Column of the lowest similarity in the input of a measure, after the words."""
WORDS = 96
"""Columns of the words."""


@dataclass
class Drawn:
    """Questions of one family.

    Attributes:
        inputs: name → float32 [n, F]; n is N for "text", and other inputs may have only the first n questions.
        answers: int [N], the number of the right choice.
        allowed: bool [N, C], the choices that the question offers.
        groups: int [N].
    """

    inputs: dict[str, np.ndarray]
    answers: np.ndarray
    allowed: np.ndarray
    groups: np.ndarray

    def lowest(self, name: str) -> np.ndarray:
        """The lowest similarity of each clip under a measure, float32 [n]."""
        return self.inputs[name][:, WORDS + LOWEST]


def load(family: str, split: str, numbers: Mapping[str, int], motion: str) -> Drawn:
    """Questions of a family from the cache; those that are not in it are drawn and added.

    Args:
        numbers: input → number of questions; "text" has the most.
        motion: of the backgrounds: "still", or "drawn" for the benchmark's own mix.
    """
    groups = {name: math.ceil(number / FAMILIES[family].members) for name, number in numbers.items()}
    began, drawn = time.monotonic(), 0
    clips = max((number for name, number in groups.items() if name != "text"), default=0)
    for first in range(0, max(groups.values()), CHUNK):
        lasts = {name: min(first + CHUNK, number) for name, number in groups.items()}
        found = {name: _file(family, motion, split, name, first)[0] for name in lasts}
        missing = [name for name, last in lasts.items() if last > max(first, found[name])]
        for last in sorted({lasts[name] for name in missing}):
            _draw(family, motion, split, range(first, last), [name for name in missing if lasts[name] == last])
        if set(missing) - {"text"}:
            done = min(first + CHUNK, clips)
            drawn += done - first
            left = (time.monotonic() - began) / drawn * (clips - done)
            print(f"      {family} {split}: {done} of {clips} groups drawn, {left:.0f} s left", flush=True)
    return _joined({name: _read(family, motion, split, name, number) for name, number in numbers.items()})


def load_cached(family: str, split: str, motion: str) -> Drawn | None:
    """All questions of a family in the cache; None if there are none."""
    parts = {name: _read(family, motion, split, name) for name in ("text", *INPUTS)}
    return _joined({name: part for name, part in parts.items() if part}) if parts["text"] else None


def _file(family: str, motion: str, split: str, name: str, first: int) -> tuple[int, Path]:
    """The longest file of the cache that begins with group `first`: its last group + 1 (0: none), and its path."""
    stem = f"{family}-{motion}-{split}-{name}-{_check(family, motion)[name]}-{first}-"
    found = {int(path.stem.removeprefix(stem)): path for path in CACHE.glob(f"{stem}*.npz") if "part" not in path.stem}
    return max(found.items(), default=(0, CACHE))


def _read(family: str, motion: str, split: str, name: str, number: int | None = None) -> dict[str, np.ndarray]:
    """The columns of the first `number` questions (None: all) of an input in the cache; empty if there are none."""
    parts: list[dict[str, np.ndarray]] = []
    first, rows = 0, 0
    while number is None or rows < number:
        last, path = _file(family, motion, split, name, first)
        if not last:
            break
        with np.load(path) as file:
            parts.append(dict(file))
        rows += len(parts[-1]["values"])
        if last - first < CHUNK:
            break
        first = last
    return {column: np.concatenate([part[column] for part in parts])[:number] for column in parts[0]} if parts else {}


def _joined(parts: Mapping[str, Mapping[str, np.ndarray]]) -> Drawn:
    words = parts["text"]["values"]
    values = {name: part["values"][: len(words)] for name, part in parts.items() if name != "text"}
    inputs = {name: np.concatenate([words[: len(found)], found], 1) for name, found in values.items()}
    facts = {name: parts["text"][name] for name in ("answers", "allowed", "groups")}
    return Drawn({"text": words, **inputs}, **facts)


def _draw(family: str, motion: str, split: str, groups: range, names: Sequence[str]) -> None:
    """Draw some groups and write a file for each input."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for name, columns in measure(family, motion, split, groups, names).items():
        check = _check(family, motion)[name]
        path = CACHE / f"{family}-{motion}-{split}-{name}-{check}-{groups.start}-{groups.stop}.npz"
        scratch = path.with_suffix(f".part{os.getpid()}.npz")
        np.savez_compressed(scratch, **columns)
        scratch.replace(path)


@cache
def _check(family: str, motion: str) -> dict[str, str]:
    """Input → checksum of the first groups of the split "dev", drawn and measured now."""
    found = measure(family, motion, "dev", range(CHECKED), ("text", *INPUTS))
    return {
        name: hashlib.sha256(b"".join(columns[column].tobytes() for column in sorted(columns))).hexdigest()[:12]
        for name, columns in found.items()
    }


def measure(
    family: str, motion: str, split: str, groups: range, names: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Input → column → rows of the questions of some groups: "values", and for the text the fields of `Drawn`."""
    torch.set_num_threads(1)
    encoders = {name: SlowFastEncoder(measure=name) for name in names if name in MEASURES}
    row = FAMILIES[family]
    length = next(length for length in (8, 16, 32) if length >= row.shortest)
    rows: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in names}
    for group in groups:
        seen: dict[str, dict[str, np.ndarray]] = {}
        backdrops: list[_Once] = []
        for member in range(row.members):
            index = group * row.members + member
            item = draw(family, split, index, length, row.lowest, None if motion == "drawn" else motion)
            if item.clip not in seen:
                seen[item.clip] = dict(_of_clip(item.film, encoders, "packets" in names, backdrops))
            for name, values in seen[item.clip].items():
                rows[name].setdefault("values", []).append(values)
            if "text" in names:
                answer, allowed = choice(item)
                facts = {"values": _words(item), "answers": answer, "allowed": allowed, "groups": group}
                for column, value in facts.items():
                    rows["text"].setdefault(column, []).append(value)
    return {name: {column: np.stack(found) for column, found in columns.items()} for name, columns in rows.items()}


def _of_clip(
    what: film.Film, encoders: Mapping[str, SlowFastEncoder], packets: bool, backdrops: list["_Once"]
) -> Iterator[tuple[str, np.ndarray]]:
    """(input, its values float32 [F]) of a clip; `backdrops` are those of its group, filled by the first clip."""
    if encoders or packets:
        painter = painter_of(what, CLIPS)
        if not backdrops:
            backdrops += map(_Once, painter.backdrops)
        painter.backdrops = backdrops
    if encoders:
        yield from plans(painter, encoders)
    if packets:
        yield "packets", _packets(painter)


def plans(painter: film.Painter, encoders: Mapping[str, SlowFastEncoder]) -> Iterator[tuple[str, np.ndarray]]:
    """(measure, what a plan shows): types, similarities, and the lowest similarities with their times."""
    frames = painter.cell_frames()
    different = list({id(frame): frame for frame in frames}.values())
    numbers = {id(frame): number for number, frame in enumerate(different)}
    shown = torch.tensor([numbers[id(frame)] for frame in frames])
    pixels = torch.from_numpy(np.stack(different)).permute(0, 3, 1, 2)
    for name, encoder in encoders.items():
        types, scores = FrameClassifier(_Remembered(encoder.measure, pixels), encoder.policy).step(shown)
        similarity = np.nan_to_num(np.array(scores), nan=1.0)
        lowest = np.sort(np.argsort(similarity, kind="stable")[:EVENTS])
        found = [[similarity.min()], types, similarity, similarity[lowest], lowest, np.sort(similarity), [sum(types)]]
        yield name, np.concatenate(found).astype(np.float32)


class _Once:
    """A backdrop that draws each frame once; the clips of a group have the same backdrops, as they have one seed."""

    def __init__(self, backdrop: Backdrop) -> None:
        self.frame = cache(backdrop.frame)


class _Remembered:
    """A measure of numbered frames that compares equal pairs once; frames of a still background occur often."""

    def __init__(self, measure: Measure, pixels: torch.Tensor) -> None:
        self.name, self.threshold, self._measure = measure.name, measure.threshold, measure
        self._features, self._scores = measure.prepare(pixels), {}

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        return frames

    def compare(self, reference: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        one, others = int(reference), features.tolist()
        new = [other for other in dict.fromkeys(others) if (one, other) not in self._scores]
        if new:
            found = self._measure.compare(self._features[one], self._features[new]).tolist()
            self._scores |= {(one, other): score for other, score in zip(new, found, strict=True)}
        return torch.tensor([self._scores[one, other] for other in others])


def _packets(painter: film.Painter) -> np.ndarray:
    """Logarithms of the sizes of the packets of the encoded clip in the order of time, sorted, and key frames."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, (painter.frame(i) for i in range(painter.film.frames)), painter.film.fps)
        with av.open(str(path)) as container:
            packets = sorted((p for p in container.demux(video=0) if p.size), key=lambda packet: packet.pts)
    sizes = np.log([packet.size for packet in packets])
    return np.concatenate([sizes, np.sort(sizes), [float(packet.is_keyframe) for packet in packets]]).astype(np.float32)


def _words(item: Item) -> np.ndarray:
    """The words of the question and the places of its options, hashed into 0/1 columns, float32 [96]."""
    found = np.zeros(WORDS, np.float32)
    question, _, offered = item.question.partition(" Options: ")
    options = [f"{place}:{option}" for place, option in enumerate(offered.split(", "))]
    for word in [*question.lower().split(), *options]:
        found[int(hashlib.md5(word.encode()).hexdigest(), 16) % len(found)] = 1
    return found


def choice(item: Item) -> tuple[int, np.ndarray]:
    """The number of the right choice and the offered choices, bool [C].

    Choices are the words or numbers of the family; quarters of the frame for boxes; for seconds, the first, second, …
    of the options.
    """
    if item.options is None:
        left, top, right, bottom = parse_box(item.answer)
        return int(left + right > 1000) + 2 * int(top + bottom > 1000), np.ones(4, bool)
    if item.family == "when":
        return item.options.index(item.answer), np.ones(4, bool)
    names = TAG_COLOURS if item.options[0] in TAG_COLOURS else tuple(map(str, range(10)))
    return names.index(item.answer), np.array([name in item.options for name in names])
