"""Background checkpoints equal those written in the foreground, are valid once all files are on disk, or fail."""

import json
import os
import resource
import signal
import threading
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from keye.errors import CheckpointError
from stages.distributed import engine as deep
from stages.distributed.background import to_host, write_in_background
from stages.distributed.checkpoints import (
    checkpoints,
    load_checkpoint,
    save_checkpoint,
    start_checkpoint,
    validate_checkpoint,
)
from tests.distributed import run_distributed
from tests.stages import small, test_trainer
from tests.stages.test_checkpoints import STEPS, engine_of, train

# --- copies


def test_copies_keep_what_tensors_share_and_no_later_change_reaches_them():
    flat = torch.arange(12.0)
    state = OrderedDict(a=flat[:4].view(2, 2), b=[flat[4:], (flat.t(), "word")], empty=torch.empty(0, 3))
    state._metadata = {"version": 1}
    held = {"numbers": [1, 2]}
    state["held"] = held
    made = to_host(state)
    flat.zero_()
    held["numbers"].append(3)
    assert made._metadata == {"version": 1} and made["held"] == {"numbers": [1, 2]}
    assert made["a"].tolist() == [[0, 1], [2, 3]] and made["b"][0].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert made["empty"].shape == (0, 3) and isinstance(made["b"][1], tuple)
    storages = {x.untyped_storage().data_ptr() for x in (made["a"], made["b"][0], made["b"][1][0])}
    assert len(storages) == 1 and made["a"].untyped_storage().nbytes() == 48


# --- equal to foreground checkpoints


def values(found: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a file's contents by path."""
    if isinstance(found, dict):
        return {k: v for key, inner in found.items() for k, v in values(inner, f"{name}.{key}").items()}
    if isinstance(found, list | tuple):
        return {k: v for i, inner in enumerate(found) for k, v in values(inner, f"{name}.{i}").items()}
    return {name: found}


def both(folder: Path, zero: int) -> tuple[list[float], list[str]]:
    """The same step saved in the foreground and in the background, where the weights change before the writing."""
    deep.start(threads=1)
    engine = engine_of(0, zero)
    losses = train(engine, range(3))
    save_checkpoint(engine, folder / "sync", 3, {"seen": [3]}, shared=True)
    write_in_background(engine)
    writer, gate, state = engine.checkpoint_engine, threading.Event(), {"seen": [3]}
    writer.pool.submit(gate.wait)  # the only thread: no file is written before the gate opens
    begun = start_checkpoint(engine, folder / "async", 3, state, shared=True)
    states = [begun.written, validate_checkpoint(folder / "async" / "step-3")]
    state["seen"].append(4)
    losses += train(engine, range(3, STEPS))
    gate.set()
    begun.finish()
    return losses, [*states, begun.written, validate_checkpoint(folder / "async" / "step-3")]


def resumed(folder: Path, zero: int) -> tuple[Any, list[float]]:
    deep.start(threads=1)
    engine = engine_of(1, zero)  # another seed, so everything must be restored
    return load_checkpoint(engine, folder), train(engine, range(3, STEPS))


@pytest.mark.parametrize(
    "zero", [2, *(pytest.param(z, marks=pytest.mark.slow) for z in (0, 1, 3))], ids=lambda zero: f"zero {zero}"
)
def test_resuming_from_a_background_checkpoint_equals_resuming_from_a_foreground_one(tmp_path, zero):
    results = run_distributed(both, 2, 300, tmp_path, zero)
    for _, states in results:
        assert states == [False, "it was not finished", True, None]
    names = sorted(path.name for path in (tmp_path / "sync" / "step-3").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "async" / "step-3").iterdir())
    for name in names:
        if name.endswith(".pt"):
            sync, background = (
                values(torch.load(tmp_path / kind / "step-3" / name, weights_only=False)) for kind in ("sync", "async")
            )
            assert sync.keys() == background.keys()
            tensors = [key for key, value in sync.items() if isinstance(value, Tensor)]
            assert tensors
            for key in tensors:  # the padding of ZeRO-3's last share is arbitrary, possibly NaN
                torch.testing.assert_close(background[key], sync[key], rtol=0, atol=0, equal_nan=True, msg=name + key)
            sizes = [(tmp_path / kind / "step-3" / name).stat().st_size for kind in ("sync", "async")]
            assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    again = [run_distributed(resumed, 2, 300, tmp_path / kind, zero) for kind in ("sync", "async")]
    assert again[0] == again[1]
    assert again[1][0] == ((3, {"seen": [3]}), results[0][0][3:])


# --- incomplete and unwritable


