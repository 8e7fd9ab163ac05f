"""The held-out loss: of samples not trained on, equal on any number of ranks, and without effect on the training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from keye.errors import RecipeError
from keye.model.keye import KeyeForConditionalGeneration
from stages.data.items import Cache
from stages.data.sources.source import Shuffled, held_out
from stages.distributed import engine
from stages.distributed.ranks import first_rank
from stages.recipe import SourceRecipe, load
from stages.run import open_stage, prepare_tokenizer, run_stage
from stages.stage import choose_sources
from tests.distributed import run_distributed
from tests.stages import small

RECIPE = """
name = "heldout"
[model]
path = "FOLDER/begin"
tokenizer = "FOLDER/tokenizer"
[processor.encoder]
max_tokens = 32
min_tokens_per_frame = 1
max_tokens_per_frame = 4
[processor.image]
min_tokens = 1
max_tokens = 4
[[data.sources]]
path = "FOLDER/train.jsonl"
kind = "text"
[[data.sources]]
path = "FOLDER/train.jsonl"
kind = "image"
[multitask]
steps = 3
learning_rate = 1e-3
context = 160
global_batch_size = 2
zero = 1
mixture = { image = 0.5, text = 0.3, video = 0.2 }
"""
VIDEO = """
[[data.sources]]
path = "FOLDER/train.jsonl"
kind = "video"
"""
HELD = """
[[data.heldout]]
path = "FOLDER/heldout.jsonl"
kind = "text"
[[data.heldout]]
path = "FOLDER/heldout.jsonl"
kind = "image"
"""

pytestmark = pytest.mark.xdist_group("held-out runs")  # one worker trains the runs that all tests read


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("heldout")
    made_for = small.processor()
    made_for.tokenizer.save_pretrained(path / "tokenizer")
    small.model(made_for, seed=3).save_pretrained(path / "begin")
    small.world(path)
    rows = (path / "train.jsonl").read_text()
    (path / "heldout.jsonl").write_text(rows.replace("which", "what").replace("how", "and how"))
    (path / "recipe.toml").write_text((RECIPE + VIDEO + HELD).replace("FOLDER", str(path)))
    return path


def train(folder: Path, run: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """The metrics of a run of the one stage."""
    engine.start(threads=1)
    settings = load(folder / "recipe.toml", overrides)

    def prepare() -> None:
        run.mkdir()
        prepare_tokenizer(settings, run)

    first_rank(prepare)
    run_stage("multitask", settings, run, Cache(1 << 24))
    return [json.loads(line) for line in (run / "multitask" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    out, measured = tmp_path_factory.mktemp("runs"), ["multitask.heldout_every=2"]
    cases = {"plain": (1, []), "one": (1, measured), "two": (2, measured)}
    cases["zero 3"] = 2, [*measured, "multitask.zero=3"]
    return {
        name: run_distributed(train, ranks, 300, folder, out / name, overrides)[0]
        for name, (ranks, overrides) in cases.items()
    }


def test_held_out_loss_is_measured_every_n_steps_and_after_the_last(runs):
    assert [row["step"] for row in runs["one"] if "heldout_loss" in row] == [2, 3]
    assert not any("heldout_loss" in row for row in runs["plain"])


def test_measuring_does_not_change_the_training(runs):
    assert [row["loss"] for row in runs["one"]] == [row["loss"] for row in runs["plain"]]
    assert [row["grad_norm"] for row in runs["one"]] == [row["grad_norm"] for row in runs["plain"]]


@pytest.mark.parametrize("case", ["two", "zero 3"])
def test_any_number_of_ranks_measures_the_same(runs, case):
    one, many = ([row["heldout_loss"] for row in runs[name] if "heldout_loss" in row] for name in ("one", case))
    assert many == pytest.approx(one, rel=1e-4) and one[0] != one[1]


def by_hand(folder: Path, run: Path) -> tuple[float, float]:
    """(the trainer's held-out loss, that of each document by itself from plain logits)."""
    engine.start(threads=1)
    overrides = ["data.heldout=[]", "data.heldout_fraction=0.4", "multitask.mixture={ image = 0.6, text = 0.4 }"]
    settings = load(folder / "recipe.toml", ["multitask.heldout_every=1", *overrides])
    run.mkdir()
    prepare_tokenizer(settings, run)
    opened = open_stage("multitask", settings, run, Cache(1 << 24))
    measured = opened.trainer.heldout_loss()
    opened.trainer.loader.close()
    model = KeyeForConditionalGeneration.from_pretrained(folder / "begin").eval()
    total = count = 0.0
    for step in opened.trainer.heldout:
        for row in step:
            ends = row["cu_seqlens"].tolist()
            pixels, grids = row.get("pixel_values"), row.get("image_grid_thw")
            features = None if pixels is None else model.encode_vision(pixels, grids)
            for start, end in zip(ends, ends[1:], strict=False):
                ids, labels = row["input_ids"][:, start:end], row["shift_labels"][0, start:end]
                own = int((ids == model.config.image_token_id).sum())
                taken, features = (None, features) if not own else (features[:own], features[own:])
                with torch.no_grad():
                    positions = row["position_ids"][..., start:end]
                    logits = model(input_ids=ids, position_ids=positions, visual_features=taken).logits[0]
                total += float(F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=-100))
                count += int((labels != -100).sum())
    return measured, total / count


def test_held_out_loss_is_that_of_each_document_by_itself(folder, tmp_path):
    measured, wanted = run_distributed(by_hand, 1, 200, folder, tmp_path / "run")[0]
    assert measured == pytest.approx(wanted, rel=1e-4)


def test_held_out_rows_are_about_the_share_and_do_not_change_when_rows_are_added():
    rows = held_out(200_000, 0.02)
    assert rows.mean() == pytest.approx(0.02, abs=4 * (0.02 * 0.98 / 200_000) ** 0.5)
    assert np.array_equal(held_out(1_000, 0.02), rows[:1_000])
    gaps = np.diff(np.flatnonzero(rows))
    assert gaps.std() == pytest.approx(50, rel=0.1)  # geometric: its deviation equals its mean


def test_a_row_is_trained_on_or_held_out(folder):
    recipe = SourceRecipe(str(folder / "train.jsonl"), "text")
    for share in (0.3, 0.6):
        parts = [Shuffled(recipe, recipe.path, 0, None, (share, held)).indices.tolist() for held in (False, True)]
        every = Shuffled(recipe, recipe.path, 0, None).indices.tolist()
        assert sorted(parts[0] + parts[1]) == every and all(parts)


def test_kinds_that_are_not_held_out_are_left_out_of_the_mixture(folder):
    settings = load(folder / "recipe.toml", ["multitask.heldout_every=1"])
    shares = [(source.kind, share) for source, share in choose_sources("multitask", settings, heldout=True)]
    assert shares == [("text", pytest.approx(0.375)), ("image", pytest.approx(0.625))]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.heldout=[]", "multitask.heldout_every=2"], "heldout_every measures held-out samples, and there"),
        (["data.heldout_fraction=0.1"], "data.heldout or data.heldout_fraction, not both"),
        (["data.heldout=[]", "data.heldout_fraction=1.0"], "heldout_fraction must be in"),
        (["multitask.heldout_steps=0"], "multitask.heldout_steps must be at least 1"),
    ],
)
def test_recipes_that_cannot_measure_are_named(folder, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load(folder / "recipe.toml", overrides)
