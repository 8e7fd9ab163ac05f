"""The study of motion: its clips alias at the rate of the Slow pathway, its arms are comparable, and it runs."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from keye.evaluation.benchmark import Question
from keye.motion.frames import macs, slow_places
from scripts.bench.common.record import ROOT
from scripts.bench.systems.motion.alias import ARMS, seeds_interval
from scripts.bench.systems.motion.clips import FRAMES, SIDE, VALUES, classes_of, draw
from scripts.bench.systems.motion.vlm import reversed_clip


@pytest.mark.parametrize("family", ["spin", "flicker"])
def test_the_slow_frames_of_a_clip_are_equal_but_for_noise(family):
    clips, labels = draw(family, 24, seed=5)
    places = slow_places(FRAMES, 4)
    assert places == [0, 5, 10, 15] and len(set(labels.tolist())) == len(VALUES[family])
    slow = clips[:, places].float()
    assert (slow - slow[:, :1]).abs().mean() < 12  # two draws of noise of deviation 8
    moving = labels > 0 if family == "flicker" else labels >= 0
    change = (clips[:, 1].float() - clips[:, 0].float()).abs().mean((1, 2, 3))
    still = (clips[:, 5].float() - clips[:, 0].float()).abs().mean((1, 2, 3))
    assert (change[moving] > still[moving] + 1).float().mean() > 0.9


def test_spin_and_its_opposite_are_mirror_images_in_time():
    clips, labels = draw("spin", 200, seed=6)
    assert VALUES["spin"] == (1, -1)
    centre = torch.stack([clips[labels == k].float().mean((0, 1, 2)) for k in (0, 1)])
    assert (centre[0] - centre[1]).abs().mean() < 8  # no still picture tells the classes apart


def test_networks_have_about_equal_operations_and_classes_do_not_overlap():
    costs = [macs(settings, SIDE) for settings in ARMS.values()]
    assert max(costs) / min(costs) < 1.2
    taken = [place for family in VALUES for place in range(100)[classes_of(family)]]
    assert taken == list(range(sum(map(len, VALUES.values()))))


def test_a_reversed_clip_has_the_opposite_answer():
    frames = np.arange(4, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    question = Question("a", "motion", [{"role": "user", "content": [{"type": "video", "video": frames}]}], "up")
    found = reversed_clip(question)
    assert found.answer == "down" and found.family == "reversed"
    assert found.messages[0]["content"][0]["video"][:, 0, 0, 0].tolist() == [3, 2, 1, 0]


def test_the_interval_over_seeds_is_that_of_two_independent_means():
    rng = np.random.default_rng(4)
    one, other = rng.normal(0.7, 0.1, 400), rng.normal(0.5, 0.2, 400)
    low, high = seeds_interval(one, other)
    half = 1.96 * np.hypot(one.std(), other.std()) / 20
    assert (low, high) == pytest.approx((one.mean() - other.mean() - half, one.mean() - other.mean() + half), abs=3e-3)


@pytest.mark.slow
def test_the_study_of_motion_runs(tmp_path):
    command = [sys.executable, "-m", "scripts.bench.systems.motion", "--quick", "--run", str(tmp_path / "none")]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True, cwd=ROOT)
    record = json.loads((tmp_path / "motion.json").read_text())
    assert record["quick"] and len(record["tables"][0]["rows"]) == 5 and len(record["claims"]) >= 11
