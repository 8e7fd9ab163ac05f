"""Results of encoding many videos: what was made of each, and why some failed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from keye import errors
from keye.encoded import EncodedVideo
from keye.slowfast.plan import VideoPlan


@dataclass(frozen=True)
class Failure:
    """A video that could not be encoded.

    index: its position among the sources. source: its name. reason: a sentence. kind: the name of the error's class.
    """

    index: int
    source: str
    reason: str
    kind: str = "VideoError"

    @classmethod
    def of(cls, index: int, source: object, kind: str, reason: str) -> "Failure":
        """The failure of a source of any type."""
        path = isinstance(source, str | os.PathLike)
        return cls(index, os.fspath(source) if path else f"source {index} ({type(source).__name__})", reason, kind)

    def raise_(self) -> None:
        """Raise the KeyeError that the video caused; other errors are raised as a VideoError."""
        kind = getattr(errors, self.kind, None)
        known = isinstance(kind, type) and issubclass(kind, errors.KeyeError)
        raise (kind if known else errors.VideoError)(self.reason)


class Done(NamedTuple):
    """A finished source, with a result or a failure. index: its position among the sources."""

    index: int
    source: object
    result: VideoPlan | EncodedVideo | None
    failure: Failure | None


@dataclass(frozen=True)
class Results(Sequence):
    """The results of all sources in their order, None for failed ones, and the failures in the same order."""

    items: list[VideoPlan | EncodedVideo | None]
    failures: list[Failure]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    @property
    def succeeded(self) -> list[VideoPlan | EncodedVideo]:
        """The results without the failed ones; positions differ from those of the sources."""
        return [item for item in self.items if item is not None]

    def summary(self) -> str:
        """A line about all sources, then a line for each failure, in plain text."""
        plans = [item if isinstance(item, VideoPlan) else item.plan for item in self.succeeded]
        line = f"{len(plans)} of {len(self)} videos, {sum(plan.tokens for plan in plans):,} tokens"
        failed = [f"failed: {failure.source}: {failure.reason}" for failure in self.failures]
        return "\n".join([line, *failed])


def sentence(error: BaseException) -> str:
    """An error as one line: the message of a KeyeError, type and message of others."""
    if isinstance(error, errors.KeyeError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
