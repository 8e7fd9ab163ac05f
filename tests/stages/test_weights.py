"""Weights go from file to device and back a tensor at a time: nothing is held twice, and what comes out is exact."""

import errno
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from keye.checkpoint.shards import open_checkpoint
from keye.errors import CheckpointError
from keye.model.keye import KeyeForConditionalGeneration
from stages.data.items import Cache
from stages.distributed import engine
from stages.distributed.weights import replace_model
from stages.preparation import prepare_tokenizer, prepare_world
from stages.recipe import load
from stages.run import open_stage, run_stage
from tests.distributed import run_distributed
from tests.stages import small
from tests.stages.test_run import RECIPE


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that begins with a saved model of two decoder layers."""
    made_for = small.processor()
    made_for.tokenizer.save_pretrained(tmp_path / "tokenizer")
    small.model(made_for, seed=3).save_pretrained(tmp_path / "begin")
    text = RECIPE.replace("SEQUENCE", "1").replace("TOKENIZER", str(tmp_path / "tokenizer"))
    text = text.replace("[model]", f'[model]\npath = "{tmp_path / "begin"}"')
    (tmp_path / "test.toml").write_text(text)
    return tmp_path / "test.toml"


def opened(name: str, recipe: Path, run: Path, overrides: list[str]) -> Any:
    engine.start(threads=1)
    settings = load(recipe, overrides)
    if dist.get_rank() == 0:
        run.mkdir(exist_ok=True)
        prepare_world(settings, run)
        prepare_tokenizer(settings, run)
    dist.barrier()
    return open_stage(name, settings, run, Cache(1 << 24))


def held(shape: tuple[int, ...]) -> list[tuple[torch.dtype, str]]:
    """(dtype, device) of all tensors of this shape that are alive in this process."""
    gc.collect()
    every = [x for x in gc.get_objects() if isinstance(x, Tensor)]
    found = [x for x in every if tuple(x.shape) == shape and x.device.type != "meta"]
    places = {x.untyped_storage().data_ptr(): (x.dtype, x.device.type) for x in found}
    return list(places.values())


def see_vision(recipe: Path, run: Path) -> dict[str, Any]:
    found = opened("vision", recipe, run, [])
    loaded = {name: p.device.type for name, p in found.model.named_parameters()}
    found.trainer.loader.close()
    return loaded


def test_stage_0_loads_the_tower_alone(recipe, tmp_path):
    places = run_distributed(see_vision, 1, 200, recipe, tmp_path / "run")[0]
    assert {name for name, place in places.items() if place != "meta"} == {n for n in places if "visual." in n}


def see_alignment(recipe: Path, run: Path) -> list[tuple[torch.dtype, str]]:
    overrides = ["vision.steps=1", 'precision="bf16"', "alignment.zero=2"]
    (run / "vision").mkdir(parents=True, exist_ok=True)
    (run / "vision" / "model").symlink_to(recipe.parent / "begin")
    found = opened("alignment", recipe, run, overrides)
    shape = tuple(found.model.language_model.layers[0].mlp.gate_proj.weight.shape)
    alive = held(shape)
    found.trainer.loader.close()
    return alive


def test_what_alignment_does_not_train_is_held_once_in_the_dtype_of_training(recipe, tmp_path):
    alive = run_distributed(see_alignment, 1, 200, recipe, tmp_path / "run")[0]
    # gate_proj and up_proj of two layers, each of one shape: four tensors, none of them a second time or in fp32.
    assert alive == [(torch.bfloat16, "cpu")] * 4


@pytest.mark.parametrize("zero", [2, 3])
def test_masters_begin_with_the_fp32_of_the_file_and_frozen_parts_leave_as_they_came(recipe, tmp_path, zero):
    overrides = [
        'precision="bf16"',
        f"alignment.zero={zero}",
        "alignment.learning_rate=1e-9",
        "alignment.max_grad_norm=1e-12",
    ]
    run_distributed(align, 2, 300, recipe, tmp_path / "run", overrides)
    start, end = (open_checkpoint(path) for path in (tmp_path / "begin", tmp_path / "run" / "alignment" / "model"))
    assert start.keys() == end.keys()
    for name in start:
        before, after = start[name].read(), end[name].read()
        assert after.dtype == torch.float32
        # The learning rate is far below what bf16 tells apart: rounded masters would be off by up to 1e-2 of a weight.
        torch.testing.assert_close(after, before, rtol=0, atol=2e-9 if "projector" in name else 0, msg=name)
    model = KeyeForConditionalGeneration.from_pretrained(tmp_path / "run" / "alignment" / "model")
    assert model.dtype == torch.float32 and model.config.dtype == torch.float32


def align(recipe: Path, run: Path, overrides: list[str]) -> None:
    settings = load(recipe, overrides)
    opened_before = run / "vision"
    engine.start(threads=1)
    if dist.get_rank() == 0:
        opened_before.mkdir(parents=True)
        (opened_before / "model").symlink_to(recipe.parent / "begin")
        prepare_world(settings, run)
        prepare_tokenizer(settings, run)
    dist.barrier()
    run_stage("alignment", settings, run, Cache(1 << 24))


def fail_to_write(recipe: Path, run: Path) -> list[str]:
    """The errors of a folder that cannot be made, and of a disk that is full after the first file."""
    found = opened("vision", recipe, run, [])
    found.trainer.loader.close()
    (run / "full").write_text("a file where a folder should be made")

    def no_space(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    messages = []
    for out, extras in ((run / "full/model", found.processor.save_pretrained), (run / "vision/model", no_space)):
        try:
            replace_model(found.model, found.module, found.start, out, extras)
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def test_model_that_cannot_be_written_is_said_on_every_rank(recipe, tmp_path):
    messages = run_distributed(fail_to_write, 2, 200, recipe, tmp_path / "run")
    assert messages[0] == messages[1] and len(messages[0]) == 2
    assert "full/model" in messages[0][0] and "Not a directory" in messages[0][0]
    assert "vision/model cannot be written (No space left on device); make room" in messages[0][1]
    assert not (tmp_path / "run/vision/model").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_of_a_file_are_its_tensors(tmp_path, dtype):
    model = small.model(seed=1).to(dtype)
    model.save_pretrained(tmp_path / "model")
    stored = open_checkpoint(tmp_path / "model")
    for name, tensor in stored.items():
        assert torch.equal(tensor.mapped(), tensor.read()) and torch.equal(tensor.mapped(), model.get_parameter(name))
    name = next(iter(stored))
    stored[name].mapped().zero_()
    assert torch.equal(stored[name].mapped(), model.get_parameter(name))
