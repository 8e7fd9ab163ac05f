"""Items: encoded samples with their origin, the counts of a batch, and a cache of encoded samples in RAM."""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from keye.processor.processor import Sample

PIXELS = ("pixel_values", "pixel_values_videos")
COUNTS = ("thinned", "thinned_tokens", "warned")


@dataclass(frozen=True)
class Item:
    """One encoded sample, its origin (`source`, `index`, `part`: enough to encode it again) and its caption."""

    sample: Sample
    source: str
    index: int
    kind: str
    caption: str
    part: int = 0  # of a document that was split because it is longer than the context

    @property
    def tokens(self) -> int:
        return len(self.sample.input_ids)


def count_thinned(items: Iterable[Item]) -> dict[str, int]:
    """Counts of a batch.

    thinned: items that were made smaller to fit the context. thinned_tokens: visual tokens that they lost by it.
    warned: items with any warning.
    """
    counts = dict.fromkeys(COUNTS, 0)
    for item in items:
        counts["thinned"] += item.sample.thinned > 0
        counts["thinned_tokens"] += item.sample.thinned
        counts["warned"] += bool(item.sample.all_warnings)
    return counts


class Cache:
    """Encoded samples in RAM up to `limit` bytes, shared by threads; the least recently used make room.

    An entry has the items of one row: a single one, or the parts of a document that was split.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.entries: OrderedDict[Any, tuple[list[Item], int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> list[Item] | None:
        with self._lock:
            if key not in self.entries:
                return None
            self.entries.move_to_end(key)
            return self.entries[key][0]

    def put(self, key: Any, items: list[Item]) -> None:
        tensors = [value for item in items for value in vars(item.sample).values() if isinstance(value, Tensor)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        with self._lock:
            if key in self.entries or size > self.limit:
                return
            self.entries[key] = (items, size)
            self.used += size
            while self.used > self.limit:
                self.used -= self.entries.popitem(last=False)[1][1]
