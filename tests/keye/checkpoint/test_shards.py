"""Streams of tensors: what is written is what safetensors reads, in files of the given size."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from keye.checkpoint.shards import DTYPES, PIECE, Computed, atomic_directory, in_memory, open_checkpoint, write_shards
from keye.errors import CheckpointError

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(
    told=st.lists(st.tuples(SHAPES, st.sampled_from(sorted(DTYPES))), min_size=1, max_size=8),
    limit=st.integers(1, 300),
)
def test_any_tensors_come_back_through_safetensors(tmp_path_factory, told: list, limit: int) -> None:
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(len(told))
    tensors = {
        f"t.{i}": torch.randint(0, 2, shape, generator=generator).to(DTYPES[code])
        for i, (shape, code) in enumerate(told)
    }
    files = write_shards({name: in_memory(t) for name, t in tensors.items()}, folder, limit)
    read = {}
    for file in files:
        part = load_file(folder / file)
        sizes = [t.numel() * t.element_size() for t in part.values()]
        assert sum(sizes) <= limit or len(part) == 1 or max(sizes) == 0 or sum(sizes) - min(sizes) <= limit
        read |= part
    assert read.keys() == tensors.keys()
    assert all(read[n].dtype == t.dtype and torch.equal(read[n], t) for n, t in tensors.items())
    assert all(torch.equal(stored.read(), tensors[name]) for name, stored in open_checkpoint(folder).items())
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        places = {name: file for file in files for name in safe_open(folder / file, "pt").keys()}
        assert index["weight_map"] == places
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())


def test_bytes_of_a_dtype_that_cannot_be_changed_are_copied(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    weights = torch.arange(16).to(torch.float8_e4m3fn)
    save_file({"w": weights}, tmp_path / "a" / "model.safetensors")
    stored = open_checkpoint(tmp_path / "a")
    write_shards(stored, tmp_path / "b")
    read = load_file(tmp_path / "b" / "model.safetensors")["w"]
    assert read.dtype == weights.dtype and torch.equal(read.view(torch.uint8), weights.view(torch.uint8))
    assert stored["w"].to(torch.bfloat16) is stored["w"]
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        stored["w"].read()


def test_another_dtype_is_a_cast(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4)
    save_file({"w": tensor, "i": torch.arange(3)}, tmp_path / "model.safetensors")
    stored = open_checkpoint(tmp_path)
    assert torch.equal(stored["w"].to(torch.bfloat16).read(), tensor.to(torch.bfloat16))
    assert stored["w"].to(torch.float32) is stored["w"] and stored["i"].to(torch.bfloat16) is stored["i"]


def test_progress_counts_bytes_and_a_wrong_shape_is_an_error(tmp_path: Path) -> None:
    calls = []
    write_shards({f"{i}": in_memory(torch.zeros(10)) for i in range(3)}, tmp_path, 50, lambda *call: calls.append(call))
    assert calls == [(40, 120), (80, 120), (120, 120)]
    with pytest.raises(ValueError, match="expected a tensor of shape"):
        write_shards({"a": Computed((2,), torch.float32, lambda: torch.zeros(3))}, tmp_path)


def test_only_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive = 0

    def made() -> torch.Tensor:
        nonlocal alive
        assert alive == 0
        alive += 1
        tensor = torch.zeros(100)
        weakref.finalize(tensor.untyped_storage(), gone)
        return tensor

    def gone() -> None:
        nonlocal alive
        alive -= 1

    write_shards({f"{i}": Computed((100,), torch.float32, made) for i in range(5)}, tmp_path, 1000)
    stored = open_checkpoint(tmp_path)["0"]
    assert all(len(piece) <= PIECE for piece in stored.pieces()) and stored.size == 400


def test_a_directory_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out") as part:
        (part / "file").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(tmp_path / "a" / "out") as part:
        (part / "file").touch()
        assert not (tmp_path / "a" / "out").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    with pytest.raises(CheckpointError, match="exists already"), atomic_directory(tmp_path / "a" / "out"):
        pass
