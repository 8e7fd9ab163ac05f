"""Sources: a data set of chats → encoded samples, one after the other, for ever; a bad one never stops a run.

Every rank holds the same sources and draws the same numbers from them; a sample is read and encoded only by its owner.
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
from stages.data.items import Cache, Item, Quarantine, packed
from stages.data.sources.chat import Row, caption_of, each_part
from stages.data.sources.decontaminate import Decontamination
from stages.data.sources.formats import BAD, Found, Table, marks
from stages.data.sources.splitting import is_plain_text, split
from stages.data.sources.streams import WINDOW, StreamLanes
from stages.data.sources.transforms import apply
from stages.data.thinned import WarningLog
from stages.recipe import SourceRecipe
from stages.recipe_checks import KINDS

REASON = 300  # characters of why a sample is bad that are kept


def source_name(recipe: SourceRecipe) -> str:
    """What tells a source from the others of a stage, in checkpoints too."""
    # The path as written: a checkpoint stays good when the run's folder moves.
    part = "".join(f"+{family}" for family in recipe.families)
    own = f":{recipe.config}:{recipe.split}" if recipe.config or recipe.split != "train" else ""
    return f"{recipe.path}{own}#{recipe.kind}{part}" + "".join(f">{name}" for name in recipe.transforms)


def held_out(count: int, share: float) -> np.ndarray:
    """Which of `count` rows are held out: about `share` of them `[count] bool`, by their numbers alone.

    A row is held out or not whichever source reads it, in every run, and stays so when others are added behind it.
    """
    mixed = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    # SplitMix64's finaliser: neighbouring numbers come out as independent ones.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) < np.uint64(int(share * 2**64))


class Shuffled:
    """The rows of a map-style data set that have the wanted kind and families, every epoch in another order.

    Args:
        recipe: which data set. path: the recipe's, with the run's folder put in. seed: of the orders.
        quarantine: takes the rows that cannot be read; None where another process reports them.
        part: (share of the rows that is held out, whether those are the wanted ones or the others).

    Raises:
        ManifestError: no such file, or nothing in it fits.
    """

    def __init__(
        self, recipe: SourceRecipe, path: str, seed: int, quarantine: Quarantine | None,
        part: tuple[float, bool] = (0.0, False),
    ) -> None:  # fmt: skip
        self.table, self.seed = Table(recipe, path), seed
        kinds, families, names = self.table.scan()
        if quarantine is not None:
            self._report(np.flatnonzero(kinds == BAD).tolist(), quarantine)
        wanted = kinds == KINDS.index(recipe.kind)
        if recipe.families:
            wanted &= np.isin(families, [i for i, name in enumerate(names) if name in recipe.families])
        if part[0]:
            wanted &= held_out(len(wanted), part[0]) == part[1]
        self.indices = np.flatnonzero(wanted)
        if not len(self.indices):
            of = " that are held out" if part[0] and part[1] else ""
            of += f" of the families {', '.join(recipe.families)}" if recipe.families else ""
            raise ManifestError(f"{path}: no {recipe.kind} samples{of} in it; mend data.sources")
        self.epoch, self.position, self.patience = 0, 0, 2 * len(self.indices) - 1
        self._order: np.ndarray | None = None  # of this epoch, made by who draws: one process of a run

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
        order = np.argsort(indices, kind="stable")  # a search in order stays near in memory
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

    def find(self, index: int) -> Found:
        return self.table.find(index)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], min(state["position"], len(self.indices))
        self._order = None


class Source:
    """The samples of one data set that have the wanted kind and families, in an order that only the seed decides.

    Args:
        recipe: which part of which data set.
        processor: encodes a chat; its settings are part of the cache key.
        seed: of the order; every epoch has another.
        cache, quarantine: shared by all sources of a process.
        limit: tokens of a sample at most; videos and stills are made smaller to fit, what cannot be is quarantined.
            None: no limit.
        run: what `{run}` in the recipe's path stands for.
        report: whether this process writes down what is found bad when the data set is opened (one of them should).
        guard: knows the pictures of evaluations; samples that show one of them are quarantined.
        part: see `Shuffled`.
        max_bad_fraction: of the last `WINDOW` samples; with more of them bad, the run ends.

    Raises:
        ManifestError: no such data set, or nothing in it fits.
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
        self.recent: deque[bool] = deque(maxlen=WINDOW)  # of the last samples, whether they were bad
        self.causes: deque[str] = deque(maxlen=3)  # of the last bad ones
        self.bad: dict[int, str] = {}  # samples that could not be used, which are not tried again, and why

    @property
    def mark(self) -> dict[str, Any]:
        """What tells this data set from another copy: rows, files, bytes, and a checksum of parts of them."""
        return self.rows.mark

    def draw(self) -> int:
        """Number of the next sample, by the seed alone."""
        return int(self.draw_many(1)[0])

    def draw_many(self, count: int) -> np.ndarray:
        """Numbers of the next samples, int64 `[count]`, by the seed alone."""
        return self.rows.draw_many(count)

    def owner(self, index: int, ranks: int) -> int:
        """The rank that encodes sample `index`."""
        return int(self.owners(np.array([index]), ranks)[0])

    def owners(self, indices: np.ndarray, ranks: int) -> np.ndarray:
        """The ranks that encode samples, int64 `[n]`: the same in every epoch, so that their caches serve."""
        return self.rows.owners(indices, ranks)

    def result(self, good: bool) -> None:
        """`results` of one sample."""
        self.results(np.array([good]))

    def results(self, good: np.ndarray, causes: dict[int, str] | None = None) -> None:
        """Told of every drawn sample, in the order of the draws, whether it could be used.

        Args:
            good: bool `[n]`. causes: place in `good` → why it is bad.

        Raises:
            ManifestError: a whole epoch without a good one, or too many bad ones lately.
        """
        causes = causes or {}
        self.causes.extend(causes.values())
        self.recent.extend(place in causes for place in range(len(good)))
        run = int(good[::-1].argmax()) if good.any() else len(good)
        self.failures = run if good.any() else self.failures + run
        # The good ones may come first in one epoch and last in the next: with one of n, 2n − 2 bad in a row.
        if self.failures >= self.rows.patience:
            said = f"{self.name}: none of its samples can be used; see quarantine.jsonl for why"
            raise ManifestError(said + self._last())
        bad = sum(self.recent)
        # A data set of fewer rows would count the same bad ones in every epoch; `patience` ends that.
        if len(self.recent) == WINDOW <= self.rows.size and bad > self.max_bad_fraction * WINDOW:
            raise ManifestError(
                f"{self.name}: {bad} of its last {WINDOW} samples cannot be used, and data.max_bad_fraction allows "
                f"{self.max_bad_fraction:g} of them; mend the source or raise the fraction{self._last()}"
            )

    def _last(self) -> str:
        return f". The last reasons: {' | '.join(self.causes)}" if self.causes else ""

    def items(self, index: int) -> list[Item]:
        """What sample `index` gives, encoded or from the cache: one item, the parts of a long text, or nothing when it
        is bad, which is then in the quarantine."""
        if index in self.bad:
            return []
        key = (self.path, index, self.settings)
        items = self.cache.get(key)
        if items is None:
            items = self._encode(index)
            if items and not self.recipe.streaming:  # a stream gives every sample a new number: none comes again
                self.cache.put(key, items)
        return [replace(item, source=self.name) for item in items]

    def item(self, index: int) -> Item | None:
        """Sample `index`, of a split text the first part; None when it is bad."""
        return next(iter(self.items(index)), None)

    def _encode(self, index: int) -> list[Item]:
        try:
            found = self.rows.find(index)
        except ManifestError as error:  # it has become shorter or other since it was opened, or since the checkpoint
            return self._bad(index, self.path, index + 1, str(error))
        if found is None:
            return []
        try:
            return self._items(found, index)
        except KeyeError as error:
            return self._bad(index, found.file, found.line, str(error))
        except Exception as error:  # a template, a decoder or an image library may raise anything at odd content
            return self._bad(index, found.file, found.line, f"{type(error).__name__}: {error}")

    def _bad(self, index: int, file: str, line: int, reason: str) -> list[Item]:
        self.quarantine.add(file, line, reason)
        self.bad[index] = f"{file} line {line}: {reason}"[:REASON]
        return []

    def _items(self, found: Found, index: int) -> list[Item]:
        row = self._transformed(found, index)
        messages = row["messages"]
        long = self.limit is not None and is_plain_text(messages)
        sample = self.processor.sample(messages, found.base, max_length=None if long else self.limit)
        if not bool((sample.labels[1:] != -100).any()):
            raise ManifestError("the assistant says nothing; add an assistant message")
        self.warnings.add(found.file, found.line, sample.all_warnings)
        like = self.guard.like(sample) if self.guard is not None else None
        if like is not None:
            raise ManifestError(like)
        caption = row.get("caption") or caption_of(messages)
        parts = split(sample, self.limit) if long else [sample]
        return [
            packed(Item(part, self.name, index, self.recipe.kind, caption, number)) for number, part in enumerate(parts)
        ]

    def _transformed(self, found: Found, index: int) -> Row:
        if not self.recipe.transforms:
            return found.row
        chance = random.Random(f"{self.seed}:{index}")

        def pick() -> Row:
            """Another sample; one that is bad is as good as the own one, which no transform takes twice."""
            indices = self.rows.indices
            try:
                return located(self.rows.find(int(indices[chance.randrange(len(indices))])))
            except ManifestError:
                return found.row

        return apply(self.recipe.transforms, located(found), chance, pick)

    def state_dict(self) -> dict[str, Any]:
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state)


def located(found: Found) -> Row:
    """The row with its relative paths beside its file, so that rows of several files can be put together."""

    def locate(part: Row) -> Row:
        paths = {name: part.get(name) for name in (part["type"], "path") if name != "text"}
        relative = {name: path for name, path in paths.items() if isinstance(path, str) and not scheme_of(path)}
        return {**part, **{name: str((Path(found.base) / path).absolute()) for name, path in relative.items()}}

    return {**found.row, "messages": each_part(found.row["messages"], locate)}
