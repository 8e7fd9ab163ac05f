"""Sources: a data set of chats → encoded samples, one after the other, for ever; a bad one never stops a run.

Every rank holds the same sources and draws the same numbers from them; a sample is read and encoded only by its owner.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keye.errors import KeyeError, ManifestError
from keye.prompt.processor import KeyeProcessor
from stages.data.formats import BAD, Table, caption_of
from stages.data.items import Cache, Item, Quarantine
from stages.recipe import KINDS, SourceRecipe


class Source:
    """The samples of one data set that have the wanted kind and families, in an order that only the seed decides.

    Args:
        recipe: which part of which data set.
        processor: encodes a chat; its settings are part of the cache key.
        seed: of the order; every epoch has another.
        cache, quarantine: shared by all sources of a process.
        shard: (i, n): `next` gives this process what rank i of n owns.
        limit: tokens of a sample at most; videos and stills are made smaller to fit, what cannot be is quarantined.
        run: what `{run}` in the recipe's path stands for.
        report: whether this process writes down what is found bad when the data set is opened (one of them should).

    Raises:
        ManifestError: no such file, or nothing in it fits.
    """

    def __init__(
        self,
        recipe: SourceRecipe,
        processor: KeyeProcessor,
        seed: int,
        cache: Cache,
        quarantine: Quarantine,
        shard: tuple[int, int] = (0, 1),
        limit: int = 1 << 30,
        run: str = "",
        report: bool = True,
    ) -> None:
        self.recipe, self.processor, self.seed, self.limit = recipe, processor, seed, limit
        self.cache, self.quarantine, self.shard = cache, quarantine, shard
        # Checkpoints know a source by its name, so the name stays when the run's folder moves.
        self.path = recipe.path.replace("{run}", run)
        self.name = f"{recipe.path}#{recipe.kind}" + "".join(f"+{family}" for family in recipe.families)
        self.settings = json.dumps([processor.encoder, processor.image, limit], sort_keys=True)
        self.table = Table(recipe, self.path)
        self.indices = self._wanted(report and shard[0] == 0)
        if len(self.indices) < shard[1]:
            raise ManifestError(
                f"{self.path}: only {len(self.indices)} {recipe.kind} samples of families "
                f"{', '.join(recipe.families) or '(any)'} for {shard[1]} readers; give more or mend data.sources"
            )
        self.epoch, self.position, self.failures = 0, 0, 0
        self._order = self._shuffled(0)

    def _wanted(self, report: bool) -> np.ndarray:
        """Numbers of the rows that this source serves, int64 `[n]`, rising."""
        kinds, families, names = self.table.scan()
        if report:
            for index in np.flatnonzero(kinds == BAD).tolist():
                self._read(index)
        wanted = kinds == KINDS.index(self.recipe.kind)
        if self.recipe.families:
            wanted &= np.isin(families, [i for i, name in enumerate(names) if name in self.recipe.families])
        return np.flatnonzero(wanted)

    def _shuffled(self, epoch: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.indices), generator=generator).numpy()

    def draw(self) -> int:
        """Number of the next sample, by the seed alone: the same on every rank, however many there are."""
        if self.position == len(self.indices):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._shuffled(self.epoch)
        self.position += 1
        return int(self.indices[self._order[self.position - 1]])

    def owner(self, index: int, ranks: int) -> int:
        """The rank that encodes sample `index`: the same in every epoch, so that its cache serves."""
        return int(np.searchsorted(self.indices, index)) % ranks

    def result(self, good: bool) -> None:
        """Told of every drawn sample, in the order of the draws, whether it could be used.

        Raises:
            ManifestError: a whole epoch without a good one.
        """
        self.failures = 0 if good else self.failures + 1
        # The good ones may come first in one epoch and last in the next: with one of n, 2n − 2 bad in a row.
        if self.failures >= 2 * len(self.indices) - 1:
            raise ManifestError(
                f"{self.name}: none of its {len(self.indices)} samples can be used; see quarantine.jsonl for why"
            )

    def next(self) -> Item:
        """The next good sample of those that this process owns; bad ones are quarantined and passed over."""
        while True:
            index = self.draw()
            if self.owner(index, self.shard[1]) == self.shard[0]:
                item = self.item(index)
                self.result(item is not None)
                if item is not None:
                    return item

    def item(self, index: int) -> Item | None:
        """Sample `index`, encoded or from the cache; None when it is bad, which is then in the quarantine."""
        if self.table.place(index) in self.quarantine.seen:
            return None
        key = (self.path, index, self.settings)
        item = self.cache.get(key)
        if item is None:
            item = self._encode(index)
            if item is None:
                return None
            self.cache.put(key, item)
        return replace(item, source=self.name)

    def _read(self, index: int) -> dict[str, Any] | None:
        try:
            return self.table.row(index)
        except ManifestError as error:
            self.quarantine.add(*self.table.place(index), str(error))
            return None

    def _encode(self, index: int) -> Item | None:
        row = self._read(index)
        if row is None:
            return None
        file, line = self.table.place(index)
        try:
            sample = self.processor.sample(row["messages"], Path(file).parent, max_length=self.limit)
            if not bool((sample.labels[1:] != -100).any()):
                raise ManifestError("the assistant says nothing; add an assistant message")
            return Item(sample, self.name, index, self.recipe.kind, caption_of(row["messages"]))
        except KeyeError as error:
            self.quarantine.add(file, line, str(error))
        except Exception as error:  # a template, a decoder or an image library may raise anything at odd content
            self.quarantine.add(file, line, f"{type(error).__name__}: {error}")
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], min(state["position"], len(self.indices))
        self._order = self._shuffled(self.epoch)
