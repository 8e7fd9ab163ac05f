"""Checkpoints are complete or do not count; a full disk leaves the previous one; any number of processes resumes."""

import json
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from keye.errors import CheckpointError
from stages.distributed import engine as deep
from stages.distributed.checkpoints import (
    MARKER,
    checksum,
    load_checkpoint,
    newest,
    save_checkpoint,
    validate_checkpoint,
)
from stages.distributed.conversion import load_frozen
from stages.optimizer import OptimizerConfig
from tests.distributed import run_distributed
from tests.stages import small

STEPS, BATCH = 6, 4


def written(folder: Path, step: int, world: int = 1, shared: bool = False) -> Path:
    """A finished checkpoint with one file."""
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    (path / "state-0.pt").write_bytes(b"12345")
    files = {"state-0.pt": (5, checksum(path / "state-0.pt"))}
    (path / MARKER).write_text(json.dumps({"step": step, "world": world, "shared": shared, "files": files}))
    return path


# --- complete or not


def test_incomplete_checkpoints_do_not_count(tmp_path):
    paths = [written(tmp_path, step) for step in (2, 4, 6, 8, 10, 12)]
    assert small.complete_checkpoints(tmp_path) == paths  # by number, not by name
    (paths[0] / MARKER).unlink()
    (paths[1] / MARKER).write_text('{"step": 4, "fil')
    (paths[2] / "state-0.pt").write_bytes(b"123")
    (paths[3] / "state-0.pt").unlink()
    (paths[4] / "state-0.pt").write_bytes(b"12x45")  # the same length
    assert small.complete_checkpoints(tmp_path) == paths[5:]
    assert [validate_checkpoint(path) for path in paths] == [
        "it was not finished", "its complete.json cannot be read", "state-0.pt has 3 bytes instead of 5",
        "state-0.pt is missing", "state-0.pt has changed since it was written", None,
    ]  # fmt: skip
    assert small.complete_checkpoints(tmp_path / "nowhere") == []


def test_skipped_checkpoints_are_reported_and_the_previous_one_is_used(tmp_path):
    kept, torn = written(tmp_path, 8), written(tmp_path, 10)
    (torn / "state-0.pt").unlink()
    assert newest(tmp_path) == (kept, [f"{torn} is skipped: state-0.pt is missing; resuming from step-8"])
    shutil.rmtree(kept)
    found, message = newest(tmp_path)
    assert found is None and message[0].endswith("is missing; there is no other, so training starts at the first step")


