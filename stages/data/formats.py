"""Formats: a manifest or data set on disk → rows in the chat form, memory-mapped, each found by its number."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keye.errors import ManifestError
from stages.recipe import KINDS, SourceRecipe

BAD, EMPTY = 254, 255  # codes of rows beside the kinds' places in KINDS
SCANNED = 2048  # rows looked over at a time

Row = dict[str, Any]


class Table:
    """The rows of a map-style data set; nothing but the rows asked for is in RAM.

    Args:
        recipe: which data set. path: the recipe's, with the run's folder put in.

    Raises:
        ManifestError: no such file, or one that is not in its format.
    """

    def __init__(self, recipe: SourceRecipe, path: str) -> None:
        self.recipe = recipe
        self.parts = open_parts(path)
        self.starts = np.cumsum([0] + [len(rows) for _, rows in self.parts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, index: int) -> tuple[str, int]:
        """The file of a row, and its line in it, from 1."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part][0], index - int(self.starts[part]) + 1

    def row(self, index: int) -> Row:
        """Row `index` in the chat form, its media not yet decoded.

        Raises:
            ManifestError: it is not in the form.
        """
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        at = index - int(self.starts[part])
        return read_row(self.parts[part][1][at : at + 1].to_pylist()[0])

    def scan(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Every row's kind (its place in KINDS, BAD or EMPTY) uint8 `[N]`, family int32 `[N]`, the families' names.

        Made once a data set and kept beside the cache of `datasets`; whoever comes second waits for the first.
        """
        import datasets
        from filelock import FileLock

        mark = "-".join(rows._fingerprint for _, rows in self.parts)
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "keye-kinds"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{datasets.fingerprint.Hasher.hash(mark)}.npz"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                kinds, families, names = self._scan()
                with open(f"{path}.part", "wb") as out:
                    np.savez(out, kinds=kinds, families=families, names=np.array(names, dtype=str))
                os.replace(f"{path}.part", path)
        with np.load(path) as saved:
            return saved["kinds"], saved["families"], saved["names"].tolist()

    def _scan(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        kinds, families = np.full(len(self), BAD, np.uint8), np.zeros(len(self), np.int32)
        names: dict[str, int] = {"": 0}
        for at, raw in enumerate(self._raw()):
            try:
                row = read_row(raw)
                kinds[at] = KINDS.index(kind_of(row["messages"]))
                families[at] = names.setdefault(str(row.get("family") or ""), len(names))
            except EmptyRow:
                kinds[at] = EMPTY
            except ManifestError:
                continue
        return kinds, families, list(names)

    def _raw(self) -> Iterator[Row]:
        for _, rows in self.parts:
            for at in range(0, len(rows), SCANNED):
                yield from rows[at : at + SCANNED].to_pylist()


class EmptyRow(ManifestError):
    """A line with nothing on it: no sample, and no mistake either."""


def open_parts(path: str) -> list[tuple[str, Any]]:
    """Every file of a data set, with its rows as an arrow-formatted `datasets.Dataset`.

    JSONL is read line by line, so that one bad line costs only itself; Parquet row by row.

    Raises:
        ManifestError: no such file.
    """
    import datasets

    if not Path(path).is_file():
        raise ManifestError(f"{path}: no such manifest; mend data.sources in the recipe or make it first")
    datasets.disable_progress_bars()
    if path.endswith(".parquet"):
        rows = datasets.load_dataset("parquet", data_files=path, split="train")
    else:
        rows = datasets.load_dataset("text", data_files=path, split="train", encoding_errors="replace")
    return [(path, rows.with_format("arrow"))]


def read_row(raw: Row) -> Row:
    """A row as its file has it → the chat form: `messages`, and `family` where it is named.

    Raises:
        ManifestError: it is not in the form. EmptyRow: there is nothing in it.
    """
    if set(raw) == {"text"}:
        if not raw["text"].strip():
            raise EmptyRow("an empty line")
        try:
            raw = json.loads(raw["text"])
        except ValueError as error:
            raise ManifestError(f"not JSON ({error})") from None
    try:
        kind_of(raw["messages"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"no 'messages' list ({error})") from None
    return raw


def kind_of(messages: list[dict[str, Any]]) -> str:
    """ "video", "image" or "text": the dearest thing a chat holds."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    types = {part["type"] for part in parts}
    return "video" if "video" in types else "image" if "image" in types else "text"


def caption_of(messages: list[dict[str, Any]]) -> str:
    """All the assistant's words."""
    words = []
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"]
            words += [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
    return " ".join(words)
