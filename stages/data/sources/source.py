"""Sources: a data set of chats → an endless sequence of encoded samples; a bad sample does not stop a run.

Every rank has the same sources and draws the same numbers from them. Only its owner reads and encodes a sample.
"""

import json
import random
import zlib
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keye.errors import KeyeError, ManifestError
from keye.processor.processor import KeyeProcessor
from keye.video.fetch import scheme_of
from stages.data.items import Cache, Item
from stages.data.quarantine import Quarantine, WarningLog
from stages.data.recipe import SourceRecipe
from stages.data.sources.chat import Row, caption_of, each_part
from stages.data.sources.decontaminate import Decontamination
from stages.data.sources.formats import LocatedRow, Table, marks
from stages.data.sources.splitting import is_plain_text, split
from stages.data.sources.streams import WINDOW, StreamLanes
from stages.data.sources.transforms import apply
from stages.recipe_checks import KINDS

REASON = 300  # characters kept of the reason why a sample is bad


def source_name(recipe: SourceRecipe) -> str:
    """The unique name of a source within a stage, also in checkpoints."""
    # The path as in the recipe: a checkpoint stays valid if the run's folder moves.
    part = "".join(f"+{family}" for family in recipe.families)
    own = f":{recipe.config}:{recipe.split}" if recipe.config or recipe.split != "train" else ""
    return f"{recipe.path}{own}#{recipe.kind}{part}" + "".join(f">{name}" for name in recipe.transforms)


def held_out(count: int, share: float) -> np.ndarray:
    """Mask `[count] bool` of held-out rows: about `share` of them, determined by their numbers alone.

    The choice is the same for every source and every run, and does not change if rows are appended.
    """
    mixed = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    # The finaliser of SplitMix64: neighbouring numbers become independent.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) < np.uint64(int(share * 2**64))


class Shuffled:
    """The rows of a map-style data set with the wanted kind and families, in a different order every epoch.

    Args:
        recipe: of the data set.
        path: the recipe's path with `{run}` replaced.
        seed: of the orders.
        quarantine: for the rows that cannot be read; None if another process reports them.
        part: (share of held-out rows, whether to read those or the others).

    Raises:
        ManifestError: there is no such file, or it has no wanted row.
    """

    def __init__(
        self, recipe: SourceRecipe, path: str, seed: int, quarantine: Quarantine | None,
        part: tuple[float, bool] = (0.0, False),
    ) -> None:  # fmt: skip
        self.table, self.seed, self.recipe, self.part = Table(recipe, path), seed, recipe, part
        if quarantine is not None:
            self._report(self.table.bad(), quarantine)
        # 8 bytes a row: one process of a machine writes the file, and all of them share its pages.
        self.indices = self.table.choose([recipe.kind, sorted(recipe.families), part], self._choose)
        if not len(self.indices):
            of = " that are held out" if part[0] and part[1] else ""
            of += f" of the families {', '.join(recipe.families)}" if recipe.families else ""
            raise ManifestError(f"{path}: no {recipe.kind} samples{of}; {self._reason()}")
        self.epoch, self.position, self.patience = 0, 0, 2 * len(self.indices) - 1
        self._order: np.ndarray | None = None  # of this epoch, on the rank that draws

    def _choose(self) -> np.ndarray:
        """The wanted rows, int64 ascending."""
        kinds, families, names = self.table.scan()
        wanted = kinds == KINDS.index(self.recipe.kind)
        if self.recipe.families:
            wanted &= np.isin(families, [i for i, name in enumerate(names) if name in self.recipe.families])
        share, held = self.part
        if share:
            wanted &= held_out(len(wanted), share) == held
        return np.flatnonzero(wanted)

    def _reason(self) -> str:
        """Why no row is wanted: what is wrong with the first one, if no row can be read."""
        bad = self.table.bad()
        if bad and len(bad) == len(self.table):
            try:
                self.table.find(bad[0])
            except ManifestError as error:
                return f"no row is in a known form: {error}"
        return "correct data.sources"

    def _report(self, bad: list[int], quarantine: Quarantine) -> None:
        for index in bad:
            try:
                self.table.find(index)
            except ManifestError as error:
                quarantine.add(*self.table.place(index), str(error))

    def _shuffled(self) -> np.ndarray:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        small = torch.int32 if len(self.indices) < 1 << 31 else torch.int64
        return torch.randperm(len(self.indices), generator=generator, dtype=small).numpy()

    def draw_many(self, count: int) -> np.ndarray:
        drawn = []
        while count:
            if self.position == len(self.indices):
                self.epoch, self.position, self._order = self.epoch + 1, 0, None
            if self._order is None:
                self._order = self._shuffled()
            places = self._order[self.position : self.position + count]
            drawn.append(self.indices[places])
            self.position += len(places)
            count -= len(places)
        return np.concatenate([np.zeros(0, np.int64), *drawn])

    def owners(self, indices: np.ndarray, ranks: int) -> np.ndarray:
        order = np.argsort(indices, kind="stable")  # a sorted search is local in memory
        owners = np.empty(len(indices), np.int64)
        owners[order] = np.searchsorted(self.indices, indices[order]) % ranks
        return owners

    @property
    def size(self) -> int:
        """Rows in an epoch."""
        return len(self.indices)

    @property
    def mark(self) -> dict[str, Any]:
        return {"rows": len(self.indices), **marks([part.file for part in self.table.parts]),
                "order": zlib.crc32(np.ascontiguousarray(self.indices))}  # fmt: skip

    def find(self, index: int) -> LocatedRow:
        return self.table.find(index)

    def place(self, index: int) -> tuple[str, int]:
        """The file of a row and its line; the data set's path for a row that no longer exists."""
        return self.table.place(index) if index < len(self.table) else (self.recipe.path, index + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], min(state["position"], len(self.indices))
        self._order = None


