"""WebDataset tars: the files of one sample are adjacent and share the name before the first dot.

    000.jpg 000.json 001.jpg 001.json …      the JSON is a row of the chat form, or
    000.png 000.txt                          the text is the caption, or
    000.0.jpg 000.1.jpg 000.mp4 000.json     parts may name a file of the sample: {..., "image": "0.jpg"}

A tar on disk is read in place, without unpacking.
"""

import io
import json
import os
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keye.errors import ManifestError
from stages.data.sources.chat import Row, each_part
from stages.data.sources.stored import kept_array

STILLS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
CLIPS = ("mp4", "mkv", "webm", "mov", "avi", "m4v")
WORDS = ("txt", "caption")

Index = tuple[list[str], np.ndarray, np.ndarray, np.ndarray]


class Tar:
    """The samples of one tar by number.

    Args:
        file: its name in messages.
        local: its path on this machine.
    """

    def __init__(self, file: str, local: str) -> None:
        self.file, self.local = file, local
        state = os.stat(local)
        self.mark = json.dumps([local, state.st_size, state.st_mtime_ns])
        self.names, self.places, self.starts, self.codes = kept_array(
            "tar", self.mark, ".index", self._list, open_index
        )

    def _list(self, path: str) -> None:
        """Write the index: (offset, size) `[M, 2]` of the members, their names, and the first member of each sample."""
        codes, places, starts, last = array("i"), array("q"), array("q"), None
        names: dict[str, int] = {}
        try:
            with tarfile.open(self.local, "r:") as tar:
                for member in tar:
                    key, name = split_name(member.name)
                    if not member.isfile() or not name:
                        continue
                    if key != last:
                        starts.append(len(codes))
                    last = key
                    codes.append(names.setdefault(name, len(names)))
                    places.extend((member.offset_data, member.size))
                    tar.members = []  # otherwise it keeps every member
        except tarfile.TarError as error:
            raise ManifestError(f"{self.file}: not a plain tar ({error}); unpack .gz first, or stream it") from None
        starts.append(len(codes))
        with open(path, "wb") as out:
            for part in (array("q", [len(codes), len(starts)]), places, starts, codes):
                part.tofile(out)
            out.write(json.dumps(list(names)).encode())

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read(self, index: int) -> Row:
        return tar_row(self._members(index, STILLS + CLIPS + WORDS + ("json",)))

    def outlines(self) -> Iterator[Row | ManifestError]:
        for index in range(len(self)):
            try:
                yield tar_row(self._members(index, (*WORDS, "json")))
            except ManifestError as error:
                yield error

    def _members(self, index: int, wanted: tuple[str, ...]) -> dict[str, bytes]:
        """Name → content of a sample's files; the content is empty if the ending is not wanted."""
        members = {}
        with open(self.local, "rb") as tar:
            for at in range(self.starts[index], self.starts[index + 1]):
                offset, size = self.places[at].tolist()
                name = self.names[self.codes[at]]
                tar.seek(offset)
                members[name] = tar.read(size) if ending(name) in wanted else b""
        return members


def stream_tars(files: list[str]) -> Iterator[dict[str, Any]]:
    """The samples of local or remote tars in order, as {"members": name → content}."""
    import fsspec

    for file in files:
        with fsspec.open(file, "rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as tar:
            last, members = None, {}
            for member in tar:
                key, name = split_name(member.name)
                if not member.isfile() or not name:
                    continue
                if key != last and members:
                    yield {"members": members}
                    members = {}
                last = key
                content = tar.extractfile(member)
                members[name] = content.read() if content is not None else b""
            if members:
                yield {"members": members}


def split_name(path: str) -> tuple[str, str]:
    """ "a/000.0.jpg" → ("a/000", "0.jpg"); the case is kept, because the sample's JSON names its files."""
    folder, slash, base = path.rpartition("/")
    key, _, name = base.partition(".")
    return folder + slash + key, name


def ending(name: str) -> str:
    """The ending of a file's name in lower case: `Front.JPG` → `jpg`."""
    return name.rpartition(".")[2].lower()


def open_index(path: Path) -> Index:
    """The distinct names, and views of the mapped file: places `[M, 2]`, starts `[N + 1]`, name of each member `[M]`.

    The processes of a machine share the pages of the file: 28 bytes for a sample of one member, without copies.
    """
    members, starts = (int(value) for value in np.fromfile(path, np.int64, 2))
    at, parts = 16, []
    for kind, count in ((np.int64, 2 * members), (np.int64, starts), (np.int32, members)):
        size = np.dtype(kind).itemsize * count
        parts.append(np.memmap(path, kind, "r", at, (count,)) if count else np.empty(0, kind))
        at += size
    with open(path, "rb") as file:
        file.seek(at)
        names = json.load(file)
    return names, parts[0].reshape(-1, 2), parts[1], parts[2]


def tar_row(members: dict[str, bytes]) -> Row:
    """The files of a sample, name → content, as one row with columns; ManifestError if its JSON is bad."""
    row: Row = {}
    for name, content in members.items():
        if ending(name) == "json":
            row.update(_json(name, content))
    words = [content for name, content in members.items() if ending(name) in WORDS]
    stills = [content for name, content in members.items() if ending(name) in STILLS]
    clips = [content for name, content in members.items() if ending(name) in CLIPS]
    if words:
        row.setdefault("caption" if stills or clips else "text", words[0].decode("utf-8", "replace").strip())
    if "messages" in row:
        row["messages"] = _named(row["messages"], members)
    if stills and not {"image", "images"} & set(row):
        row["images"] = stills
    if clips and "video" not in row:
        row["video"] = clips
    return row


def _json(name: str, content: bytes) -> Row:
    try:
        row = json.load(io.BytesIO(content))
    except ValueError as error:
        raise ManifestError(f"{name}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ManifestError(f"{name}: a {type(row).__name__}; the JSON of a sample must be an object")
    return row


def _named(messages: Any, members: dict[str, bytes]) -> Any:
    """The messages; parts that name a file of the sample get its content."""

    def fill(part: Any) -> Any:
        source = part.get(part.get("type")) if isinstance(part, dict) else None
        return {**part, part["type"]: members[source]} if isinstance(source, str) and source in members else part

    return each_part(messages, fill)
