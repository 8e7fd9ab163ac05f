"""The studies of five related systems run, and their arms are what their tables say."""

import json
import subprocess
import sys

import pytest

from scripts.bench.common.record import ROOT
from scripts.bench.systems import aggregation
from scripts.bench.systems.aggregation_reader import (
    CELLS,
    ENCODERS,
    SLOW,
    TOKENS,
    changed_frames,
    chat,
    clip_part,
    drawn,
    processor_of,
    still_part,
    with_slow,
)


@pytest.mark.parametrize("name", aggregation.TRAINED)
@pytest.mark.parametrize("family", ["find", "motion"])
def test_compared_pathways_have_equal_visual_tokens(name, family):
    one = drawn(5, family, 1, 0)
    sample = processor_of(name).sample(chat(one, clip_part(one)))
    assert sample.visual_tokens == TOKENS
    assert (sample.video_blocks is not None) == (ENCODERS[name].get("aggregation") is not None)


def test_chosen_slow_frames_are_those_of_the_stream():
    one, processor = drawn(5, "find", 1, 1), processor_of("slow + fast")
    periodic = list(range(0, CELLS, CELLS // SLOW))
    own = processor.sample(chat(one, clip_part(one)))
    again = processor.sample(chat(one, with_slow(one, periodic)))
    for name in ("input_ids", "video_blocks", "pixel_values_videos"):  # two_stream makes the same frames slow
        assert getattr(own, name).equal(getattr(again, name)), name
    moved = processor.sample(chat(one, with_slow(one, [1, 2, 11])))
    assert moved.visual_tokens == TOKENS
    assert moved.plans[0].timestamps[moved.plans[0].frame_types == 0].tolist() == [0.5, 1.0, 5.5]


def test_the_measure_finds_the_flash_and_the_still_shows_it():
    hits = 0
    for index in range(8):
        one = drawn(5, "find", 1, index)
        chosen = changed_frames(one)
        assert len(set(chosen)) == SLOW
        hits += one.cells[0] in chosen
        assert (still_part(one, one.cells[0], False)["image"] == one.frames[2 * one.cells[0]]).all()
    assert hits >= 6  # periodic frames would show 2 of 8


@pytest.mark.slow
def test_the_study_of_aggregation_runs(tmp_path):
    command = [sys.executable, "-m", "scripts.bench.systems.aggregation", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    record = json.loads((tmp_path / "aggregation.json").read_text())
    assert record["quick"] and len(record["tables"]) == 3 and len(record["claims"]) == 11
