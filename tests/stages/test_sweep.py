"""Sweeps over mixtures of experts: every mixture on the grid is scored, the best is kept, a stopped one goes on."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from keye.errors import CheckpointError
from keye.evaluation import Outcome, Report
from stages.merge import merge
from stages.sweep import grid, mixtures, sweep

QUESTIONS = 20


def expert(folder: Path, value: float) -> Path:
    folder.mkdir()
    save_file({"w": torch.full((4,), value), "ids": torch.arange(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def experts(tmp_path: Path) -> list[Path]:
    return [expert(tmp_path / "a", 1.0), expert(tmp_path / "b", 0.0)]


def report(right: int) -> Report:
    outcomes = [
        Outcome(i, str(i), "even" if i % 2 == 0 else "odd", "x", "x", i < right, 0.5, 0.5, None)
        for i in range(QUESTIONS)
    ]
    return Report("dev", outcomes)


def value(model: Path) -> float:
    return float(load_file(model / "model.safetensors")["w"][0])


class Scorer:
    """Right answers fall with the distance of the model's weight from `best`; counts what it was asked."""

    def __init__(self, best: float) -> None:
        self.best, self.asked = best, []

    def __call__(self, model: Path) -> Report:
        self.asked.append(value(model))
        return report(round(QUESTIONS * (1 - abs(value(model) - self.best))))


def quiet(_: str) -> None:
    pass


def test_grid_has_both_ends():
    assert grid("0:1:0.25") == [0, 0.25, 0.5, 0.75, 1]
    assert grid("0.2:0.8:0.3") == [0.2, 0.5, 0.8]
    assert grid("0:1:0.1")[3] == 0.3


@pytest.mark.parametrize("text", ["0:1", "0:1:0", "1:0:0.5", "a:b:c", "0:1:0.00001"])
def test_a_grid_that_is_none_is_named(text: str):
    with pytest.raises(CheckpointError, match=f"--sweep {text}"):
        grid(text)


def test_mixtures_add_up_to_one_unless_there_is_a_base():
    assert mixtures([0, 0.5, 1], 2, free=False) == [(0, 1), (0.5, 0.5), (1, 0)]
    three = mixtures(grid("0:1:0.25"), 3, free=False)
    assert len(three) == 15 and all(sum(weights) == pytest.approx(1) and min(weights) >= 0 for weights in three)
    assert mixtures([0.5, 1], 2, free=True) == [(0.5, 0.5), (0.5, 1), (1, 0.5), (1, 1)]
    with pytest.raises(CheckpointError, match=r"5 \*\* 6 mixtures are more than 1000"):
        mixtures(grid("0:1:0.25"), 6, free=True)
    with pytest.raises(CheckpointError, match="no mixture whose weights"):
        mixtures([2.0], 2, free=False)


def test_every_mixture_is_scored_and_the_best_is_kept(experts: list[Path], tmp_path: Path):
    score = Scorer(best=0.25)
    best = sweep(experts, tmp_path / "out", grid("0:1:0.25"), score, {}, say=quiet)
    assert score.asked == [0, 0.25, 0.5, 0.75, 1] and best.weights == (0.25, 0.75)
    assert value(tmp_path / "out") == 0.25
    folder = tmp_path / "out.sweep"
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [float(row["accuracy"]) for row in rows] == [0.75, 1, 0.75, 0.5, 0.25]
    assert [float(row["weight_1"]) for row in rows] == [0, 0.25, 0.5, 0.75, 1] and rows[1]["even"] == "1.000000"
    assert (folder / "sweep.png").stat().st_size > 1000
    assert not (folder / "trial").exists()  # only the best model stays


def test_of_mixtures_that_score_alike_the_most_even_is_taken(experts: list[Path], tmp_path: Path):
    best = sweep(experts, tmp_path / "out", grid("0:1:0.25"), lambda _: report(10), {}, say=quiet)
    assert best.weights == (0.5, 0.5)


def test_a_stopped_sweep_is_resumed(experts: list[Path], tmp_path: Path):
    score, stopped = Scorer(best=0.75), []

    def stopping(model: Path) -> Report:
        if len(stopped) == 3:
            raise KeyboardInterrupt
        stopped.append(model)
        return score(model)

    with pytest.raises(KeyboardInterrupt):
        sweep(experts, tmp_path / "out", grid("0:1:0.25"), stopping, {"limit": 5}, say=quiet)
    assert not (tmp_path / "out").exists()
    best = sweep(experts, tmp_path / "out", grid("0:1:0.25"), score, {"limit": 5}, say=quiet)
    assert score.asked == [0, 0.25, 0.5, 0.75, 1] and best.weights == (0.75, 0.25)


def test_another_sweep_at_the_same_place_is_refused(experts: list[Path], tmp_path: Path):
    sweep(experts, tmp_path / "out", [0, 1], Scorer(1.0), {"limit": 5}, say=quiet)
    with pytest.raises(CheckpointError, match="out exists already"):
        sweep(experts, tmp_path / "out", [0, 1], Scorer(1.0), {"limit": 5}, say=quiet)
    (tmp_path / "out").rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match="out.sweep has a sweep with other limit"):
        sweep(experts, tmp_path / "out", [0, 1], Scorer(1.0), {"limit": 6}, say=quiet)
    save_file({"w": torch.full((4,), 3.0), "ids": torch.arange(3)}, experts[0] / "model.safetensors")
    with pytest.raises(CheckpointError, match="out.sweep has a sweep with other models"):
        sweep(experts, tmp_path / "out", [0, 1], Scorer(1.0), {"limit": 5}, say=quiet)


def test_a_base_takes_what_training_changed(tmp_path: Path):
    base = expert(tmp_path / "base", 10.0)
    one, two = expert(tmp_path / "one", 11.0), expert(tmp_path / "two", 6.0)
    merged = merge([one, two], tmp_path / "merged", [0.5, 2.0], progress=False, base=base)
    assert value(merged) == 10 + 0.5 * 1 + 2 * -4
    assert json.loads((merged / "merge.json").read_text())["weights"] == [0.5, 2.0, -1.5]
    assert value(merge([one, two], tmp_path / "mean", progress=False, base=base)) == 8.5
    best = sweep([one], tmp_path / "out", grid("0:2:0.5"), Scorer(11.5), {}, base, quiet)
    assert best.weights == (1.5,) and value(tmp_path / "out") == 11.5
