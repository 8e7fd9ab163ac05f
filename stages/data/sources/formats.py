"""Formats: manifests and data sets, local or remote, as memory-mapped rows by number; no row stays in RAM.

The formats are JSONL (one bad line does not affect the others), JSON, Parquet, WebDataset tars and data sets of the
hub: see docs/stages.md, "Data". Rows are in the chat form of `stages.data.sources.chat`; media are not decoded here.
"""

import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from keye.errors import ManifestError
from stages.data.recipe import SourceRecipe
from stages.data.sources.chat import EmptyRow, Row, as_chat, kind_of
from stages.data.sources.parquet import GROUP, GROUP_ROWS, SCANNED, Parquet, outlines
from stages.data.sources.stored import arrays_of, kept, kept_array
from stages.data.sources.tars import Tar
from stages.recipe_checks import KINDS

BAD, EMPTY = 254, 255  # codes of rows; others are places in KINDS
CHECKED = 4096  # bytes at the start and at the end of a file that are compared between machines
SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonl.gz": "jsonl", ".jsonl.zst": "jsonl", ".json": "json",
    ".parquet": "parquet", ".tar": "webdataset",
}  # fmt: skip


class LocatedRow(NamedTuple):
    """A row in the chat form, its file, its line there from 1, and the folder of its relative paths."""

    row: Row
    file: str
    line: int
    base: str


class Part(Protocol):
    """One file of a data set. file: its name in messages. mark: identifies its content."""

    file: str
    mark: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> Row:
        """The row as it is in the file; ManifestError if it cannot be read, EmptyRow if it is empty."""

    def outlines(self) -> Iterator[Row | ManifestError]:
        """All rows with placeholders for media, or the error that `read` raises."""


class Lines:
    """Lines of JSON in a data set of `datasets`."""

    def __init__(self, file: str, rows: Any) -> None:
        self.file, self.mark, self.rows = file, rows._fingerprint, rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Row:
        return parse_line(self.rows[index : index + 1]["text"][0].as_py())

    def outlines(self) -> Iterator[Row | ManifestError]:
        for at in range(0, len(self.rows), SCANNED):
            for line in self.rows[at : at + SCANNED]["text"].to_pylist():
                try:
                    yield parse_line(line)
                except ManifestError as error:
                    yield error


class Columns:
    """Rows with columns in a data set of `datasets`: of the hub, or Parquet with large row groups."""

    def __init__(self, file: str, rows: Any) -> None:
        self.file, self.mark, self.rows = file, rows._fingerprint, rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Row:
        return self.rows[index : index + 1].to_pylist()[0]

    def outlines(self) -> Iterator[Row | ManifestError]:
        for at in range(0, len(self.rows), SCANNED):
            yield from outlines(self.rows[at : at + SCANNED])


