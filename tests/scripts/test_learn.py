"""What a small model is taught about SlowFastBench: clips, descriptions and the parts of a sample that are labels."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from keye.world.slowfastbench import FAMILIES, draw
from keye.world.slowfastbench.film import DARK, THINGS
from scripts.bench import learn


@pytest.mark.parametrize("family", ["find", "order", "when"])
def test_a_description_names_what_the_pictures_show(family: str) -> None:
    item = draw(family, "train", 5, 8, 144, "still")
    frames, parts = learn.pictures(item), learn.description(item).split("; ")
    assert len(frames) == item.film.cells
    tags, changes = parts[0].split(), [part.split() for part in parts[1:]]
    assert set(tags) - {"none"} == {tag for tag in item.film.tags if tag}
    height, width = item.film.size
    rows = slice(None) if item.film.mirrored else slice(round((1 - THINGS[1]) * height), round(THINGS[1] * height))
    for second, column, tag in changes:
        cell, place = round(2 * float(second)), int(column) - 1
        assert tag == tags[place]
        strip = slice(round(place * width / len(tags)), round((place + 1) * width / len(tags)))
        brighter = frames[cell].astype(int)[rows, strip].sum() - frames[cell - 1].astype(int)[rows, strip].sum()
        assert brighter > DARK * 100
    assert [float(second) for second, *_ in changes] == sorted(float(second) for second, *_ in changes)


def test_easy_clips_come_first_and_are_short() -> None:
    curriculum = learn.Curriculum(0.5, 3, 16, 144)
    easy, late = (curriculum.draw("find", 2, share) for share in (0.2, 0.9))
    assert (easy.film.cells, easy.film.motion, late.film.cells) == (6, "still", 32)
    assert curriculum.draw("order", 0, 0).film.cells < 2 * FAMILIES["order"].shortest


def test_an_interrupted_run_continues_and_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "CACHE", tmp_path / "cache")
    base = ["find", "--steps", "2", "--tokens", "256", "--every", "1", "--questions", "4", "--frame-tokens", "4"]
    out = ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["learn", *base, "--minutes", "0.0001", *out])
    learn.main()
    assert not list((tmp_path / "out" / "bench_model").glob("*.json"))
    monkeypatch.setattr(sys, "argv", ["learn", *base, *out])
    learn.main()
    found = json.loads((tmp_path / "out" / "bench_model" / "run.json").read_text())
    assert [step for step, *_ in found["curve"]] == [1, 2] and found["step"] == 2
    assert set(found["heldout"]) == set(learn.CONTROLS) and found["chance"] == {"find": 0.25}
    page = (tmp_path / "out" / "bench_model.md").read_text()
    assert re.search(r"^\| find \| 25\.0 \|", page, re.M)


def test_training_clips_are_not_those_of_other_splits() -> None:
    one, two = (draw("find", split, 0, 8, 144) for split in ("train", "heldout"))
    assert not np.array_equal(learn.pictures(one), learn.pictures(two))
