"""`keye dream`: train, walk, loop, and what it says about mistakes."""

import json
import sys

import numpy as np
import pytest
import torch

from keye.dream.scenes import circling_walk
from keye.errors import ArgumentError, CheckpointError, RecipeError
from stages.commands import dream
from stages.dream.walk import measures

SMALL = [
    "steps=4", "batch=4", "model.width=16", "model.depth=1", "model.heads=2", "fast.steps=1", "fast.draws=2",
    "fast.sampling_steps=2", "loop.rounds=1", "loop.episodes=1", "loop.updates=1", "loop.group=1", "loop.draws=1",
]  # fmt: skip


def call(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["keye dream", *words])
    dream.main()


def test_train_loop_and_walk(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    options = [word for setting in SMALL for word in ("--set", setting)]
    call(monkeypatch, "train", str(dream.SHIPPED), "--out", str(run), *options)
    call(monkeypatch, "loop", str(run))
    for model in (run / "model", run / "loop" / "model"):
        out = model.with_name("walk")
        call(monkeypatch, "walk", str(model), "--out", str(out), "--write", "none", "both", "--seed", "3")
        found = json.loads((out / "walk.json").read_text())
        assert list(found) == ["none", "both"] and (out / "walk.png").stat().st_size > 5000
    # The same command again finds the walks complete, and gives the same measures.
    call(monkeypatch, "walk", str(model), "--out", str(out), "--write", "none", "both", "--seed", "3")
    assert json.loads((out / "walk.json").read_text()) == found
    assert "PSNR from memory" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="begun with another path, .*seed; give the former values"):
        call(monkeypatch, "walk", str(model), "--out", str(out), "--write", "none", "--seed", "4")
    with pytest.raises(CheckpointError, match="begun with another model;"):
        call(monkeypatch, "walk", str(run / "model"), "--out", str(out), "--write", "none", "--seed", "3")
    call(monkeypatch, "walk", str(model), "--out", str(tmp_path / "mine"), "--actions", "right,up", "--watch", "1")
    with pytest.raises(ArgumentError, match="leave at least one"):
        call(monkeypatch, "walk", str(model), "--actions", "right", "--watch", "1")
    with pytest.raises(ArgumentError, match="'forward' is not one of right"):
        call(monkeypatch, "walk", str(model), "--actions", "forward")
    with pytest.raises(ArgumentError, match="--write always"):
        call(monkeypatch, "walk", str(model), "--write", "always")
    with pytest.raises(CheckpointError, match="no recipe.toml"):
        call(monkeypatch, "loop", str(tmp_path))


def test_print_shows_every_default(monkeypatch, capsys):
    call(monkeypatch, "train", str(dream.SHIPPED), "--print", "--set", "fast.rank=8")
    assert "rank = 8" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="no such recipe"):
        call(monkeypatch, "train", "nothing.toml")


def test_measures_of_the_truth_are_perfect_and_of_a_foreign_place_are_not():
    path, other = circling_walk(np.random.default_rng(0)), circling_walk(np.random.default_rng(1))
    found = measures(path, path.frames)
    assert found["PSNR"] == found["PSNR from memory"] == pytest.approx(100.0)
    assert found["consistency"] == pytest.approx(1.0) and found["cuts"] == 0
    mixed = torch.cat([path.frames[: 1 + 4 * path.outward], other.frames[-4:]])
    found = measures(path, mixed)
    assert found["PSNR from memory"] < 12 and found["cuts"] >= 1
