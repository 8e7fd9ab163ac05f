"""Parquet, read in place: a row by number from its row group, without a converted copy."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import accumulate
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as pq
import pyarrow.types as types

from keye.errors import ManifestError
from stages.data.sources.chat import Row

GROUP = 16 << 20  # bytes of a row group, decoded, up to which single rows are read from it
GROUP_ROWS = 1024  # its rows, likewise
KEPT = 128 << 20  # bytes of the row groups that a process keeps decoded
SCANNED = 2048  # rows scanned at a time
PROBED = 8  # rows from which the decoded size of a row group is estimated
UNREADABLE = (OSError, ValueError, OverflowError, pa.ArrowException)  # of pyarrow, for damaged files and bad UTF-8


class NotReadableNow(ManifestError):
    """The operating system cannot read a row now; its content may be undamaged."""


class Parquet:
    """The rows of one Parquet file, without a copy.

    A row is read with its row group, the smallest unit that Parquet decodes. Files with row groups above `GROUP` or
    `GROUP_ROWS` are therefore slow to read by number; see `fits`.

    Args:
        file: its name in messages.
        local: its path on this machine.

    Raises:
        OSError: there is no such file.
        pyarrow.ArrowException: it is not a Parquet file.
        ValueError: two of its columns have the same name.
    """

    def __init__(self, file: str, local: str) -> None:
        self.file, self.local = file, local
        self.mark = _mark(local)
        metadata = _metadata(local, self.mark)
        names = metadata.schema.to_arrow_schema().names
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"it has more than one column {repeated!r}; rename them")
        groups = [metadata.row_group(place) for place in range(metadata.num_row_groups)]
        self.rows, self.sizes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]
        self.starts = [0, *accumulate(self.rows)]
        self.damaged: dict[int, str] = {}  # row group that cannot be decoded, and is not tried again → why

    @property
    def fits(self) -> bool:
        """Whether all row groups are small enough for single rows to be read from them."""
        return max(self.rows, default=0) <= GROUP_ROWS and self.largest <= GROUP

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest row group: as the file states, or as estimated from its first rows if that is more.

        The file states the size of the encoded values. A long text that is repeated is stored once.
        """
        stated = max(self.sizes, default=0)
        if not stated or stated > GROUP:
            return stated
        places = {max(range(len(sizes)), key=sizes.__getitem__) for sizes in (self.sizes, self.rows)}
        return max(stated, *(self._decoded(place) for place in places))

    def _decoded(self, place: int) -> int:
        """Estimated bytes of a decoded row group; 0 if its first rows cannot be read."""
        try:
            with self._reader(buffer_size=1 << 16) as reader:
                batch = next(reader.iter_batches(PROBED, row_groups=[place], use_threads=False), None)
        except UNREADABLE:
            return 0
        return batch.nbytes * self.rows[place] // len(batch) if batch else 0

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, index: int) -> Row:
        """Row `index`; ManifestError if it cannot be read, or if the file has changed since it was opened."""
        place = bisect_right(self.starts, index) - 1
        table = _groups.read(self, place)
        try:
            return table.slice(index - self.starts[place], 1).to_pylist()[0]
        except UNREADABLE as error:
            raise ManifestError(self._unreadable(place, _reason(error))) from None

    def outlines(self) -> Iterator[Row | ManifestError]:
        """All rows with placeholders for media; an error for each row that cannot be read.

        Raises:
            NotReadableNow: the operating system cannot read a row group.
            ManifestError: the file has changed since it was opened.
        """
        for place, rows in enumerate(self.rows):
            try:
                table = self.group(place)
            except NotReadableNow:  # must not make rows bad in the stored index
                raise
            except ManifestError as error:
                self._check()
                yield from [error] * rows
            else:
                yield from outlines(table)

    def group(self, place: int) -> Any:
        """Row group `place` as an arrow table; several threads may read at the same time.

        Raises:
            ManifestError: it cannot be read, or the file has changed since it was opened.
        """
        if place in self.damaged:
            raise ManifestError(self.damaged[place])
        self._check()
        try:
            with self._reader() as reader:
                # One thread: the encoding threads read several rows at the same time.
                table = reader.read_row_group(place, use_threads=False)
        except UNREADABLE as error:
            self._check()
            if getattr(error, "errno", None) is not None or isinstance(error, MemoryError):
                where = f"row group {place + 1} of {len(self.rows)}"
                reason = f"{self.file}: {where} cannot be read now ({_reason(error)}); repeat the command"
                raise NotReadableNow(reason) from None
            raise self._is_damaged(place, _reason(error)) from None
        self._check()
        if len(table) != self.rows[place]:
            raise self._is_damaged(place, f"{len(table)} rows, but the footer states {self.rows[place]}")
        return table

    def _is_damaged(self, place: int, reason: str) -> ManifestError:
        """Record that the content of a row group is damaged; the error to raise."""
        self.damaged[place] = self._unreadable(place, reason)
        return ManifestError(self.damaged[place])

    def _reader(self, **options: Any) -> Any:
        # Not mapped: reading a mapped file that becomes shorter ends the process.
        return pq.ParquetFile(self.local, metadata=_metadata(self.local, self.mark), memory_map=False, **options)

    def _check(self) -> None:
        try:
            same = _mark(self.local) == self.mark
        except OSError as error:
            raise ManifestError(f"{self.file}: cannot be read ({error.strerror}); put the file back") from None
        if not same:
            raise ManifestError(f"{self.file}: has changed since it was opened; start again with the new file")

    def _unreadable(self, place: int, reason: str) -> str:
        where = f"row group {place + 1} of {len(self.rows)} cannot be read"
        return f"{self.file}: {where} ({reason}); write the file again, or remove it"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _mark(local: str) -> str:
    state = os.stat(local)
    return f"{local} {state.st_size} {state.st_mtime_ns}"


