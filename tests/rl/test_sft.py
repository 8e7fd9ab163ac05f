"""SFT trains on the answers of chats, on any number of processes; the phases of a recipe follow each other."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keye.errors import CheckpointError, KeyeError, RecipeError
from rl.phases import post_train
from rl.preference.recipe import Mpo, Sampling, Sft
from rl.recipe import Gspo, HeldOut, RlRecipe, load
from rl.rollout.config import Rollout
from rl.sft import SftTrainer
from stages.data.loader import Loader
from stages.distributed import engine
from stages.recipe import DataRecipe, SourceRecipe
from tests.distributed import run_distributed
from tests.rl.test_trainer import make_run

SFT = Sft(
    steps=4, learning_rate=1e-2, schedule="constant", context=64, global_batch_size=2, max_new_tokens=2,
    checkpoint_every=3, keep_finished=True,
    data=DataRecipe((SourceRecipe("{run}/chats.jsonl", "text"),), workers=1), freeze=("visual",),
)  # fmt: skip
RECIPE = RlRecipe(heldout=HeldOut(limit=4, samples=1), rewards={"accuracy": 1.0}, sft=SFT)


def make_chats(folder: Path) -> Path:
    """A run with chats whose answers are those of its questions."""
    run = make_run(folder)
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}"}]} for i in range(9)
    ]
    (run / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def stopped_and_resumed(run: Path) -> str:
    engine.start(threads=1)
    draws, draw = [0], Loader.next

    def signalled(self: Loader) -> dict:
        draws[0] += 1
        if draws[0] == 2 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self)

    Loader.next = signalled
    with pytest.raises(KeyeError) as caught:
        SftTrainer(RECIPE, run).train()
    Loader.next = draw
    result = SftTrainer(RECIPE, run).train()
    assert SftTrainer(RECIPE, run).train() == result
    return str(caught.value)


def whole(run: Path) -> list[str]:
    engine.start(threads=1)
    SftTrainer(RECIPE, run).train()
    changed = dataclasses.replace(RECIPE, sft=dataclasses.replace(SFT, learning_rate=1e-3))
    with pytest.raises(CheckpointError) as rate:
        SftTrainer(changed, run)
    with (run / "chats.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(CheckpointError) as data:
        SftTrainer(RECIPE, run)
    return [str(rate.value), str(data.value)]


@pytest.mark.slow
def test_two_processes_that_were_stopped_and_resumed_equal_one(tmp_path):
    runs = [make_chats(tmp_path / name) for name in ("two", "one")]
    assert (
        run_distributed(stopped_and_resumed, 2, 240, runs[0])
        == ["sft: stopped at step 2; the same command resumes from it"] * 2
    )
    [(rate, data)] = run_distributed(whole, 1, 240, runs[1])
    assert "sft.learning_rate = 0.01, but the recipe says 0.001; remove" in rate and "chats.jsonl has changed" in data
    rows = [[json.loads(line) for line in (run / "sft/metrics.jsonl").read_text().splitlines()] for run in runs]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["step"] == theirs["step"] and ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert len(rows[1]) == 4 and rows[1][-1]["loss"] < rows[1][0]["loss"] - 1
    one, two, start = (
        load_file(p / "model/model.safetensors") for p in (runs[1] / "sft", runs[0] / "sft", runs[1] / "annealing")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-3, rtol=2e-2)
        if "visual" in name:
            assert torch.equal(value, start[name])


def chain(run: Path) -> list[str]:
    engine.start(threads=1)
    mpo = Mpo(
        steps=1, learning_rate=1e-3, batch_size=2, max_new_tokens=8, sampling=Sampling(samples=16, method="ranking"),
    )  # fmt: skip
    gspo = Gspo(steps=1, learning_rate=1e-3, start="mpo", prompts=2, group_size=2, mini_batches=1, max_new_tokens=2)
    recipe = dataclasses.replace(
        RECIPE, sft=dataclasses.replace(SFT, steps=8, max_new_tokens=8, keep_finished=False), mpo=mpo, gspo=gspo,
        rewards={"format": 1.0, "accuracy": 1.0}, seed=3, rollout=Rollout(stop_tokens=tuple("0123456789?")),
    )  # fmt: skip
    assert list(post_train(recipe, run, "sft")) == ["sft"]
    times = {path: path.stat().st_mtime_ns for path in (run / "sft/model").iterdir()}
    seen: list[str] = []
    results = post_train(recipe, run, done=lambda name, result: seen.append(name))
    assert list(results) == seen and times == {path: path.stat().st_mtime_ns for path in times}
    # The same questions and draws: where a phase ends, the next one starts.
    assert results["sft"]["after"] == results["mpo"]["before"]
    assert results["mpo"]["after"] == results["gspo"]["before"]
    return seen


def test_phases_follow_each_other_and_finished_ones_are_not_run_again(tmp_path):
    run = make_chats(tmp_path)
    assert run_distributed(chain, 1, 240, run) == [["sft", "mpo", "gspo"]]
    assert not (run / "sft/checkpoints").exists()
    for phase in ("sft", "mpo", "gspo"):
        assert {"recipe.toml", "run.json", "metrics.jsonl", "before.jsonl", "after.jsonl", "eval.json", "model"} <= {
            path.name for path in (run / phase).iterdir()
        }


ONE = "steps = 1\nlearning_rate = 1e-3\n"
SOURCE = '[[sft.data.sources]]\npath = "a"\n'


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("", "no phase; add one of the tables sft, mpo, gspo"),
        (f"[sft]\n{ONE}", "sft.data is missing"),
        (f"[sft]\n{ONE}[sft.data]\nsources = []\n", "sft.data.sources is empty"),
        (f'[sft]\n{ONE}start = "sft"\n{SOURCE}kind = "text"\n', "sft.start"),
        (f'[sft]\n{ONE}{SOURCE}kind = "sound"\n', "sft.data.sources.0..kind must"),
        (f'[sft]\n{ONE}{SOURCE}kind = "text"\nstages = ["vision"]\n', "stages is of"),
        (f"[mpo]\n{ONE}beta = 0\n", "mpo.beta must be above 0"),
        (f"[mpo]\n{ONE}[mpo.sampling]\nmethod = 'best'\n", "mpo.sampling.method"),
        (f"[mpo]\n{ONE}preference = 0\nquality = 0\ngeneration = 0\n", "not all 0"),
    ],
)
def test_mistakes_of_a_recipe_are_named(tmp_path, table, said):
    path = tmp_path / "mine.toml"
    path.write_text(table)
    with pytest.raises(RecipeError, match=said):
        load(path)


def test_the_tiny_recipe_has_three_phases_and_the_weights_of_the_paper():
    recipe = load(Path(__file__).resolve().parents[2] / "rl/recipes/tiny_post.toml")
    assert recipe.phases == ["sft", "mpo", "gspo"]
    assert (recipe.mpo.preference, recipe.mpo.quality, recipe.mpo.generation) == (0.8, 0.2, 1.0)
    with pytest.raises(RecipeError, match="the recipe has no phase mpo; it has gspo"):
        post_train(dataclasses.replace(recipe, sft=None, mpo=None), "runs/none", "mpo")
