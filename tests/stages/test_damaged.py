"""Damaged or replaced files: Parquet whose pages cannot be read, and index files that are damaged or not writable."""

import errno
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keye.errors import ManifestError
from stages.data.quarantine import Quarantine
from stages.data.sources import parquet
from stages.data.sources.decontaminate import open_decontamination
from stages.data.sources.formats import Table
from stages.data.sources.source import Shuffled
from stages.data.sources.stored import kept, kept_array
from stages.recipe import SourceRecipe
from tests.stages import small

COUNT, GROUP = 400, 50


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def write(path: Path, text: str = "a", count: int = COUNT, group: int = GROUP) -> None:
    noise = np.random.default_rng(0)
    rows = [f"{text} {number} {noise.bytes(100).hex()}" for number in range(count)]
    pq.write_table(pa.table({"text": rows}), path, row_group_size=group, compression="zstd", use_dictionary=False)


def damage(path: Path, place: int) -> None:
    """Overwrite the pages of a row group; the size and the time of the file stay."""
    state, column = os.stat(path), pq.read_metadata(path).row_group(place).column(0)
    with path.open("r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\xff" * column.total_compressed_size)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def opened(path: Path, quarantine: Quarantine | None = None) -> Shuffled:
    return Shuffled(SourceRecipe(str(path), "text"), str(path), 3, quarantine)


@pytest.mark.parametrize("place", [0, 2])
def test_rows_of_a_damaged_row_group_are_bad_rows(tmp_path, place):
    path = tmp_path / "rows.parquet"
    write(path)
    damage(path, place)
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    found = opened(path, quarantine)
    bad = range(place * GROUP, (place + 1) * GROUP)
    assert sorted(set(range(COUNT)) - set(found.indices.tolist())) == list(bad)
    rows = quarantine.rows()
    assert [row["line"] - 1 for row in rows] == list(bad)
    assert all(f"{path}: row group {place + 1} of 8 cannot be read (" in row["reason"] for row in rows)


def test_a_row_group_damaged_after_the_scan_is_an_error_of_its_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    write(path)
    found = opened(path)
    damage(path, 5)
    for _ in range(2):
        with pytest.raises(ManifestError, match="row group 6 of 8 cannot be read"):
            found.find(5 * GROUP + 1)
    assert found.find(6 * GROUP).line == 6 * GROUP + 1


def test_text_that_is_not_unicode_makes_one_bad_row(tmp_path):
    path = tmp_path / "rows.parquet"
    texts = pa.array([b"\xff\xfe" if number == 7 else b"good" for number in range(20)])
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 20, texts.buffers())}), path)
    table = Table(SourceRecipe(str(path), "text"), str(path))
    assert table.bad() == [7] and table.find(8).line == 9
    with pytest.raises(ManifestError, match="UnicodeDecodeError"):
        table.find(7)


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), pa.ArrowMemoryError("malloc failed")])
def test_an_error_of_the_system_does_not_make_rows_bad(tmp_path, cache, monkeypatch, error):
    path = tmp_path / "rows.parquet"
    write(path)
    reader, calls = parquet.Parquet._reader, []

    def failing(part, **options):
        calls.append(part)
        if len(calls) == 4:
            raise error
        return reader(part, **options)

    monkeypatch.setattr(parquet.Parquet, "_reader", failing)
    with pytest.raises(parquet.NotReadableNow, match="cannot be read now .*; repeat the command"):
        opened(path)
    assert not list(cache.rglob("*.np[yz]"))
    assert len(opened(path).indices) == COUNT


def test_an_error_of_the_system_does_not_leave_an_evaluation_incomplete(tmp_path, cache, monkeypatch):
    path = tmp_path / "rows.parquet"
    write(path)

    def failing(part: parquet.Parquet, index: int) -> None:
        raise parquet.NotReadableNow("later")

    monkeypatch.setattr(parquet.Parquet, "read", failing)
    with pytest.raises(parquet.NotReadableNow):
        open_decontamination((str(path),), 6, small.processor())
    assert not list(cache.rglob("*.npz"))


def test_a_row_group_with_fewer_rows_than_the_footer_states_is_damaged(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    write(path)
    part = parquet.Parquet(str(path), str(path))
    part.rows[2] += 1
    with pytest.raises(ManifestError, match="row group 3 of 8 cannot be read .*50 rows, but the footer states 51"):
        part.group(2)
    assert [isinstance(row, ManifestError) for row in part.outlines()].count(True) == 51


def test_columns_of_the_same_name_are_an_error(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), path)
    with pytest.raises(ManifestError, match="rows.parquet: .*more than one column 'text'; rename"):
        opened(path)


@pytest.mark.parametrize("change", ["other", "shorter", "removed"])
def test_a_file_that_changes_during_a_run_is_an_error(tmp_path, change):
    path = tmp_path / "rows.parquet"
    write(path)
    found, fresh = opened(path), Table(SourceRecipe(str(path), "text"), str(path))
    if change == "other":
        write(tmp_path / "new", "b")
        os.replace(tmp_path / "new", path)
    elif change == "shorter":
        os.truncate(path, 1000)
    else:
        path.unlink()
    with pytest.raises(ManifestError, match="cannot be read" if change == "removed" else "has changed since"):
        found.find(3)
    with pytest.raises(ManifestError, match="rows.parquet"):  # the scan does not record its rows as bad
        list(fresh.parts[0].outlines())


@pytest.mark.parametrize("rows, size", [(4000, 1), (1000, 100_000)])
def test_row_groups_of_many_rows_or_of_repeated_long_text_are_converted(tmp_path, cache, caplog, rows, size):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["word " * (size // 5) + "end"] * rows}), path)
    assert pq.read_metadata(path).row_group(0).total_byte_size < 1 << 20
    table = Table(SourceRecipe(str(path), "text"), str(path))
    assert list(cache.rglob("*.arrow")) and "write row groups of at most 1024 rows and 16 MB" in caplog.text
    assert table.find(rows - 1).line == rows and len(table) == rows


def test_a_row_group_larger_than_the_cache_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    write(path)
    monkeypatch.setattr(parquet, "KEPT", 100)
    part = parquet.Parquet(str(path), str(path))
    assert part.read(3)["text"].startswith("a 3 ") and not parquet._groups.tables


def test_a_damaged_index_is_written_again(tmp_path, cache):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"a {number}"}) + "\n" for number in range(COUNT)))
    drawn = opened(path).draw_many(COUNT).tolist()
    for size in (0, 100):
        for file in (cache / "keye").glob("*.np[yz]"):
            os.truncate(file, size)
        assert opened(path).draw_many(COUNT).tolist() == drawn


def test_an_error_while_an_index_is_written_is_not_damage(cache, caplog):
    def failing(path: str) -> None:
        raise ValueError("of the rows")

    with pytest.raises(ValueError, match="of the rows"):
        kept_array("rows", "mark", ".npy", failing, np.load)
    assert "damaged" not in caplog.text


def test_an_index_that_cannot_be_written_is_named(cache):
    def full(path: str) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ManifestError, match=r"rows-.*\.npy: cannot be written .*No space left"):
        kept("rows", "mark", ".npy", full)


def test_an_index_of_a_read_only_cache_is_read_without_the_lock(cache):
    path = kept("rows", "mark", ".npy", lambda name: np.save(Path(name).open("wb"), np.arange(3)))
    lock = Path(f"{path}.lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()  # cannot be opened as a file, even by root
    assert kept("rows", "mark", ".npy", lambda name: None) == path
