"""The data of a run: sources of samples, and a world that is drawn for it, as tables of a recipe."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict


class WorldSettings(TypedDict, total=False):
    size: tuple[int, ...]
    duration: float
    difficulty: float | dict[str, float]
    fps: int
    workers: int
    progress: bool


@dataclass(frozen=True)
class SourceRecipe:
    """One manifest or data set of chats, or the part of it that has these families and this kind."""

    path: str
    """A file, folder, glob, URL or `hf://owner/name`. `{run}` is replaced by the directory of the run. A relative
    path is relative to the recipe's folder or, where that has no such file, to the working directory."""

    kind: str
    """Kind of its rows: "video", "image" or "text"; rows of other kinds are skipped."""

    families: tuple[str, ...] = ()
    """Families of questions that are read; empty = all."""

    weight: float = 1.0
    """Share within its kind."""

    stages: tuple[str, ...] = ()
    """Stages that read it; empty = all but `vision`, which reads only sources that name it."""

    first_tokens: int = 0
    """Tokens of it that each of its stages reads before the mixture begins: a first lesson (curriculum)."""

    format: str = ""
    """One of "jsonl", "json", "parquet", "webdataset" or "hub"; empty = by the ending of the path."""

    config: str = ""
    """Configuration of a data set of the hub."""

    split: str = "train"
    """Split of a data set of the hub."""

    columns: dict[str, str] = field(default_factory=dict)
    """Field of the chat form → the data set's column with it, see `stages.data.sources.chat`."""

    streaming: bool = False
    """Stream it instead of storing it on disk."""

    shuffle: int = 256
    """Rows of the shuffle buffer of a lane of a stream."""

    transforms: tuple[str, ...] = ()
    """Names in `stages.data.sources.transforms`, applied in this order."""


@dataclass(frozen=True)
class WorldRecipe:
    """A SlowFastWorld that is drawn into `{run}/world` before training."""

    counts: dict[str, int]
    """Family → training samples."""

    heldout: dict[str, int] = field(default_factory=dict)
    """Family → held-out samples."""

    seed: int = 0
    """Seed of the world."""

    settings: WorldSettings = field(default_factory=dict)
    """Further arguments of `keye.world.generate`, see there."""


@dataclass(frozen=True)
class DataRecipe:
    """The sources of samples."""

    sources: tuple[SourceRecipe, ...]
    """Data sets for training."""

    world: WorldRecipe | None = None
    """The world to draw; None: no world."""

    cache_mb: int = 1024
    """Host memory in MB that a process may use for encoded samples, so that each is decoded once."""

    workers: int = 0
    """Threads of a process that decode and encode; 0 = the process's share of the machine's cores less one."""

    max_bad_fraction: float = 0.5
    """A source ends the run when more of its last 1,000 samples cannot be used."""

    decontaminate_against: tuple[str, ...] = field(default=(), metadata={"former": "not_like"})
    """Manifests of evaluations; samples that show one of their pictures are skipped."""

    decontaminate_bits: int = field(default=6, metadata={"former": "not_like_bits"})
    """Largest distance between such pictures, in bits of a perceptual hash of 64."""

    heldout: tuple[SourceRecipe, ...] = ()
    """Sources for the stages' held-out loss, which are not trained on."""

    heldout_fraction: float = 0.0
    """Instead of `heldout`: share of the rows of each source that is held out, chosen by row number."""


def located(data: DataRecipe, base: Path) -> DataRecipe:
    """The data of a recipe in the folder `base`, with absolute paths, see `SourceRecipe.path`."""
    sources = {
        key: tuple(dataclasses.replace(s, path=_located(s.path, base, s.format)) for s in getattr(data, key))
        for key in ("sources", "heldout")
    }
    others = tuple(_located(other, base) for other in data.decontaminate_against)
    return dataclasses.replace(data, decontaminate_against=others, **sources)


def _located(path: str, base: Path, kind: str = "") -> str:
    """A source's path, absolute; see `SourceRecipe.path`."""
    if kind == "hub" or path.startswith("{run}") or "://" in path or Path(path).is_absolute():
        return path
    found = (base / path).exists() or any(base.glob(path))
    return str((base / path if found else Path(path)).absolute())
