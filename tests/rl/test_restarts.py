"""A run with a curriculum, probes, a guard and a best model continues after a kill as if nothing had happened."""

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from keye.errors import KeyeError
from rl import trainer as module
from rl.blindness import Blindness
from rl.recipe import RlRecipe
from rl.rewards import Judgement, register
from rl.run.agree import gather
from rl.trainer import GspoTrainer
from stages.distributed import engine
from tests.distributed import run_distributed
from tests.rl.test_trainer import GSPO, RECIPE, make_run

TIMES = ("seconds", "tokens_per_second", "eta_seconds")


@register("letters")
class Letters:
    """Share of an answer's characters that are digits, with its length; equal for all answers to even questions."""

    in_process = True

    def __call__(self, judgement: Judgement) -> float:
        if int(judgement.prompt.answer) % 4 == 0:
            return 0.5
        text = judgement.text
        return (sum(map(str.isdigit, text)) / len(text) if text else 0.0) + len(set(text)) / 100


def recipe_of(steps: int, **blindness: object) -> RlRecipe:
    gspo = dataclasses.replace(
        GSPO, steps=steps, learning_rate=0.01, extra_prompts=3, curriculum_floor=0.5, max_new_tokens=3
    )
    watched = Blindness(every=1, questions=3, samples=2, **({"guard": "penalise"} | blindness))
    heldout = dataclasses.replace(RECIPE.heldout, every=1)
    return RlRecipe(gspo, heldout, {"letters": 1.0}, blindness=watched)


def make_visual_run(folder: Path) -> Path:
    """A run whose questions have stills, except the first of each manifest."""
    make_run(folder)
    for split in ("train", "heldout"):
        path = folder / f"world/{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for i, row in enumerate(rows[1:], 1):
            name = f"{split}{i}.png"
            Image.fromarray(np.full((56, 56, 3), 25 * i, dtype=np.uint8)).save(folder / "world" / name)
            row["messages"][0]["content"] = [{"type": "image", "image": name}, {"type": "text", "text": f"{i}?"}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def curve(run: Path) -> list[dict]:
    """The metrics without times."""
    rows = [json.loads(line) for line in (run / "gspo/metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def train(run: Path, steps: int) -> dict:
    engine.start(threads=1)
    trainer = GspoTrainer(recipe_of(steps), run)
    generate, calls = trainer.rollout.generate, itertools.count()
    trainer.rollout.generate = lambda *args, **more: (next(calls), generate(*args, **more))[1]
    result = trainer.train()
    state = {"calls": next(calls), "accuracy": trainer.curriculum.accuracy, "best": dataclasses.asdict(trainer.best)}
    state |= {"stream": trainer.stream.state_dict(), "result": result, "low": trainer.blindness.low}
    state["weights"] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return state


def trained_then_failing(run: Path) -> dict:
    state = train(run, 2)
    trainer = GspoTrainer(recipe_of(2), run)
    if dist.get_rank() == 1:
        trainer.blindness.ask = lambda asked, samples: (_ for _ in ()).throw(KeyeError("the engine of rank 1 is gone"))
    with pytest.raises(KeyeError) as caught:
        trainer.blindness.probe(1)
    return state | {"error": str(caught.value), "after": gather(dist.get_rank())}


def test_ranks_agree_on_questions_probes_and_the_best_model_and_an_error_ends_all(tmp_path):
    run = make_visual_run(tmp_path)
    first, second = run_distributed(trained_then_failing, 2, 240, run)
    for key in ("calls", "best", "stream", "low"):
        assert first[key] == second[key], key
    assert torch.equal(first["accuracy"].nan_to_num(-1), second["accuracy"].nan_to_num(-1))
    assert (~first["accuracy"].isnan()).sum() >= 6  # every question of the first step has a running accuracy
    rows = curve(run)
    for row in rows:
        assert {"seen", "blind/blind", "gap/zeroed", "gap/other", "gap/smallest", "blind/own", "gap/own"} <= row.keys()
        assert row["seen"] - row["blind/blind"] == pytest.approx(row["gap/blind"])
    assert sum(row.get("replaced", 0) for row in rows) > 0
    assert "heldout/reward_mean" in rows[0] and "heldout/reward_mean" not in rows[1]  # the last is eval.json's
    result = first["result"]
    rewards = [result["before"]["reward_mean"], rows[0]["heldout/reward_mean"], result["after"]["reward_mean"]]
    assert result["best"] == first["best"]
    assert first["best"]["reward"] == pytest.approx(max(rewards[1:])) and first["best"]["step"] in (1, 2)
    assert (run / "gspo/model-best/config.json").is_file()
    assert json.loads((run / "gspo/model-best.json").read_text()) == first["best"]
    for found in (first, second):
        assert found["error"] == "the engine of rank 1 is gone" and found["after"] == [0, 1]


class Killed(GspoTrainer):
    """Every rank is killed at a place of the third step."""

    place = ""

    def _die(self, place: str, step: int) -> None:
        if place == self.place and self.step == step:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)

    def _answer(self, *args):
        found = super()._answer(*args)
        self._die("rollout", 2)
        return found

    def _update(self, *args):
        found = super()._update(*args)
        self._die("update", 2)
        return found

    def _probes(self):
        found = super()._probes()
        self._die("probes", 3)
        return found


def killed(run: Path, place: str) -> None:
    engine.start(threads=1)
    Killed.place = place
    trainer = Killed(recipe_of(4), run)
    save_checkpoint = module.save_checkpoint

    def torn(engine, folder, step, *args, **more):
        """The files of this rank's first part are written, and nothing else."""
        write = engine.checkpoint_engine.save
        if step == 3:
            engine.checkpoint_engine.save = lambda state, path: (write(state, path), trainer._die("save", 3))
        return save_checkpoint(engine, folder, step, *args, **more)

    module.save_checkpoint = torn
    trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["rollout", "update", "probes", "save"])
def test_a_run_that_was_killed_has_the_curve_of_an_uninterrupted_one(tmp_path, place):
    whole, run = make_visual_run(tmp_path / "whole"), make_visual_run(tmp_path / "run")
    expected = run_distributed(train, 2, 400, whole, 4)
    with pytest.raises((RuntimeError, TimeoutError)):
        run_distributed(killed, 2, 400, run, place)
    found = run_distributed(train, 2, 400, run, 4)
    assert curve(run) == curve(whole)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine["weights"], theirs["weights"])
        assert mine["best"] == theirs["best"] and mine["stream"] == theirs["stream"] and mine["low"] == theirs["low"]
        assert torch.equal(mine["accuracy"].nan_to_num(-1), theirs["accuracy"].nan_to_num(-1))


