"""The slow stage and the loop: resumed equals uninterrupted, two processes equal one, the memory stays fixed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from keye.dream.episode import FastSettings
from keye.dream.model import DreamConfig, DreamModel
from keye.errors import CheckpointError, RecipeError
from stages.dream import loop as loops
from stages.dream import slow
from stages.dream.recipe import DreamRecipe, LoopRecipe, load
from stages.dream.state import sum_gradients
from stages.optimizer import OptimizerConfig
from tests.distributed import run_distributed

RECIPE = DreamRecipe(
    "test",
    OptimizerConfig(learning_rate=1e-3, warmup=1),
    steps=6,
    batch=4,
    single_past_every=2,
    checkpoint_every=2,
    model=DreamConfig(width=16, depth=1, heads=2),
    fast=FastSettings(steps=1, draws=2, rank=2, alpha=2, sampling_steps=2),
    loop=LoopRecipe(rounds=2, episodes=2, updates=2, group=2, draws=2, learning_rate=1e-3),
)


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Killed(Exception):
    pass


def killed_after(monkeypatch, module, name: str, calls: int) -> None:
    """Make a function of a module raise at its call number `calls`."""
    function, count = getattr(module, name), [0]

    def call(*given):
        count[0] += 1
        if count[0] == calls:
            raise Killed
        return function(*given)

    monkeypatch.setattr(module, name, call)


def test_a_killed_slow_stage_resumes_to_the_bits_of_an_uninterrupted_one(tmp_path, monkeypatch):
    slow.train(RECIPE, tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_after(patched, slow, "slow_step", 6)  # after the checkpoint of step 4 and one more step
        slow.train(RECIPE, tmp_path / "killed")
    assert len(lines(tmp_path / "killed")) == 5
    slow.train(RECIPE, tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(CheckpointError, match="another seed"):
        slow.train(dataclasses.replace(RECIPE, seed=1), tmp_path / "whole")


def test_a_killed_loop_resumes_to_the_bits_of_an_uninterrupted_one(tmp_path, monkeypatch):
    start = slow.train(RECIPE, tmp_path / "run").state_dict()

    def again(out: Path) -> None:
        model = DreamModel(RECIPE.model)
        model.load_state_dict(start)
        loops.loop(model, RECIPE, out)

    again(tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_after(patched, loops, "slow_update", 4)
        again(tmp_path / "killed")
    assert [line["round"] for line in lines(tmp_path / "killed")] == [1]
    again(tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole") != weights(tmp_path / "run")
    other = dataclasses.replace(RECIPE, loop=dataclasses.replace(RECIPE.loop, memory=False))
    model = DreamModel(RECIPE.model)
    with pytest.raises(CheckpointError, match="begun with another model, memory;"):
        loops.loop(model, other, tmp_path / "whole")


def test_the_slow_update_changes_the_slow_weights_under_memories_that_stay_fixed():
    torch.manual_seed(0)
    model = DreamModel(RECIPE.model)
    torch.nn.init.normal_(model.paint.weight, std=0.1)
    stored = loops.fast_episode(model, RECIPE, 0, 0)
    assert [chunk.writes for chunk in stored] == list(range(len(stored)))  # the first memory is empty
    assert all(chunk.memory[name].abs().max() > 0 for chunk in stored[1:] for name in chunk.memory)
    memories = [{name: value.clone() for name, value in chunk.memory.items()} for chunk in stored]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loops.slow_update(model, optimizer, RECIPE, stored, 0, 0)
    assert all(
        torch.equal(value, memory[name])
        for chunk, memory in zip(stored, memories, strict=True)
        for name, value in chunk.memory.items()
    )
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters() if "weight" in name)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_memory_is_part_of_the_slow_loss():
    """The gradient under a stored memory is that of weights with its change added by hand."""
    torch.manual_seed(0)
    model = DreamModel(RECIPE.model)
    torch.nn.init.normal_(model.paint.weight, std=0.1)
    recipe = dataclasses.replace(RECIPE, fast=dataclasses.replace(RECIPE.fast, learning_rate=0.1, steps=3))
    stored = loops.fast_episode(model, recipe, 0, 1)[-1:]
    changed = DreamModel(RECIPE.model)
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, layer in changed.named_modules():
            if f"{name}.A" in stored[0].memory:
                layer.weight += stored[0].memory[f"{name}.B"] @ stored[0].memory[f"{name}.A"]
    bare = [dataclasses.replace(stored[0], memory={}, writes=0)]
    losses = [
        loops.slow_update(made, torch.optim.SGD(made.parameters(), lr=0.0), recipe, chunks, 0, 0)
        for made, chunks in ((model, stored), (changed, bare), (model, bare))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-4)


def gradients(rounds: int) -> tuple[dict[str, torch.Tensor], float]:
    torch.manual_seed(0)
    model = DreamModel(RECIPE.model)
    torch.nn.init.normal_(model.paint.weight, std=0.1)
    loss = slow.slow_step(model, RECIPE, rounds, torch.device("cpu"))["loss"]
    return {name: value.grad for name, value in model.named_parameters()}, loss


def test_two_processes_train_on_what_one_trains_on():
    alone, loss = gradients(3)
    for found, other in run_distributed(gradients, 2, 120, 3):
        assert other == pytest.approx(loss, rel=1e-5)
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)


def test_gradients_of_one_process_pass_unchanged():
    layer = torch.nn.Linear(2, 2)
    layer.weight.grad = torch.arange(4.0).view(2, 2)
    assert sum_gradients(layer, 3.0) == [3.0]
    assert torch.equal(layer.weight.grad, torch.arange(4.0).view(2, 2)) and layer.bias.grad.abs().max() == 0


def test_the_shipped_recipe_is_read_and_a_wrong_one_named():
    path = Path(slow.__file__).parent / "recipes" / "tiny.toml"
    assert load(path).steps == 1500 and load(path, ["fast.rank=8"]).fast.rank == 8
    for override, message in (
        ("fast.write=always", "is not one of"),
        ("fast.write=none", "loop.memory needs a memory"),
        ("loop.rounds=0", "loop.rounds must be at least 1"),
        ("unconditional=1.0", "unconditional must be"),
        ("model.width=10", "multiple"),
        ("speps=3", "unknown key speps"),
    ):
        with pytest.raises(RecipeError, match=message):
            load(path, [override])
