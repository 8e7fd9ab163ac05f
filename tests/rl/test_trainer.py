"""A complete GSPO run of a tiny model: resumed on other processes, never mixed with another run."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from keye.errors import CheckpointError, KeyeError, ManifestError
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor
from keye.processor.tokenizer import train_tokenizer
from rl.recipe import Gspo, HeldOut, RlRecipe
from rl.rollout.config import Rollout
from rl.run.agree import agree
from rl.trainer import GspoTrainer
from stages.distributed import engine
from tests.distributed import run_distributed

GSPO = Gspo(steps=2, learning_rate=1e-3, prompts=6, group_size=3, mini_batches=2, max_new_tokens=2, checkpoint_every=1)
RECIPE = RlRecipe(GSPO, HeldOut(limit=4, samples=1), {"format": 1.0})


def make_run(folder: Path, seed: int = 0) -> Path:
    """`annealing/model` and a world of questions in words."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(["how many flashes? user assistant 0123456789"] * 4, 300)
    processor = KeyeProcessor(tokenizer)
    config = KeyeConfig.preset("tiny", vocab_size=len(tokenizer), num_hidden_layers=1)
    config.vision_config.num_hidden_layers = 1
    KeyeForConditionalGeneration(processor.configure(config)).save_pretrained(folder / "annealing/model")
    processor.save_pretrained(folder / "annealing/model")
    (folder / "world").mkdir(exist_ok=True)
    for split, count in (("train", 9), ("heldout", 5)):
        lines = [
            {"id": f"{split}{i}", "answer": str(i), "messages": [{"role": "user", "content": f"{i}?"}]}
            for i in range(count)
        ]
        (folder / f"world/{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def train(run: Path, recipe: RlRecipe = RECIPE) -> dict:
    engine.start(threads=1)
    trainer = GspoTrainer(recipe, run)
    trainer.train()
    return {"step": trainer.step, "stream": trainer.stream.state_dict()}


@pytest.mark.slow
def test_a_run_is_resumed_on_another_number_of_processes(tmp_path):
    run = make_run(tmp_path)
    two = run_distributed(train, 2, 240, run)
    # Six prompts of nine a step: after two steps the second epoch's third place.
    assert two == [{"step": 2, "stream": {"epoch": 1, "position": 3, "questions": 9}}] * 2
    for world, steps in ((1, 4), (3, 5)):
        longer = dataclasses.replace(RECIPE, gspo=dataclasses.replace(GSPO, steps=steps))
        done = run_distributed(train, world, 240, run, longer)
        assert [one["step"] for one in done] == [steps] * world
    rows = [json.loads(line) for line in (run / "gspo/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert done[0]["stream"] == {"epoch": 3, "position": 3, "questions": 9}


def test_one_process_samples_the_answers_of_two(tmp_path):
    """Also with a correction for the sampler and a penalty; the sampler agrees with the trainer."""
    options = {"steps": 1, "truncated": "penalise", "overlong_penalty": 0.5, "importance": "truncated"}
    options["max_new_tokens"] = 12
    stops = Rollout(stop_tokens=tuple("0123456789"))
    recipe = dataclasses.replace(RECIPE, gspo=dataclasses.replace(GSPO, **options), rollout=stops)
    rows = []
    for world in (1, 2):
        run = make_run(tmp_path / str(world))
        run_distributed(train, world, 240, run, recipe)
        rows.append(json.loads((run / "gspo/metrics.jsonl").read_text()))
        assert (run / "gspo/before.jsonl").is_file()
    for name in ("response_length", "reward_mean", "finished", "reward/overlong"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-5), name
    assert 0 < rows[0]["finished"] < 1
    assert rows[0]["reward/overlong"] == pytest.approx(0.5 * (rows[0]["finished"] - 1))
    assert rows[0]["sampler_difference_max"] < 1e-5 and rows[0]["sampler_ess"] == pytest.approx(1)
    assert rows[0]["importance_weight"] == pytest.approx(1, abs=1e-4)
    sets = [{line for line in (tmp_path / w / "gspo/before.jsonl").read_text().splitlines()} for w in "12"]
    assert sets[0] == sets[1]


class Signalled(GspoTrainer):
    """Rank 1 gets SIGTERM while the second of four steps is computed."""

    def _update(self, *args):
        if self.step == 1 and self.rank == self.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super()._update(*args)


def stopped_and_resumed(run: Path, whole: Path) -> dict:
    engine.start(threads=1)
    recipe = dataclasses.replace(RECIPE, gspo=dataclasses.replace(GSPO, steps=4, checkpoint_every=3))
    before = signal.getsignal(signal.SIGTERM)
    begun = Signalled(recipe, run)
    with pytest.raises(KeyeError) as caught:
        begun.train()
    found = {"error": str(caught.value), "step": begun.step, "model": (run / "gspo/model").exists()}
    found["handler"] = signal.getsignal(signal.SIGTERM) is before
    resumed, uninterrupted = GspoTrainer(recipe, run), GspoTrainer(recipe, whole)
    resumed.train(), uninterrupted.train()
    pairs = zip(resumed.model.parameters(), uninterrupted.model.parameters(), strict=True)
    return found | {"equal": all(torch.equal(one, other) for one, other in pairs), "last": resumed.step}


def test_sigterm_of_one_rank_saves_and_stops_all_and_the_run_resumes(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("begun", "whole")]
    for found in run_distributed(stopped_and_resumed, 2, 240, *runs):
        assert found == {
            "error": "gspo: stopped at step 2; the same command resumes from it", "step": 2, "model": False,
            "handler": True, "equal": True, "last": 4,
        }  # fmt: skip
    steps = [json.loads(line)["step"] for line in (runs[0] / "gspo/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def metrics_that_are_a_folder(run: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        train(run)
    return str(caught.value)


def test_metrics_that_cannot_be_opened_end_all_ranks(tmp_path):
    run = make_run(tmp_path)
    (run / "gspo/tensorboard").parent.mkdir()
    (run / "gspo/tensorboard").write_text("a file")
    first, second = run_distributed(metrics_that_are_a_folder, 2, 120, run)
    assert first == second and "the metrics cannot be written to" in first


def refused(run: Path, other: Path) -> list[str]:
    train(run, dataclasses.replace(RECIPE, gspo=dataclasses.replace(GSPO, steps=1)))
    said = []
    for recipe in (
        dataclasses.replace(RECIPE, gspo=dataclasses.replace(GSPO, steps=1, learning_rate=2e-3)),
        dataclasses.replace(RECIPE, rewards={"format": 0.5}),
    ):
        with pytest.raises(CheckpointError) as caught:
            train(run, recipe)
        said.append(str(caught.value))
    shutil.rmtree(run / "annealing")
    shutil.copytree(other / "annealing", run / "annealing")
    with pytest.raises(CheckpointError) as caught:
        train(run)
    return [*said, str(caught.value)]


def test_a_run_refuses_another_recipe_and_another_start(tmp_path):
    runs = [make_run(tmp_path / name, seed) for seed, name in enumerate("ab")]
    [(rate, rewards, start)] = run_distributed(refused, 1, 240, *runs)
    assert "learning_rate = 0.001, but the recipe says 0.002; remove" in rate
    assert "rewards.format = 1.0, but the recipe says 0.5" in rewards
    assert "annealing/model/model.safetensors has changed since" in start and "put it back" in start


def one_rank_without_its_file(run: Path) -> str:
    """Rank 1 has a copy of the run whose manifest is missing, as on a node whose disk was not filled."""
    if dist.get_rank() == 1:
        other = run.with_name("node1")
        shutil.copytree(run, other)
        (other / "world/train.jsonl").unlink()
        run = other
    with pytest.raises(ManifestError) as caught:
        train(run)
    return str(caught.value)


def test_one_ranks_error_ends_all_ranks(tmp_path):
    said = run_distributed(one_rank_without_its_file, 2, 120, make_run(tmp_path / "node0"))
    assert said[0] == said[1] and "node1/world/train.jsonl does not exist" in said[0]


def one_of_two_fails() -> str:
    def action() -> int:
        if dist.get_rank() == 1:
            raise ManifestError("the clip is gone")
        return 3

    with pytest.raises(ManifestError) as caught:
        agree(action)
    assert agree(dist.get_rank) == dist.get_rank()
    return str(caught.value)


def test_agree_raises_on_all_ranks_and_gives_each_its_own_result():
    assert run_distributed(one_of_two_fails, 2, 60) == ["the clip is gone"] * 2