def killed(folder: Path) -> None:
    deep.start(threads=1)
    engine = engine_of(0, 1)
    save_checkpoint(engine, folder, 1, {}, shared=True)
    write_in_background(engine)
    begun = start_checkpoint(engine, folder, 2, {}, shared=True)
    begun.writer.wait()  # all files of this rank are on disk, but the ranks have not agreed yet
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def gone_on(folder: Path) -> tuple[Any, list[str]]:
    deep.start(threads=1)
    engine = engine_of(1, 1)
    found = load_checkpoint(engine, folder)
    write_in_background(engine)
    start_checkpoint(engine, folder, 3, {}, shared=True).finish()
    return found, [path.name for path in checkpoints(folder)]


def test_kill_between_copy_and_agreement_leaves_the_previous_checkpoint(tmp_path, capfd):
    with pytest.raises(RuntimeError):
        run_distributed(killed, 2, 300, tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-1", "step-2"]
    assert validate_checkpoint(tmp_path / "step-2") == "it was not finished"
    results = run_distributed(gone_on, 2, 300, tmp_path)
    assert results[0] == results[1] == ((1, {}), ["step-1", "step-3"])  # the incomplete one is removed
    assert "step-2 is skipped: it was not finished; resuming from step-1" in capfd.readouterr().out


def full(folder: Path) -> tuple[str, list[str], list[str]]:
    """Rank 1 cannot write more than 100 bytes per file and fails in the background."""
    deep.start(threads=1)
    engine = engine_of(0, 2)
    write_in_background(engine)
    start_checkpoint(engine, folder, 1, {}).finish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    begun = start_checkpoint(engine, folder, 2, {})
    train(engine, range(2))
    message = ""
    try:
        begun.finish()
    except CheckpointError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = [path.name for path in checkpoints(folder)]
    dist.barrier()  # both ranks have listed the files
    start_checkpoint(engine, folder, 3, {}).finish()
    return message, left, [path.name for path in small.complete_checkpoints(folder)]


def test_failed_write_in_the_background_is_an_error_of_all_ranks_with_the_file(tmp_path):
    results = run_distributed(full, 2, 300, tmp_path)
    assert results[0] == results[1]
    message, left, after = results[0]
    assert left == ["step-1"] and after == ["step-1", "step-3"]
    assert "step-2 could not be written (" in message and message.endswith("which resumes from step-1")
    assert ".pt: " in message and "\n" not in message


# --- a stage


def stage(manifest: Path, folder: Path) -> dict[str, Any]:
    deep.start(threads=1)
    found: dict[str, Any] = {}
    whole, model = test_trainer.trainer_of(test_trainer.Multitask, manifest, folder / "sync")
    whole.run()
    found["whole"] = test_trainer.parameters(model)
    test_trainer.RECIPE = replace(test_trainer.RECIPE, async_checkpoints=True)
    begun, _ = test_trainer.trainer_of(test_trainer.Stopped, manifest, folder / "async")
    try:
        begun.run()
    except Exception as error:
        found["said"] = str(error)
    found["saved"] = [path.name for path in small.complete_checkpoints(folder / "async" / "checkpoints")]
    resumed, model = test_trainer.trainer_of(test_trainer.Multitask, manifest, folder / "async", seed=1)
    found["from"] = resumed.step
    # The checkpoint of step 4 is complete after the first step that follows the writing, long before the next save.
    writer = resumed.engine.checkpoint_engine
    saved, step = resumed.save, resumed.train_step
    marked: dict[int, str | None] = {}

    def save() -> None:
        saved()
        if resumed.step == 4:
            writer.pool.submit(lambda: None).result()

    def train_step() -> dict[str, Any]:
        if resumed.step == 5:
            marked[5] = validate_checkpoint(folder / "async" / "checkpoints" / "step-4")
        return step()

    resumed.save, resumed.train_step = save, train_step
    resumed.run()
    found["marked"], found["resumed"] = marked, test_trainer.parameters(model)
    found["left"] = [path.name for path in small.complete_checkpoints(folder / "async" / "checkpoints")]
    return found


def test_stage_with_background_checkpoints_stops_resumes_and_ends_like_one_without(tmp_path):
    manifest = small.world(tmp_path / "world")
    found, other = run_distributed(stage, 2, 300, manifest, tmp_path)
    assert found["said"] == "multitask: stopped at step 3; the same command resumes from it"
    assert found["saved"] == ["step-2", "step-3"] and found["from"] == 3
    assert found["marked"] == {5: None} and found["left"] == ["step-4", "step-6"]
    for rank in (found, other):
        assert all(torch.equal(rank["resumed"][name], value) for name, value in found["whole"].items())
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
        for kind in ("sync", "async")
    ]
    assert losses[0] == losses[1]