class Source:
    """The samples of one data set with the wanted kind and families, in an order that depends only on the seed.

    Args:
        recipe: of the data set and its part.
        processor: encodes a chat; its settings are part of the cache key.
        seed: of the order, which differs in every epoch.
        cache, quarantine: shared by all sources of a process.
        limit: tokens of a sample at most. Videos and stills are made smaller to fit; samples that cannot fit are
            quarantined. None: no limit.
        run: replaces `{run}` in the recipe's path.
        report: whether this process reports bad rows when the data set is opened; one process of a run should.
        guard: filter of evaluation pictures; matching samples are quarantined.
        part: see `Shuffled`.
        max_bad_fraction: of the last `WINDOW` samples; with more bad samples the run ends.

    Raises:
        ManifestError: there is no such data set, or it has no wanted row.
    """

    def __init__(
        self,
        recipe: SourceRecipe,
        processor: KeyeProcessor,
        seed: int,
        cache: Cache,
        quarantine: Quarantine,
        limit: int | None = None,
        run: str = "",
        report: bool = True,
        guard: Decontamination | None = None,
        part: tuple[float, bool] = (0.0, False),
        max_bad_fraction: float = 0.5,
    ) -> None:
        self.recipe, self.processor, self.seed, self.limit = recipe, processor, seed, limit
        self.cache, self.quarantine, self.guard = cache, quarantine, guard
        self.path, self.name = recipe.path.replace("{run}", run), source_name(recipe)
        self.settings = json.dumps([processor.encoder, processor.image, limit, recipe.transforms, seed], sort_keys=True)
        if recipe.streaming:
            self.rows: Shuffled | StreamLanes = StreamLanes(recipe, self.path, seed, quarantine, max_bad_fraction)
        else:
            self.rows = Shuffled(recipe, self.path, seed, quarantine if report else None, part)
        self.warnings = WarningLog()
        self.failures, self.max_bad_fraction = 0, max_bad_fraction
        self.recent: deque[bool] = deque(maxlen=WINDOW)  # whether each of the last samples was bad
        self.causes: deque[str] = deque(maxlen=3)  # of the last bad ones
        self.bad: dict[int, str] = {}  # sample that cannot be used, and is not tried again → why

    @property
    def mark(self) -> dict[str, Any]:
        """Identifies a copy of the data set: rows, files, bytes, and a checksum of parts of them."""
        return self.rows.mark

    def draw(self) -> int:
        """Number of the next sample; depends only on the seed."""
        return int(self.draw_many(1)[0])

    def draw_many(self, count: int) -> np.ndarray:
        """Numbers of the next samples, int64 `[count]`; depend only on the seed."""
        return self.rows.draw_many(count)

    def owners(self, indices: np.ndarray, ranks: int) -> np.ndarray:
        """The ranks that encode samples, int64 `[n]`: the same in every epoch, so their caches are used."""
        return self.rows.owners(indices, ranks)

    def results(self, good: np.ndarray, causes: dict[int, str] | None = None) -> None:
        """Record which drawn samples can be used, in the order of the draws.

        Args:
            good: bool `[n]`.
            causes: place in `good` → why a sample is bad.

        Raises:
            ManifestError: an epoch without a good sample, or too many bad ones among the last.
        """
        causes = causes or {}
        self.causes.extend(causes.values())
        self.recent.extend(place in causes for place in range(len(good)))
        run = int(good[::-1].argmax()) if good.any() else len(good)
        self.failures = run if good.any() else self.failures + run
        # The good samples may be first in one epoch and last in the next: with one of n, 2n − 2 bad ones in a row.
        if self.failures >= self.rows.patience:
            message = f"{self.name}: none of its samples can be used; see quarantine.jsonl for the reasons"
            raise ManifestError(message + self._last())
        bad = sum(self.recent)
        # A smaller data set would count the same bad rows in every epoch; `patience` covers that case.
        if len(self.recent) == WINDOW <= self.rows.size and bad > self.max_bad_fraction * WINDOW:
            raise ManifestError(
                f"{self.name}: {bad} of its last {WINDOW} samples cannot be used, and data.max_bad_fraction allows "
                f"{self.max_bad_fraction:g} of them; correct the source or raise the fraction{self._last()}"
            )

    def _last(self) -> str:
        return f". The last reasons: {' | '.join(self.causes)}" if self.causes else ""

    def items(self, index: int) -> list[Item]:
        """The items of sample `index`, encoded or from the cache: one item, or the parts of a long text.

        A bad sample has no items and is quarantined.
        """
        if index in self.bad:
            return []
        key = (self.path, index, self.settings)
        items = self.cache.get(key)
        if items is None:
            items = self._encode(index)
            if items and not self.recipe.streaming:  # the numbers of a stream never repeat
                self.cache.put(key, items)
        return [replace(item, source=self.name) for item in items]

    def item(self, index: int) -> Item | None:
        """Sample `index`, of a split text the first part; None if it is bad."""
        return next(iter(self.items(index)), None)

    def _encode(self, index: int) -> list[Item]:
        try:
            found = self.rows.find(index)
        except ManifestError as error:  # the file has changed since it was opened, or since the checkpoint
            return self._bad(index, *self.rows.place(index), str(error))
        if found is None:
            return []
        try:
            return self._items(found, index)
        except KeyeError as error:
            return self._bad(index, found.file, found.line, str(error))
        except Exception as error:  # templates, decoders and image libraries may raise any class
            return self._bad(index, found.file, found.line, f"{type(error).__name__}: {error}")

    def _bad(self, index: int, file: str, line: int, reason: str) -> list[Item]:
        self.quarantine.add(file, line, reason)
        self.bad[index] = f"{file} line {line}: {reason}"[:REASON]
        return []

    def _items(self, found: LocatedRow, index: int) -> list[Item]:
        row = self._transformed(found, index)
        messages = row["messages"]
        long = self.limit is not None and is_plain_text(messages)
        sample = self.processor.sample(messages, found.base, max_length=None if long else self.limit)
        if not bool((sample.labels[1:] != -100).any()):
            raise ManifestError("no text of the assistant; add an assistant message")
        self.warnings.add(found.file, found.line, sample.all_warnings)
        match = self.guard.match(sample) if self.guard is not None else None
        if match is not None:
            raise ManifestError(match)
        caption = row.get("caption") or caption_of(messages)
        if not isinstance(caption, str):
            raise ManifestError(f"its 'caption' is of type {type(caption).__name__}; write text")
        parts = split(sample, self.limit) if long else [sample]
        return [Item(part, self.name, index, self.recipe.kind, caption, number) for number, part in enumerate(parts)]

    def _transformed(self, found: LocatedRow, index: int) -> Row:
        if not self.recipe.transforms:
            return found.row
        chance = random.Random(f"{self.seed}:{index}")

        def pick() -> Row:
            """Another sample; the own one in place of a bad one, because no transform uses it twice."""
            indices = self.rows.indices
            try:
                return with_absolute_paths(self.rows.find(int(indices[chance.randrange(len(indices))])))
            except ManifestError:
                return found.row

        return apply(self.recipe.transforms, with_absolute_paths(found), chance, pick)

    def state_dict(self) -> dict[str, Any]:
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state)


