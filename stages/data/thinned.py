"""What samples gave up to fit, and the warnings they came with: counted every step, the first of each kind logged."""

import logging
import re
import threading
from collections.abc import Iterable

from stages.data.items import Item

COUNTS = ("thinned", "thinned_tokens", "warned")
KINDS = 20  # of warnings that a source logs; data with more kinds than that would fill the log


def count_thinned(items: Iterable[Item]) -> dict[str, int]:
    """Of the items of a batch: those that were made smaller to fit the context (`thinned`), the visual tokens that they
    gave up for it (`thinned_tokens`), and those that came with any warning (`warned`)."""
    counts = dict.fromkeys(COUNTS, 0)
    for item in items:
        counts["thinned"] += item.sample.thinned > 0
        counts["thinned_tokens"] += item.sample.thinned
        counts["warned"] += bool(item.sample.all_warnings)
    return counts


def kind_of_warning(sentence: str) -> str:
    """A sentence without the paths and numbers in it, which differ from sample to sample."""
    return re.sub(r"(\S*/\S+|\S+\.[A-Za-z]\w{1,4}\b|\d[\d,.]*)", "…", sentence)


class WarningLog:
    """Logs the first warning of each kind and no other. Threads may share it."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._lock = threading.Lock()

    def add(self, file: str, line: int, sentences: Iterable[str]) -> None:
        """The warnings of one sample; `line` counts from 1."""
        for sentence in sentences:
            kind = kind_of_warning(sentence)
            with self._lock:
                if kind in self.seen or len(self.seen) >= KINDS:
                    continue
                self.seen.add(kind)
            message = "%s line %d: %s (the first of its kind; metrics.jsonl counts them)"
            logging.getLogger("stages").warning(message, file, line, sentence)
