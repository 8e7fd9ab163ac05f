"""Readers trained under each policy: what they get, equal tokens, and a page from saved predictions alone."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from keye.errors import KeyeError
from keye.evaluation.study.settings import Setting
from keye.world.scene import COLOURS
from keye.world.slowfastbench import draw, painter_of
from scripts.bench.trained_reader import clips, page, training
from scripts.bench.trained_reader.clips import ANSWERS, CELLS, GRID

SETTINGS = [Setting("default", 240), Setting("uniform", 240), Setting("downsampled", 240)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drawn") / "order.npz"
    clips.draw_family(path, "order", "dev", 24, SETTINGS, SETTINGS[0])
    return path


def test_tokens_of_a_budget_are_equal_within_2_percent(drawn: Path) -> None:
    tokens = {setting.policy: clips.load([drawn], setting).tokens for setting in SETTINGS}
    for policy in ("uniform", "downsampled"):
        assert abs(tokens[policy].mean() / tokens["default"].mean() - 1) <= 0.02
    assert max(tokens["default"]) <= 240


def test_a_reader_gets_pictures_and_half_seconds_of_the_plan_and_the_question(drawn: Path) -> None:
    seen = clips.load([drawn], Setting("downsampled", 240))
    assert seen.pictures.shape == (int(seen.picture.max()) + 1, 3, *GRID) and len(seen) == 24 == len(seen.names)
    for clip in (0, 7):
        item = draw("order", "dev", clip, clips.LENGTH, clips.HEIGHT)
        assert seen.names[clip] == item.name
        options = [ANSWERS[place] for place in seen.options[clip].tolist()]
        assert options == list(item.options) and options[int(seen.answers[clip])] == item.answer
        frames = painter_of(item.film).cell_frames()
        for entry in range(seen.entries(clip).start, seen.entries(clip).stop):
            frame = torch.from_numpy(frames[int(seen.cells[entry])].copy()).permute(2, 0, 1)
            difference = (clips.to_grid(frame).float() - seen.pictures[seen.picture[entry]].float()).abs().mean()
            assert difference < 12  # the picture of another half second of these clips may be as near, but not further


def test_labels_are_what_the_pictures_show() -> None:
    item = draw("find", "train", 3, clips.LENGTH, clips.HEIGHT, "still")
    states, tags = clips.labels(item)
    frames = np.stack([clips.to_grid(torch.from_numpy(frame.copy()).permute(2, 0, 1)).numpy()
                       for frame in painter_of(item.film).cell_frames()])  # fmt: skip
    assert states.shape == (CELLS, clips.COLUMNS) and set(np.unique(states)) == {0, 1, 2}
    columns = frames.astype(float).reshape(CELLS, 3, GRID[0], clips.COLUMNS, -1).mean((1, 2, 4))
    lit = (states == 2).any(0)
    for column in np.flatnonzero(lit):
        on = states[:, column] == 2
        assert columns[on, column].min() > np.median(columns[~on, column])
    assert {clips.TAG_COLOURS[tag - 1] for tag in np.unique(tags) if tag} == {name for name in item.film.tags if name}
    for column in np.flatnonzero(tags):
        strip = frames[0][:, :, 4 * column + 1 : 4 * column + 3].astype(float).mean(2)
        wanted = np.array(COLOURS[clips.TAG_COLOURS[tags[column] - 1]])[:, None]
        assert np.abs(strip - wanted).sum(0).min() < 90


def test_controls_keep_entries_half_seconds_and_kinds(drawn: Path) -> None:
    seen = clips.load([drawn], SETTINGS[0])
    for control in clips.CONTROLS:
        changed = clips.controlled(seen, control)
        assert changed.cells is seen.cells and changed.slow is seen.slow and changed.options is seen.options
        assert (changed.pictures == 0).all() if control == "zeroed" else changed.pictures is seen.pictures
    here = seen.entries(2)
    shuffled = clips.controlled(seen, "shuffled").picture
    assert sorted(shuffled[here].tolist()) == sorted(seen.picture[here].tolist())
    assert not torch.equal(shuffled, seen.picture)
    one = set(clips.controlled(seen, "one_frame").picture[here].tolist())
    assert len(one) == 1 and one <= set(seen.picture[here].tolist())
    other = clips.controlled(seen, "other").picture[here]
    assert other[0] == seen.picture[seen.entries(7).start]  # the fifth next clip, of another group


def test_readers_depend_on_pixels_and_on_their_seed_alone(drawn: Path) -> None:
    seen, recipe = clips.load([drawn], Setting("downsampled", 240)), training.Recipe(steps=2, batch=8, looks=2)
    eye = training.train_eye(seen, recipe, 0)
    shown = eye.look(seen.pictures)
    torch.testing.assert_close(shown.sum(1), torch.full((len(seen.pictures), clips.COLUMNS), 2.0))
    reader = training.train(seen, shown, recipe, 0)
    with torch.no_grad():
        everything = torch.arange(len(seen)), torch.arange(len(seen.answers))
        logits = reader(seen, shown, *everything)
        black = reader(seen, eye.look(torch.zeros_like(seen.pictures)), *everything)
    assert logits.shape == (24, 4) and logits.isfinite().all() and not torch.allclose(logits, black)
    again = training.train(seen, training.train_eye(seen, recipe, 0).look(seen.pictures), recipe, 0)
    assert (again.columns - reader.columns).abs().max() == 0
    assert (training.train(seen, shown, recipe, 1).columns - reader.columns).abs().max() > 0


def test_an_eye_learns_tags(drawn: Path) -> None:
    seen = clips.load([drawn], Setting("downsampled", 240))
    eye = training.train_eye(seen, training.Recipe(looks=60, pictures=32), 0)
    said = eye.look(seen.pictures)[:, clips.STATES :].argmax(1)
    clip = torch.repeat_interleave(torch.arange(len(seen)), seen.starts.diff())
    found = seen.tags[clip][np.unique(seen.picture, return_index=True)[1]]
    assert (said == found)[found > 0].float().mean() > 0.8


def test_a_run_continues_and_its_page_needs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ["trained_reader", "--clips", "6", "--questions", "8", "--steps", "2", "--looks", "2", "--batch", "6",
            "--seeds", "0", "1", "--budgets", "240", "--policies", "random", "uniform", "downsampled",
            "--families", "find", "compare", "--cache", str(tmp_path / "cache"),
            "--out", str(tmp_path / "out")]  # fmt: skip

    def start(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", [*base, *more])
        module = runpy.run_module("scripts.bench.trained_reader.__main__", run_name="trained_reader")
        module["main"]()

    start()
    parts = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/runs-*/*.json")}
    assert len(parts) == 2 * 5
    text = (tmp_path / "out" / "trained_reader.md").read_text()
    assert "| 240 | `default` |" in text and "| none | `all_slow` |" in text and "pixels zeroed" in text
    start()
    assert all(path.stat().st_mtime_ns == before for path, before in parts.items())
    monkeypatch.setattr(training, "train", None)
    (tmp_path / "out" / "trained_reader.md").unlink()
    start("--tables")
    assert (tmp_path / "out" / "trained_reader.md").read_text() == text
    lines = parquet.read_table(tmp_path / "out" / "trained_reader" / "predictions.parquet").to_pylist()
    assert len(lines) == 2 * 5 * 16
    study = tmp_path / "out" / "trained_reader" / "study.json"
    changed = json.loads(study.read_text())
    changed["questions"]["checksums"]["find"]["frozen"] = "0" * 64
    study.write_text(json.dumps(changed))
    with pytest.raises(KeyeError, match="key questions"):
        page.write(study.parent, tmp_path / "out" / "trained_reader.md")