def with_absolute_paths(found: LocatedRow) -> Row:
    """The row with absolute paths, so rows of several files can be combined."""

    def locate(part: Row) -> Row:
        paths = {name: part.get(name) for name in (part["type"], "path") if name != "text"}
        relative = {name: path for name, path in paths.items() if isinstance(path, str) and not scheme_of(path)}
        return {**part, **{name: str((Path(found.base) / path).absolute()) for name, path in relative.items()}}

    return {**found.row, "messages": each_part(found.row["messages"], locate)}


def different_data(names: list[str], marks: list[tuple[str, list[dict[str, Any]]]]) -> ManifestError | None:
    """An error that names the first source of which two ranks have different copies; None if there is none.

    Args:
        names: of the sources.
        marks: rank → (host, `Source.mark` of each source).
    """
    host, first = marks[0]
    for rank, (other, found) in enumerate(marks):
        for name, mine, theirs in zip(names, first, found, strict=True):
            if mine != theirs:
                texts = [", ".join(f"{key} {value}" for key, value in mark.items()) for mark in (mine, theirs)]
                return ManifestError(
                    f"{name}: the ranks read different data: rank 0 ({host}) has {texts[0]}; rank {rank} ({other}) has "
                    f"{texts[1]}; copy the same files to every machine"
                )
    return None
