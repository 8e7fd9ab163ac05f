"""Damaged and unreadable files of a model directory: each is an error that names the file and the remedy."""

import json
import os
import struct
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from keye.checkpoint.shards import Stored, in_memory, open_checkpoint, read_json, write_shards
from keye.errors import CheckpointError


def entry(shape: list[int], offsets: list[int], code: str = "F32") -> dict[str, Any]:
    return {"dtype": code, "shape": shape, "data_offsets": offsets}


def write(path: Path, header: Any, data: int) -> None:
    """A safetensors file with `header` and `data` bytes of zeros."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": entry([2], [-8, 0])}, 8),
        ({"a": entry([2], [8, 0])}, 8),
        ({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, 12),
        ({"a": entry([2], [0, 8]), "b": entry([2], [12, 20])}, 20),
        ({"a": entry([3], [0, 8])}, 8),
        ({"a": entry([-1, -2], [0, 8])}, 8),
        ({"a": entry([2], [0, 8])}, 12),
        ({"a": entry([2], [])}, 8),
        ({"a": entry([2], [0, 8, 9])}, 8),
        ({"a": entry([2], [0, 8], "F99")}, 8),
        ([entry([2], [0, 8])], 8),
    ],
    ids=[
        "negative", "reversed", "overlap", "hole", "size", "shape", "trailing", "no offsets", "three offsets", "dtype",
        "list",
    ],
)  # fmt: skip
def test_an_invalid_header_is_an_error(tmp_path: Path, header: Any, data: int) -> None:
    path = tmp_path / "model.safetensors"
    write(path, header, data)
    with pytest.raises(SafetensorError), safe_open(path, "np"):
        pass
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*damaged.*; download or save it again"):
        open_checkpoint(tmp_path)
    write(path, {"a": entry([2], [0, 8])}, 8)
    assert open_checkpoint(tmp_path)["a"].read().tolist() == [0, 0]


def test_opening_does_not_read_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = 1 << 40  # a sparse file: reading a terabyte would take minutes and more memory than there is
    write(path, {"a": entry([size], [0, size], "U8")}, 0)
    os.truncate(path, path.stat().st_size + size)
    assert open_checkpoint(tmp_path)["a"].size == size


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file whose reading fails, on Linux")
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(.*\); check"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read \(.*\); check"):
        read_json(tmp_path / "config.json")


def test_a_folder_in_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    for name in ("model.safetensors", "other/x.safetensors", "config.json"):
        (tmp_path / name).mkdir(parents=True)
    for folder, name in ((tmp_path, "model"), (tmp_path / "other", "x")):
        with pytest.raises(CheckpointError, match=rf"{name}\.safetensors: cannot be read \(Is a directory\); check"):
            open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read \(Is a directory\); check"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_json_that_is_no_table_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json: not a JSON object"):
        read_json(path)
    path.write_text(json.dumps({"weight_map": json.loads(content)}))
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map .*; download or save it again"):
        open_checkpoint(tmp_path)


def test_an_index_without_file_names_is_an_error(tmp_path: Path) -> None:
    for weight_map in ({}, {"a": 3}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=r"index\.json: weight_map .*; download or save it again"):
            open_checkpoint(tmp_path)


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    stored = open_checkpoint(tmp_path)["a"]
    os.truncate(path, path.stat().st_size - 10)
    for read in (stored.read, stored.mapped, lambda: list(islice(stored.pieces(), 9))):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*changed while it was read"):
            read()


def test_a_file_that_is_removed_after_opening_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(10)}, tmp_path / "model.safetensors")
    stored = open_checkpoint(tmp_path)["a"]
    (tmp_path / "model.safetensors").unlink()
    for read in (stored.read, stored.mapped, lambda: list(stored.pieces())):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file; "):
            read()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full, on Linux")
@pytest.mark.parametrize("count", [10, 1 << 20])
def test_a_full_disk_is_an_error(tmp_path: Path, count: int) -> None:
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"model\.safetensors \(No space left on device\); give"):
        write_shards({"a": in_memory(torch.ones(count))}, tmp_path)


def test_only_the_file_that_transformers_reads_is_opened(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    opened = open_checkpoint(tmp_path)
    assert list(opened) == ["a"] and opened["a"].read().tolist() == [0, 0]
    index = {"metadata": {}, "weight_map": {"c": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))  # of an earlier, sharded save
    assert list(open_checkpoint(tmp_path)) == ["a"]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    assert sorted(open_checkpoint(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_a_dtype_without_a_cast_names_the_remedy(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = torch.arange(4).to(dtype)
    save_file({"w": weights}, tmp_path / "model.safetensors")
    stored: Stored = open_checkpoint(tmp_path)["w"]
    for use in (stored.read, stored.mapped):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*; save the model in bfloat16"):
            use()
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=f"{dtype}.*; save the model in bfloat16"):
        write_shards({"w": in_memory(weights)}, tmp_path / "out")
