"""The sweep: costs rise with the threshold, detail is measured against the all-slow encoding."""

import csv
import json

import pytest
import torch

from keye.evaluation import ablation
from tests.clips import clip


def test_a_higher_threshold_never_costs_less_on_a_clip_with_cuts(tmp_path):
    rows, details = ablation.sweep([clip("carphone_pristine.mp4")], [0.0, 0.6, 1.01], progress=lambda line: None)
    shares = [row.slow_share for row in rows]
    assert shares[0] == pytest.approx(1 / details[0]["frames"])  # only the first frame is slow
    assert shares == sorted(shares) and shares[-1] == 1
    assert rows[-1].tokens_share == 1 and rows[-1].detail == pytest.approx(1)
    assert rows[0].detail < 1

    ablation.save(tmp_path, rows, details, {"measure": "patch_l1"})
    report = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["threshold"] for row in report["rows"]] == [0.0, 0.6, 1.01]
    assert report["rows"][0]["accuracy"] is None
    with (tmp_path / "ablation.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    assert (tmp_path / "ablation.png").stat().st_size > 1000


def test_accuracy_of_a_model_goes_into_its_row():
    rows, _ = ablation.sweep(
        [clip("carphone_pristine.mp4")],
        [0.5],
        {"max_frames": 3},
        accuracy=lambda threshold: (threshold / 2, 0.1, 30),
        progress=lambda line: None,
    )
    assert (rows[0].accuracy, rows[0].accuracy_stderr, rows[0].questions) == (0.25, 0.1, 30)


def test_detail_is_one_for_the_same_picture_and_falls_with_blur():
    sharp = torch.randint(0, 256, (3, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small = ablation.resize(sharp[None], (56, 56), "bicubic")[0]
    assert ablation.detail(sharp, sharp) == pytest.approx(1)
    assert ablation.detail(small, sharp) < 0.9