@pytest.mark.parametrize("size", [0, 5, 9 << 20])
def test_checksum_covers_both_ends(tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    before = checksum(path)
    for place in (0, size - 1) if size else ():
        changed = bytearray(size)
        changed[place] = 1
        path.write_bytes(changed)
        assert checksum(path) != before


# --- another number of processes


class Net(nn.Module):
    """Two trained layers and a frozen one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.frozen, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.frozen(torch.tanh(self.first(x))))).pow(2).sum()


def engine_of(seed: int, zero: int) -> Any:
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup=1, weight_decay=0.1, max_grad_norm=0.5)
    accumulation = BATCH // dist.get_world_size()
    return deep.build(Net(seed), optimizer, STEPS, zero=zero, accumulation=accumulation, precision="fp32")


def train(engine: Any, steps: range) -> list[float]:
    """Summed losses of steps over the same four rows on any number of ranks."""
    losses, world = [], dist.get_world_size()
    for step in steps:
        rows = torch.randn(BATCH, 1, 5, generator=torch.Generator().manual_seed(step)).chunk(world)[dist.get_rank()]
        total = torch.zeros(())
        for row in rows:
            loss = engine(row)
            engine.backward(loss * world * len(rows) / BATCH)
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


def first_half(folder: Path, zero: int) -> list[float]:
    deep.start(threads=1)
    engine = engine_of(0, zero)
    losses = train(engine, range(3))
    save_checkpoint(engine, folder, 3, {"seen": 3}, shared=True)
    return losses + train(engine, range(3, STEPS))


def second_half(folder: Path, zero: int) -> tuple[Any, list[float], list[str]]:
    deep.start(threads=1)
    engine = engine_of(1, zero)  # another seed, so everything must be restored
    found = load_checkpoint(engine, folder)
    return found, train(engine, range(3, STEPS)), sorted(path.name for path in folder.glob("*step*"))


@pytest.mark.parametrize(
    ("before", "after", "zero"),
    [
        (2, 1, 3),
        pytest.param(1, 2, 3, marks=pytest.mark.slow),
        pytest.param(2, 1, 2, marks=pytest.mark.slow),
        pytest.param(1, 2, 1, marks=pytest.mark.slow),
        pytest.param(2, 1, 0, marks=pytest.mark.slow),
    ],
)
def test_another_number_of_processes_resumes_with_the_same_losses(tmp_path, capfd, before, after, zero):
    whole = run_distributed(first_half, before, 360, tmp_path / "c", zero)[0]
    found, losses, left = run_distributed(second_half, after, 360, tmp_path / "c", zero)[0]
    assert found == (3, {"seen": 3}) and left == ["step-3"]
    assert losses == pytest.approx(whole[3:], rel=1e-5)
    assert f"was written by {before} processes" in capfd.readouterr().out


def of_another_world(folder: Path) -> None:
    load_checkpoint(None, folder)


def test_state_of_each_rank_cannot_be_loaded_by_other_ranks(tmp_path):
    written(tmp_path, 1, world=4)
    with pytest.raises(CheckpointError, match="was written by 4 processes and this run has 1"):
        run_distributed(of_another_world, 1, 180, tmp_path)


# --- a full disk


def full(folder: Path) -> tuple[list[str], list[str]]:
    """Save, then save with a limit on the size of rank 1's files, then without room on the disk."""
    deep.start(threads=1)
    engine, message = engine_of(0, 1), []
    save_checkpoint(engine, folder, 1, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        save_checkpoint(engine, folder, 2, {})
    except CheckpointError as error:
        message.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = sorted(path.name for path in folder.glob("step-*"))
    engine.module.last.weight.ds_numel = 1 << 60  # a layer larger than any disk
    try:
        save_checkpoint(engine, folder, 3, {})
    except CheckpointError as error:
        message.append(str(error))
    return message, left + sorted(path.name for path in folder.glob("step-*"))


def test_full_disk_is_an_error_on_all_ranks_and_leaves_the_previous_checkpoint(tmp_path):
    results = run_distributed(full, 2, 360, tmp_path)
    assert results[0] == results[1]
    message, left = results[0]
    assert left == ["step-1", "step-1"] and validate_checkpoint(tmp_path / "step-1") is None
    assert "step-2 could not be written (" in message[0] and "and was removed; a checkpoint takes about" in message[0]
    assert message[0].endswith("which resumes from step-1") and "\n" not in message[0]
    assert "but only" in message[1] and message[1].endswith("which resumes from step-1")


def several(folder: Path) -> list[list[str]]:
    deep.start(threads=1)
    engine, left = engine_of(0, 1), []
    for step in (1, 2, 3, 4):
        save_checkpoint(engine, folder, step, {}, keep=3)
        if step == 2:
            (folder / "step-2" / MARKER).unlink()
        left.append([path.name for path in small.complete_checkpoints(folder)])
    return left


def test_the_last_few_are_kept(tmp_path):
    left = run_distributed(several, 1, 180, tmp_path)[0]
    assert left == [["step-1"], ["step-1"], ["step-1", "step-3"], ["step-1", "step-3", "step-4"]]


class Harm:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_frozen_weights_are_read_without_executing_code_of_the_file(tmp_path):
    module, marked = Net(0), tmp_path / "ran"
    engine, file = SimpleNamespace(module=module), tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": Net(1).state_dict()}, file)
    load_frozen(engine, tmp_path)
    assert torch.equal(module.frozen.weight, Net(1).frozen.weight)
    torch.save({"module": Net(1).state_dict(), "extra": Harm(marked)}, file)
    with pytest.raises(CheckpointError, match="contains more than tensors"):
        load_frozen(engine, tmp_path)
    assert not marked.exists()