@lru_cache(maxsize=256)
def _metadata(local: str, mark: str) -> Any:
    """The metadata of a file; `mark` changes when the file does."""
    return pq.read_metadata(local)


class _Groups:
    """The row groups read last, decoded, for all files of a process: `KEPT` bytes at most."""

    def __init__(self) -> None:
        self.tables: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self.size, self.lock = 0, Lock()

    def read(self, file: Parquet, place: int) -> Any:
        key = file.mark, place
        with self.lock:
            if key in self.tables:
                self.tables.move_to_end(key)
                return self.tables[key]
        table = file.group(place)
        with self.lock:
            if key not in self.tables and table.nbytes <= KEPT:
                self.tables[key] = table
                self.size += table.nbytes
            while self.size > KEPT:
                self.size -= self.tables.popitem(last=False)[1].nbytes
        return table


_groups = _Groups()


def outlines(table: Any) -> Iterator[Row | ManifestError]:
    """The rows of an arrow table, with a placeholder for the contents of each medium; an error for an unreadable row.

    Only `SCANNED` rows at a time are Python objects.
    """
    for at in range(0, len(table), SCANNED):
        part = table.slice(at, SCANNED)
        try:
            rows: list[Row | ManifestError] = list(_outlines(part))
        except UNREADABLE:
            rows = [_outline(part.slice(place, 1)) for place in range(len(part))]
        yield from rows


def _outline(table: Any) -> Row | ManifestError:
    """The row of a table of one row, or why it cannot be read."""
    try:
        return next(_outlines(table))
    except UNREADABLE as error:
        return ManifestError(f"the row cannot be read ({_reason(error)})")


def _outlines(table: Any) -> Iterator[Row]:
    media = [field.name for field in table.schema if _is_media(field.type)]
    shown = {name: _placeholders(table[name]) for name in media}
    for place, row in enumerate(table.drop_columns(media).to_pylist()):
        yield {**row, **{name: found[place] for name, found in shown.items()}}


def _is_media(kind: Any) -> bool:
    """Whether an arrow type contains files: bytes, {"bytes", "path"}, or a list of these."""
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_media(kind.value_type)
    inside = [kind.field(i).type for i in range(kind.num_fields)] if types.is_struct(kind) else [kind]
    return any(types.is_binary(part) or types.is_large_binary(part) for part in inside)


def _placeholders(column: Any) -> list[Any]:
    """Placeholders for each row of an arrow column of media, without reading the media."""
    if types.is_list(column.type) or types.is_large_list(column.type):
        return [None if count is None else [b""] * count for count in compute.list_value_length(column).to_pylist()]
    return [b"" if there else None for there in column.is_valid().to_pylist()]