@pytest.mark.slow
def test_states_continue_on_another_number_of_processes(tmp_path):
    run = make_visual_run(tmp_path)
    [first, _] = run_distributed(train, 2, 400, run, 1)
    before = first["accuracy"]
    [alone] = run_distributed(train, 1, 400, run, 2)
    three = run_distributed(train, 3, 400, run, 3)
    assert [row["step"] for row in curve(run)] == [1, 2, 3]
    assert set(before.isnan().nonzero().flatten().tolist()) >= set(
        alone["accuracy"].isnan().nonzero().flatten().tolist()
    )
    for other in three[1:]:
        assert torch.equal(other["accuracy"].nan_to_num(-1), three[0]["accuracy"].nan_to_num(-1))
        assert other["best"] == three[0]["best"] and other["stream"] == three[0]["stream"]
    assert three[0]["best"]["reward"] >= alone["best"]["reward"] >= first["best"]["reward"]


def stopped(run: Path) -> list[str]:
    """The start model answers at random with and without stills, so that its gap is small from the beginning."""
    engine.start(threads=1)
    said = []
    for _ in range(2):
        trainer = GspoTrainer(recipe_of(4, guard="stop", stop_gap=0.9, stop_probes=2), run)
        trainer.blindness.ask = lambda asked, samples: [0.95] * len(asked)
        with pytest.raises(KeyeError) as caught:
            trainer.train()
        said.append(str(caught.value))
    return [*said, str(trainer.step)]


@pytest.mark.slow
def test_the_guard_stops_the_run_with_a_checkpoint_and_it_does_not_resume(tmp_path):
    run = make_visual_run(tmp_path)
    for first, again, step in run_distributed(stopped, 2, 400, run):
        assert first == again and step == "2"
        assert first.startswith("gspo: stopped at step 2, because the policy answers without its frames")
    assert (run / "gspo/checkpoints/step-2").is_dir() and not (run / "gspo/model").exists()