class Table:
    """The rows of a map-style data set.

    Args:
        recipe: of the data set.
        path: the recipe's path with `{run}` replaced.

    Raises:
        ManifestError: there is no such file, or it is not in its format.
    """

    def __init__(self, recipe: SourceRecipe, path: str) -> None:
        self.columns = dict(recipe.columns)
        self.parts = open_parts(recipe, path)
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _part(self, index: int) -> tuple[Part, int]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        if not 0 <= part < len(self.parts):
            raise ManifestError(f"row {index + 1} no longer exists; the data set has {len(self)} rows")
        return self.parts[part], index - int(self.starts[part])

    def place(self, index: int) -> tuple[str, int]:
        """The file of a row, and its line in it, from 1."""
        part, at = self._part(index)
        return part.file, at + 1

    def find(self, index: int) -> LocatedRow:
        """Row `index` with its media not yet decoded.

        Raises:
            ManifestError: it is not in the chat form.
        """
        part, at = self._part(index)
        base = "." if "://" in part.file else str(Path(part.file).parent)
        return LocatedRow(as_chat(part.read(at), self.columns), part.file, at + 1, base)

    def scan(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Every row's kind (place in KINDS, BAD or EMPTY) uint8 `[N]`, family int32 `[N]`, and the families' names.

        Computed once per data set and stored next to the cache of `datasets`; other processes wait for the first.
        """
        saved = self._scanned()
        return saved["kinds"], saved["families"], saved["names"].tolist()

    def bad(self) -> list[int]:
        """The rows that cannot be read."""
        return np.flatnonzero(self._scanned()["kinds"] == BAD).tolist()

    def choose(self, settings: Any, choose: Callable[[], np.ndarray]) -> np.ndarray:
        """Numbers of rows, int64 ascending, as a mapped file whose pages the processes of a machine share.

        Args:
            settings: plain values on which the choice depends in addition to the data set.
            choose: makes the choice; the first process calls it, once for a data set and settings.
        """

        def write(path: str) -> None:
            chosen = choose()
            with open(path, "wb") as out:
                np.save(out, chosen.astype(np.int64))

        read = partial(np.load, mmap_mode="r")
        return kept_array("rows", json.dumps([self._mark, settings]), ".npy", write, read)

    @property
    def _mark(self) -> str:
        return json.dumps([[part.mark for part in self.parts], self.columns], sort_keys=True)

    def _scanned(self) -> dict[str, np.ndarray]:
        """The stored result of `scan`."""

        def write(path: str) -> None:
            kinds, families, names = self._scan()
            with open(path, "wb") as out:
                np.savez(out, kinds=kinds, families=families, names=np.array(names, dtype=str))

        return kept_array("kinds", self._mark, ".npz", write, arrays_of)

    def _scan(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        kinds, families = np.full(len(self), BAD, np.uint8), np.zeros(len(self), np.int32)
        names: dict[str, int] = {"": 0}
        for at, row in enumerate(row for part in self.parts for row in part.outlines()):
            if isinstance(row, EmptyRow):
                kinds[at] = EMPTY
            if isinstance(row, ManifestError):
                continue
            try:
                chat = as_chat(row, self.columns)
            except ManifestError:
                continue
            kinds[at] = KINDS.index(kind_of(chat["messages"]))
            families[at] = names.setdefault(str(chat.get("family", "")), len(names))
        return kinds, families, list(names)


def format_of(recipe: SourceRecipe, path: str) -> str:
    """ "jsonl", "json", "parquet", "webdataset" or "hub": from the recipe, else from the name."""
    if recipe.format:
        return recipe.format
    if re.fullmatch(r"hf://(?!datasets/)[\w.-]+/[\w.-]+", path):
        return "hub"
    if path.endswith((".csv", ".tsv")):
        raise ManifestError(f"{path}: tables of text are not supported; write Parquet or JSONL: {', '.join(SUFFIXES)}")
    if Path(path).is_dir():
        found = [SUFFIXES[s] for s in SUFFIXES if any(Path(path).rglob(f"*{s}"))]
        if not found:
            raise ManifestError(f"{path}: no data file in this folder; supported are {', '.join(SUFFIXES)}")
        return found[0]
    return next((SUFFIXES[s] for s in sorted(SUFFIXES, key=len, reverse=True) if path.endswith(s)), "jsonl")


def files_of(kind: str, path: str) -> list[str]:
    """The files of a path, glob, folder or URL of one format, sorted by name.

    Raises:
        ManifestError: there is none.
    """
    from datasets.data_files import resolve_pattern

    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        found = {str(file) for s in SUFFIXES if SUFFIXES[s] == kind for file in Path(path).rglob(f"*{s}")}
    elif "://" not in path and not set(path) & set("*?["):
        found = set()
    else:
        try:
            found = set(resolve_pattern(path, os.getcwd()))
        except FileNotFoundError:
            found = set()
        except Exception as error:  # file systems raise their own classes
            raise ManifestError(f"{path}: cannot be listed ({type(error).__name__}: {error})") from None
    if not found:
        raise ManifestError(f"{path}: no such manifest; check the path, or correct data.sources in the recipe")
    return sorted(found)


def marks(files: list[str]) -> dict[str, Any]:
    """The number of files, their bytes, and a checksum of their names and of the start and end of each local one.

    Folders do not count, because machines may have their copies in different places.
    """
    total, crc = 0, 0
    for file in files:
        crc = zlib.crc32(Path(file).name.encode(), crc)
        if os.path.isfile(file):
            size = os.path.getsize(file)
            total += size
            with open(file, "rb") as content:
                crc = zlib.crc32(content.read(CHECKED), crc)
                content.seek(max(0, size - CHECKED))
                crc = zlib.crc32(content.read(CHECKED), crc)
    return {"files": len(files), "bytes": total, "checksum": crc}


def open_parts(recipe: SourceRecipe, path: str) -> list[Part]:
    """Every file of a map-style data set.

    Raises:
        ManifestError: there is no such file, or it is not in its format.
    """
    import datasets

    datasets.disable_progress_bars()
    kind = format_of(recipe, path)
    if kind == "hub":
        name = hub_name(path)
        rows = opened(path, lambda: datasets.load_dataset(name, recipe.config or None, split=recipe.split))
        return [Columns(f"{name}:{recipe.config}:{recipe.split}", rows)]
    files = files_of(kind, path)
    if kind == "webdataset":
        return [Tar(file, _local(file)) for file in files]
    if kind == "json":
        return [Lines(file, _loaded("text", [str(_as_lines(file))])[0]) for file in files]
    if kind == "parquet":
        return [_parquet(file) for file in files]
    for file in files:
        if os.path.isfile(file) and not os.path.getsize(file):
            raise ManifestError(f"{file}: has no rows; write it again, or remove it from data.sources")
    return [Lines(file, rows) for file, rows in zip(files, _loaded("text", files), strict=True)]


def _parquet(file: str) -> Part:
    """A Parquet file read in place, or converted once if its row groups are too large to read single rows."""
    part = opened(file, lambda: Parquet(file, _local(file)))
    if part.fits:
        return part
    logging.getLogger("stages").warning(
        "%s: its row groups have up to %d rows and %d MB, and reading a row decodes its group, so it is converted "
        "into the cache of datasets; write row groups of at most %d rows and %d MB, or set streaming = true",
        file, max(part.rows), part.largest >> 20, GROUP_ROWS, GROUP >> 20,
    )  # fmt: skip
    return Columns(file, _loaded("parquet", [part.local])[0])


def hub_name(path: str) -> str:
    """ "owner/name" of "hf://owner/name"."""
    return path.removeprefix("hf://")


def opened(path: str, load: Callable[[], Any]) -> Any:
    """The result of `load`; any error of the libraries becomes a ManifestError of one sentence."""
    try:
        return load()
    except Exception as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else "no reason given"
        raise ManifestError(
            f"{path}: cannot be opened ({type(cause).__name__}: {reason}); check its name, format, config and split"
        ) from error


def _loaded(builder: str, files: list[str]) -> list[Any]:
    """The rows of each file. Each file is a split, so the place of a row in its file is known."""
    import datasets

    more = {"encoding_errors": "replace"} if builder == "text" else {}
    splits = {f"file{place:06d}": file for place, file in enumerate(files)}
    loaded = opened(files[0], lambda: datasets.load_dataset(builder, data_files=splits, **more))
    return [loaded[name] for name in splits]


def _local(file: str) -> str:
    """The file on this machine; a remote file is downloaded into the cache of `datasets`."""
    import datasets

    return file if "://" not in file else opened(file, lambda: datasets.DownloadManager().download(file))


def _as_lines(file: str) -> Path:
    """A JSON file, with a list of rows or an object with one such list, as lines of JSON next to the cache."""
    local = _local(file)
    state = os.stat(local)

    def write(path: str) -> None:
        try:
            rows = json.loads(Path(local).read_bytes())
        except ValueError as error:
            raise ManifestError(f"{file}: not JSON ({error}); name a manifest of JSON lines .jsonl") from None
        lists = [v for v in rows.values() if isinstance(v, list)] if isinstance(rows, dict) else [rows]
        if len(lists) != 1 or not isinstance(lists[0], list):
            raise ManifestError(f"{file}: a JSON manifest is one list of rows; write one list, or JSONL")
        with open(path, "w", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in lists[0])

    return kept("json", json.dumps([local, state.st_size, state.st_mtime_ns]), ".jsonl", write)


def parse_line(line: str) -> Row:
    """The row of a line of JSONL; ManifestError if it is no JSON object, EmptyRow if it is empty."""
    if not line.strip():
        raise EmptyRow("an empty line")
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ManifestError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ManifestError(f"no 'messages' list, but a {type(row).__name__}; write one JSON object per line")
    return row
