"""Rows by number without a copy a process: Parquet read in place, and indices of rows that processes share."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.data.sources import parquet
from stages.data.sources.formats import Table
from stages.data.sources.source import Shuffled, held_out
from stages.data.sources.stored import kept
from stages.recipe import SourceRecipe
from tests.distributed import run_distributed

COUNT = 1000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def chat(number: int) -> list[dict[str, Any]]:
    content: Any = f"text {number}"
    if number % 3 == 0:
        content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "what"}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rows = [{"messages": chat(number), "family": "even" if number % 2 == 0 else "odd"} for number in range(COUNT)]
    lines = [json.dumps(row) for row in rows]
    lines[7] = "{broken"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "rows.jsonl"


def draws(manifest: Path, cache: Path, part: tuple[float, bool]) -> tuple[list[int], list[int], bool, int]:
    """(rows, draws of 2.5 epochs, whether the rows are pages of a file, the file's inode)."""
    datasets.config.HF_DATASETS_CACHE = cache
    found = Shuffled(SourceRecipe(str(manifest), "image", families=("even",)), str(manifest), 3, None, part)
    drawn = found.draw_many(5 * found.size // 2)
    index = found.indices
    path = index.filename if isinstance(index, np.memmap) else None
    mapped = path is not None and str(path) in Path("/proc/self/maps").read_text()
    return index.tolist(), drawn.tolist(), mapped, os.stat(path).st_ino if path else 0


@pytest.mark.parametrize("part", [(0.0, False), (0.2, False), (0.2, True)])
def test_processes_share_the_pages_of_an_index(manifest, cache, part):
    import torch

    one, two = run_distributed(draws, 2, 120, manifest, cache, part)
    wanted = [i for i in range(COUNT) if i % 6 == 0]
    if part[0]:
        wanted = [i for i in wanted if held_out(COUNT, part[0])[i] == part[1]]
    order: list[int] = []
    for epoch in range(3):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + epoch)
        order += torch.randperm(len(wanted), generator=generator, dtype=torch.int32).tolist()
    assert one[0] == wanted and one[1] == [wanted[i] for i in order[: len(one[1])]]
    assert one == two and one[2] and one[3]


KILLED = """
import datasets, os, signal, sys
from pathlib import Path
from stages.data.sources.stored import kept
datasets.config.HF_DATASETS_CACHE = Path(sys.argv[1])
def write(path):
    Path(path).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
kept("rows", "mark", ".npy", write)
"""


def test_an_index_whose_writer_was_killed_is_written_again(cache):
    done = subprocess.run([sys.executable, "-c", KILLED, str(cache)], check=False)
    assert done.returncode == -9 and [path.suffix for path in (cache / "keye").glob("rows-*.part")] == [".part"]
    path = kept("rows", "mark", ".npy", lambda path: Path(path).write_text("complete") and None)
    assert path.read_text() == "complete" and not list((cache / "keye").glob("*.part"))


def table(count: int) -> pa.Table:
    """Columns of all kinds that a data set may have."""
    return pa.table({
        "number": pa.array(range(count)),
        "text": pa.array([None if i % 5 == 0 else f"words {i}" * (i % 7) for i in range(count)]),
        "kind": pa.array([f"k{i % 3}" for i in range(count)]).dictionary_encode(),
        "score": pa.array([i / 3 for i in range(count)], pa.float32()),
        "when": pa.array([datetime.datetime(2026, 1, 1 + i % 28) for i in range(count)], pa.timestamp("ms")),
        "image": pa.array([{"bytes": bytes([i % 256]) * 50, "path": f"{i}.png"} for i in range(count)]),
        "frames": pa.array([[bytes([i % 256]) * j for j in range(i % 4)] if i % 4 else None for i in range(count)]),
        "messages": pa.array([
            [{"role": "user", "content": [{"type": "text", "text": f"hello {i}"}]}] * (i % 3) for i in range(count)
        ]),
    })  # fmt: skip


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_rows_of_parquet_are_those_of_datasets_without_a_copy(tmp_path, cache, compression):
    path = tmp_path / "rows.parquet"
    pq.write_table(table(COUNT), path, row_group_size=64, compression=compression)
    part = Table(SourceRecipe(str(path), "image"), str(path)).parts[0]
    rows = [part.read(index) for index in range(COUNT)]
    shown = list(part.outlines())
    assert not list(cache.rglob("*.arrow"))
    known = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "other"))
    assert rows == known.with_format("arrow")[:].to_pylist() and len(part) == COUNT
    for row, outline in zip(rows, shown, strict=True):
        wanted = dict(row, image=b"", frames=None if row["frames"] is None else [b""] * len(row["frames"]))
        assert outline == wanted


def test_draws_of_parquet_are_those_of_the_same_rows_in_jsonl(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"a {i}"}, {"role": "assistant", "content": "b"}]}
            for i in range(COUNT)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for half in range(2):
        pq.write_table(pa.Table.from_pylist(rows[half * 500 :][:500]), tmp_path / f"{half}.parquet", row_group_size=37)
    found = []
    for path in (str(tmp_path / "rows.jsonl"), str(tmp_path / "*.parquet")):
        source = Shuffled(SourceRecipe(path, "text"), path, 5, None)
        found.append([source.find(int(index)).row["messages"] for index in source.draw_many(2 * COUNT)])
    assert found[0] == found[1]


def test_parquet_of_large_row_groups_is_converted_and_says_so(tmp_path, cache, monkeypatch, caplog):
    path = tmp_path / "rows.parquet"
    pq.write_table(table(COUNT), path, row_group_size=COUNT)
    monkeypatch.setattr(parquet, "GROUP", 1000)
    part = Table(SourceRecipe(str(path), "image"), str(path)).parts[0]
    assert list(cache.rglob("*.arrow")) and "write row groups of" in caplog.text
    monkeypatch.undo()
    other = parquet.Parquet(str(path), str(path))
    assert [part.read(i) for i in (0, 501, 999)] == [other.read(i) for i in (0, 501, 999)]


def test_threads_read_rows_of_parquet_at_the_same_time(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(parquet, "KEPT", 20_000)  # a few row groups: they come and go
    path = tmp_path / "rows.parquet"
    pq.write_table(table(COUNT), path, row_group_size=50)
    part = parquet.Parquet(str(path), str(path))
    numbers = np.random.default_rng(0).integers(0, COUNT, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert [row["number"] for row in pool.map(part.read, numbers)] == numbers
    assert parquet._groups.size == sum(table.nbytes for table in parquet._groups.tables.values()) <= 2 * 20_000
