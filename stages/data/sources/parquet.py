"""Parquet, read in place: a row by number from its row group, without a converted copy."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from threading import Lock
from typing import Any

from stages.data.sources.chat import Row

GROUP = 64 << 20  # bytes of a row group, decoded, up to which single rows are read from it
KEPT = 128 << 20  # bytes of the row groups that a process keeps decoded


class Parquet:
    """The rows of one Parquet file, without a copy.

    A row is read with its row group, the smallest unit that Parquet decodes. Files with row groups above `GROUP` are
    therefore slow to read by number; see `fits`.

    Args:
        file: its name in messages.
        local: its path on this machine.

    Raises:
        OSError: there is no such file.
        pyarrow.ArrowException: it is not a Parquet file.
    """

    def __init__(self, file: str, local: str) -> None:
        self.file, self.local = file, local
        state = os.stat(local)
        self.mark = f"{local} {state.st_size} {state.st_mtime_ns}"
        metadata = _metadata(local, self.mark)
        groups = [metadata.row_group(place) for place in range(metadata.num_row_groups)]
        self.starts = [0, *accumulate(group.num_rows for group in groups)]
        self.largest = max((group.total_byte_size for group in groups), default=0)

    @property
    def fits(self) -> bool:
        """Whether all row groups are small enough for single rows to be read from them."""
        return self.largest <= GROUP

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, index: int) -> Row:
        place = bisect_right(self.starts, index) - 1
        return _groups.read(self, place).slice(index - self.starts[place], 1).to_pylist()[0]

    def outlines(self) -> Iterator[Row]:
        for place in range(len(self.starts) - 1):
            yield from outlines(self.group(place))

    def group(self, place: int) -> Any:
        """Row group `place` as an arrow table; several threads may read at the same time."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pa.memory_map(self.local) as pages:
            # One thread: the encoding threads read several rows at the same time.
            reader = pq.ParquetFile(pages, metadata=_metadata(self.local, self.mark))
            return reader.read_row_group(place, use_threads=False)


@lru_cache(maxsize=256)
def _metadata(local: str, mark: str) -> Any:
    """The metadata of a file; `mark` changes when the file does."""
    import pyarrow.parquet as pq

    return pq.read_metadata(local, memory_map=True)


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
            if key not in self.tables:
                self.tables[key] = table
                self.size += table.nbytes
            while self.size > KEPT and len(self.tables) > 1:
                self.size -= self.tables.popitem(last=False)[1].nbytes
        return table


_groups = _Groups()


def outlines(table: Any) -> Iterator[Row]:
    """The rows of an arrow table, with a placeholder for the contents of each medium."""
    media = [field.name for field in table.schema if _is_media(field.type)]
    shown = {name: _placeholders(table[name]) for name in media}
    for place, row in enumerate(table.drop_columns(media).to_pylist()):
        yield {**row, **{name: found[place] for name, found in shown.items()}}


def _is_media(kind: Any) -> bool:
    """Whether an arrow type contains files: bytes, {"bytes", "path"}, or a list of these."""
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind):
        return _is_media(kind.value_type)
    inside = [kind.field(i).type for i in range(kind.num_fields)] if types.is_struct(kind) else [kind]
    return any(types.is_binary(part) or types.is_large_binary(part) for part in inside)


def _placeholders(column: Any) -> list[Any]:
    """Placeholders for each row of an arrow column of media, without reading the media."""
    import pyarrow.compute as compute
    import pyarrow.types as types

    if types.is_list(column.type) or types.is_large_list(column.type):
        return [None if count is None else [b""] * count for count in compute.list_value_length(column).to_pylist()]
    return [b"" if there else None for there in column.is_valid().to_pylist()]
