"""Streams: a data set read sequentially, divided into lanes that do not depend on the number of ranks.

A lane is a group of the data set's shards (its files), read in order, shuffled in a buffer, and read again at its end.
Sample `o` of a stream of `n` lanes is sample `o // n` of lane `o % n` on every rank.
"""

import logging
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keye.errors import KeyeError, ManifestError
from stages.data.quarantine import Quarantine
from stages.data.recipe import SourceRecipe
from stages.data.sources.chat import EmptyRow, Row, as_chat, kind_of
from stages.data.sources.formats import LocatedRow, files_of, format_of, hub_name, marks, opened, parse_line
from stages.data.sources.tars import stream_tars, tar_row

MAX_LANES = 64  # each lane has an open file and a full buffer
KEPT = 512  # rows of all lanes kept after reading, for threads that request them out of order
PATIENCE = 1000  # consecutive bad samples per lane after which the source is given up
WINDOW = 1000  # last samples of a source whose share of bad ones is limited


class StreamLanes:
    """The rows of a stream that have the wanted kind and families.

    Args:
        recipe: of the data set.
        path: the recipe's path with `{run}` replaced.
        seed: of the shuffling.
        quarantine: for the rows that cannot be read.
        max_bad_fraction: of the last `WINDOW` rows of a lane.

    Raises:
        ManifestError: there is no such data set, or it cannot be streamed.
    """

    size = 1 << 62  # rows in an epoch: unknown

    def __init__(
        self, recipe: SourceRecipe, path: str, seed: int, quarantine: Quarantine, max_bad_fraction: float = 0.5
    ) -> None:
        self.stream, self.kind = open_stream(recipe, path)
        files = [] if self.kind == "hub" else files_of(self.kind, path)
        self.mark = {"lanes": self.stream.num_shards, **marks(files)}
        count = min(self.stream.num_shards, MAX_LANES)
        parts = [self.stream.shard(count, lane) for lane in range(count)]
        self.lanes = [
            _Lane(
                part,
                self.kind,
                recipe,
                f"{path} (lane {i})",
                f"{seed}:{i}",
                max(8, KEPT // count),
                quarantine,
                max_bad_fraction,
            )  # fmt: skip
            for i, part in enumerate(parts)
        ]
        self.base = "." if "://" in path else path if Path(path).is_dir() else str(Path(path).parent)
        self.drawn, self.patience = 0, PATIENCE * count

    def draw_many(self, count: int) -> np.ndarray:
        self.drawn += count
        return np.arange(self.drawn - count, self.drawn)

    def owners(self, indices: np.ndarray, ranks: int) -> np.ndarray:
        # With fewer lanes than ranks several ranks read the same lane, each for the samples that it encodes.
        return (indices if len(self.lanes) < ranks else indices % len(self.lanes)) % ranks

    def find(self, index: int) -> LocatedRow | None:
        """Sample `index`; None if its lane has no wanted row.

        Raises:
            KeyeError: the stream failed.
        """
        lane = self.lanes[index % len(self.lanes)]
        found = lane.row(index // len(self.lanes))
        return None if found is None else LocatedRow(found[1], lane.name, found[0], self.base)

    def place(self, index: int) -> tuple[str, int]:
        """The name of the lane of sample `index`, and its number in it, from 1."""
        return self.lanes[index % len(self.lanes)].name, index // len(self.lanes) + 1

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


class _Lane:
    """The rows of one lane by number, read forward; a request for a row no longer kept starts the lane again."""

    def __init__(
        self, part: Any, kind: str, recipe: SourceRecipe, name: str, seed: str, window: int, quarantine: Quarantine,
        max_bad_fraction: float,
    ) -> None:  # fmt: skip
        self.part, self.kind, self.recipe, self.name, self.seed = part, kind, recipe, name, seed
        self.quarantine, self.window, self.empty = quarantine, window, False
        self.max_bad_fraction = max_bad_fraction
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        self._rows, self._at, self._recent = self._endless(), 0, OrderedDict()

    def row(self, number: int) -> tuple[int, Row] | None:
        """The lane's sample `number` (from 0): (number of its row in the lane's epoch from 1, row)."""
        with self._lock:
            if number < self._at and number not in self._recent:
                self._start()
            while self._at <= number and not self.empty:
                try:
                    row = next(self._rows)
                except KeyeError:
                    raise
                except Exception as error:  # file systems, networks and decoders raise their own classes
                    self._start()
                    raise KeyeError(
                        f"{self.name}: the stream failed ({type(error).__name__}: {error}); repeat the command, which "
                        "resumes from the last checkpoint"
                    ) from error
                if row is None:
                    self.empty = True
                    logging.getLogger("stages").warning("%s has no %s rows", self.name, self.recipe.kind)
                    break
                self._recent[self._at] = row
                self._at += 1
                if len(self._recent) > self.window:
                    self._recent.popitem(last=False)
            return self._recent.get(number)

    def _endless(self) -> Iterator[tuple[int, Row] | None]:
        epoch = 0
        while True:
            found = False
            for row in _shuffled(self._wanted(), self.recipe.shuffle, random.Random(f"{self.seed}:{epoch}")):
                found = True
                yield row
            if not found:
                yield None
            epoch += 1

    def _wanted(self) -> Iterator[tuple[int, Row]]:
        """The rows of one epoch with the wanted kind and families; rows that cannot be read go to the quarantine.

        Raises:
            KeyeError: too many of the last rows cannot be read.
        """
        recent: deque[bool] = deque(maxlen=WINDOW)
        for number, raw in enumerate(self.part, start=1):
            try:
                row = as_chat(_read(self.kind, raw), dict(self.recipe.columns))
            except EmptyRow:
                continue
            except ManifestError as error:
                self.quarantine.add(self.name, number, str(error))
                recent.append(True)
                if len(recent) == WINDOW and sum(recent) > self.max_bad_fraction * WINDOW:
                    raise KeyeError(
                        f"{self.name}: {sum(recent)} of the last {WINDOW} rows cannot be read, and "
                        f"data.max_bad_fraction allows {self.max_bad_fraction:g} of them; correct the source or raise "
                        f"the fraction. The last reason: {error}"
                    ) from None
                continue
            recent.append(False)
            families = self.recipe.families
            if kind_of(row["messages"]) == self.recipe.kind and (not families or row.get("family") in families):
                yield number, row


def _read(kind: str, raw: Row) -> Row:
    if kind == "webdataset":
        return tar_row(raw["members"])
    return parse_line(raw["text"]) if kind == "jsonl" else raw


def _shuffled(rows: Iterator[Any], size: int, chance: random.Random) -> Iterator[Any]:
    """The rows in an order that is random within `size` of them."""
    buffer: list[Any] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        place = chance.randrange(size)
        buffer[place], row = row, buffer[place]
        yield row
    chance.shuffle(buffer)
    yield from buffer


def open_stream(recipe: SourceRecipe, path: str) -> tuple[Any, str]:
    """The data set as a `datasets.IterableDataset` with undecoded media, and its format.

    Raises:
        ManifestError: there is no such data set, or it cannot be streamed.
    """
    import datasets

    kind = format_of(recipe, path)
    if kind == "json":
        raise ManifestError(f"{path}: a JSON manifest is one list and cannot be streamed; write it as JSONL")
    if kind == "hub":
        more = {"name": recipe.config or None, "split": recipe.split, "streaming": True}
        return opened(path, lambda: datasets.load_dataset(hub_name(path), **more)).decode(False), kind
    files = files_of(kind, path)
    if kind == "webdataset":
        return datasets.IterableDataset.from_generator(stream_tars, gen_kwargs={"files": files}), kind
    builder, more = ("text", {"encoding_errors": "replace"}) if kind == "jsonl" else ("parquet", {})
    read = opened(path, lambda: datasets.load_dataset(builder, data_files=files, split="train", streaming=True, **more))
    return (read if kind == "jsonl" else read.decode(False)), kind
