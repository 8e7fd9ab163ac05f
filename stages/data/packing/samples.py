"""Properties of encoded samples as columns: a step of tens of thousands of short texts is a few arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

import numpy as np

from stages.data.items import Item
from stages.data.packing.balance import Cost, TowerCost


@dataclass(frozen=True)
class Meta:
    """Properties of one encoded sample.

    source, index, part: its origin; a document that was split has several parts. labels: tokens with a label. stills,
    frames: (height, width) in patches of each, in stream order. excess: see `Cost`.
    """

    source: str
    index: int
    kind: str
    tokens: int
    labels: int
    stills: tuple[tuple[int, int], ...]
    frames: tuple[tuple[int, int], ...]
    excess: int
    part: int = 0

    @classmethod
    def of(cls, item: Item, cost: Cost | TowerCost) -> Self:
        """The properties of an item."""
        sample = item.sample
        stills, frames = (
            () if grid is None else tuple((height, width) for _, height, width in grid.tolist())
            for grid in (sample.image_grid_thw, sample.video_grid_thw)
        )
        labels = int((sample.labels[1:] != -100).sum())
        excess = cost.excess(item.tokens, labels, [*stills, *frames])
        return cls(item.source, item.index, item.kind, item.tokens, labels, stills, frames, excess, item.part)


class Block(NamedTuple):
    """Samples that were drawn together. source: place in `Mixture.names` int16 `[n]`. index: int64 `[n]`.

    part: int32 `[n]`, the wanted part of a split document, or -1 for all parts.
    """

    source: np.ndarray
    index: np.ndarray
    part: np.ndarray

    def __len__(self) -> int:
        return len(self.source)


@dataclass
class Samples:
    """Encoded samples as columns of one length N.

    source: int16, place in `Mixture.names`. index: int64. part: int32. tokens, excess: int64, see `Meta`. stills:
    int32, how many of the rows of `sizes` are stills; the others are frames. sizes: objects, int32 `[F, 2]` of each.
    """

    source: np.ndarray
    index: np.ndarray
    part: np.ndarray
    tokens: np.ndarray
    excess: np.ndarray
    stills: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: np.ndarray) -> Self:
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All samples of several, in order."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @classmethod
    def none(cls) -> Self:
        """No samples."""
        return cls(**{field.name: np.zeros(0, _TYPES[field.name]) for field in fields(cls)})

    @property
    def refs(self) -> list[tuple[int, int, int]]:
        """(source, index, part) of each."""
        return list(zip(self.source.tolist(), self.index.tolist(), self.part.tolist(), strict=True))


@dataclass
class Encoded(Samples):
    """The encoded samples of a block. place: int64, each sample's place in the block, rising; a bad one has no row."""

    place: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], metas: Sequence[Meta | None]) -> Self:
        """One entry for each drawn sample of a block; None for a bad one."""
        return cls.of_rows(names, [(place, meta) for place, meta in enumerate(metas) if meta is not None])

    @classmethod
    def of_rows(cls, names: Sequence[str], rows: Sequence[tuple[int, Meta]]) -> Self:
        """(place in the block, properties) of each sample; several rows of one place are parts of one document."""
        places = {name: place for place, name in enumerate(names)}
        sizes = np.empty(len(rows), object)
        for row, (_, meta) in enumerate(rows):
            sizes[row] = np.array([*meta.stills, *meta.frames], np.int32).reshape(-1, 2)
        columns = {
            "source": [places[meta.source] for _, meta in rows],
            "index": [meta.index for _, meta in rows],
            "part": [meta.part for _, meta in rows],
            "tokens": [meta.tokens for _, meta in rows],
            "excess": [meta.excess for _, meta in rows],
            "stills": [len(meta.stills) for _, meta in rows],
            "place": [place for place, _ in rows],
        }
        return cls(**{name: np.array(values, _TYPES[name]) for name, values in columns.items()}, sizes=sizes)


@dataclass
class Pool(Samples):
    """Samples that wait, oldest first. kind: int16, place in the planner's kinds. born: int64, the step before which
    each was added."""

    kind: np.ndarray
    born: np.ndarray


class Step(NamedTuple):
    """The packs of a step. samples: of all packs, one pack after the other. starts: int64 `[packs + 1]`."""

    samples: Samples
    starts: np.ndarray

    def packs(self) -> list[Samples]:
        """The samples of each pack."""
        return [self.samples[a:b] for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]


_TYPES = {
    "source": np.int16, "index": np.int64, "part": np.int32, "tokens": np.int64, "excess": np.int64,
    "stills": np.int32, "sizes": object, "place": np.int64, "kind": np.int16, "born": np.int64,
}  # fmt: skip
