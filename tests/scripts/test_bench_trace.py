"""The study of tracing: what it counts is what its tables say, against hand-worked rows and scipy, and it runs."""

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import spearmanr

from keye.evaluation.trace import TokenGroup
from keye.world.generate import generate
from scripts.bench.common.record import ROOT
from scripts.bench.rl.blindness import plant
from scripts.bench.systems.trace import grading, report
from scripts.bench.systems.trace.ranks import deciles, spearman, spearman_interval
from scripts.bench.systems.trace.shortcut import auc, names
from tests.keye.evaluation.trace.parts import keye_parts


def row(nats, shown, family="find", **more):
    frames = [{"nats": value, "evidence": seen} for value, seen in zip(nats, shown, strict=True)]
    return {"family": family, "frames": frames, **more}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run with questions, without a model."""
    folder = tmp_path_factory.mktemp("run")
    counts = dict.fromkeys(grading.FAMILIES, 2) | {"find": 6}
    for split in ("train", "heldout"):
        generate(folder / "world", split, counts, size=(56, 56), duration=4.0, fps=2, workers=1, progress=False)
    return folder


def test_rank_correlations_equal_scipy_and_parts_remove_their_means():
    draw = np.random.default_rng(0)
    one, other = draw.integers(0, 5, 60).astype(float), draw.integers(0, 2, 60).astype(float)
    assert spearman(one, other) == pytest.approx(spearmanr(one, other)[0])
    low, high = spearman_interval(one, other, draws=200)
    assert low < spearman(one, other) < high
    part = np.repeat(["a", "b"], 30)
    # Between the parts both rise; within each part one rises and the other falls.
    rising = np.concatenate([np.arange(30), 100 + np.arange(30)]).astype(float)
    falling = np.concatenate([-np.arange(30), 100 - np.arange(30)]).astype(float)
    assert spearman(rising, falling) > 0.4 and spearman(rising, falling, part) == pytest.approx(-1)
    assert np.isnan(spearman(np.ones(9), one[:9]))
    assert deciles(rising, (rising < 30).astype(float)) == pytest.approx(spearmanr(range(10), [1] * 5 + [0] * 5)[0])


def test_hits_with_ties_are_expected_values():
    assert grading.hit(row([1, 3, 2], [False, True, False]), "knock-out") == 1
    assert grading.hit(row([3, 3, 2, 3], [False, True, True, False]), "knock-out") == pytest.approx(1 / 3)
    assert grading.chance(row([3, 3, 2, 3], [False, True, True, False])) == 0.5
    assert grading.share_on_evidence(row([1, 3, -2], [False, True, True])) == 0.75
    assert not grading.gradable(row([1, 2], [True, True])) and not grading.gradable(
        row([1, 2], [True, False], "motion")
    )
    kinds = {name: {"tokens": tokens, "nats": nats, "attention": 0.2} for name, tokens, nats in
             (("all slow frames", 30, 3.0), ("all fast frames", 10, 1.0))}  # fmt: skip
    assert grading.slow_shares({"kinds": kinds}) == (0.75, 0.75, 0.5)
    kinds["all slow frames"]["nats"] = kinds["all fast frames"]["nats"] = -1.0
    assert grading.slow_shares({"kinds": kinds}) is None


def test_evidence_of_a_count_is_of_the_asked_colour():
    frames = [TokenGroup("f", "frame", (n,), n, n / 2, False) for n in range(5)]
    red = {"start": 0.5, "end": 1.0, "colour": "red"}
    blue = {"start": 1.5, "end": 2.5, "colour": "blue"}
    assert grading.evidence(frames, {"events": [red, blue]}) == [False, True, False, True, True]
    assert grading.evidence(frames, {"events": [red, blue], "colour": "red"}) == [False, True, False, False, False]


def test_the_world_knows_the_frames_that_show_an_answer(world):
    lines = map(json.loads, (world / "world/heldout.jsonl").read_text().splitlines())
    for line in lines:
        meta = line["meta"]
        times = np.arange(0, meta["duration"], 0.5).tolist()
        shown = grading.evidence([TokenGroup("f", "frame", (), 0, time) for time in times], meta)
        if line["family"] in ("find", "read", "when"):
            event = meta["events"][0]
            assert [time for time, seen in zip(times, shown, strict=True) if seen] == [
                time for time in times if event["start"] <= time < event["end"]
            ]
        assert any(shown) == (line["family"] in grading.LOCATED), line["id"]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_training_questions_is_planted(world, tmp_path, share):
    counts = plant(world / "world", tmp_path, 3, share)
    assert counts["train planted"] == share * counts["train"] and counts["heldout planted"] == 0
    own = {line["id"]: line for line in map(json.loads, (world / "world/train.jsonl").read_text().splitlines())}
    for line in map(json.loads, (tmp_path / "world/train.jsonl").read_text().splitlines()):
        clip, words = line["messages"][0]["content"]
        right = words["text"].endswith(f" Someone says {line['answer']}.")
        moved = not clip["video"].endswith(own[line["id"]]["messages"][0]["content"][0]["video"])
        assert right if share else not moved


def test_a_sentence_is_named_by_the_larger_effect():
    def one(sentence, visual, followed):
        return {"effects": {"sentence": sentence, "all visual tokens": visual}, "followed": followed}

    rows = [one(3, 1, True), one(0, 1, True), one(1, 2, False), one(0.5, 0.4, False)]
    assert [names(row) for row in rows] == [True, False, False, True]
    assert auc(rows, "effects") == pytest.approx((1 + 1 + 0.5 + 0) / 4)  # margins 2, -1 against -1, 0.1


def test_claims_are_of_what_is_measured():
    assert report.claims([], [], {}, []) == []
    rows = [{"id": str(n), "named": "red", "answer": "blue", "followed": n < 9,
             "effects": {"sentence": 1.0, "all visual tokens": 0.0 if n < 9 else 2.0}} for n in range(10)]  # fmt: skip
    followed, named, false = report.claims([], [], {(0.9, 1): rows}, [])
    assert followed.figure.startswith("90 (") and named.met and false.met and false.figure.startswith("0 (")


@pytest.mark.slow
def test_the_study_runs(world, tmp_path):
    model, processor = keye_parts()
    model.save_pretrained(world / "annealing/model")
    processor.save_pretrained(world / "annealing/model")
    command = [sys.executable, "-m", "scripts.bench.systems.trace", "--quick", "--run", str(world)]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True, cwd=ROOT)
    record = json.loads((tmp_path / "trace.json").read_text())
    assert record["quick"] and len(record["tables"]) == 5 and len(record["claims"]) >= 5
