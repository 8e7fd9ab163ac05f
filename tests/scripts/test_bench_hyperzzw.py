"""The study of HyperZ·Z·W: its nets and images are what its tables say, and it runs."""

import json
import subprocess
import sys

import pytest
import torch

from scripts.bench.common.record import ROOT
from scripts.bench.systems.hyperzzw import report
from scripts.bench.systems.hyperzzw.classify import Residual, correct, digits, new_net, parameters, stills
from scripts.bench.systems.hyperzzw.curve import measured
from scripts.bench.systems.hyperzzw.towers import Heldout, frames_of, new_model, new_processor


@pytest.mark.parametrize("images", [digits, stills])
def test_compared_nets_have_equal_parameters_and_no_image_is_in_two_parts(images) -> None:
    found = images()
    assert parameters(new_net("residual", found)) == pytest.approx(parameters(new_net("ours", found)), rel=0.02)
    rows = torch.cat([part[0].flatten(1) for part in (found.train, found.dev, found.test)])
    assert len(torch.unique(rows, dim=0)) == len(rows) and rows.abs().max() <= 1


def test_a_residual_net_does_not_depend_on_the_batch_in_evaluation() -> None:
    net = Residual(1, 10, 4)
    images, labels = torch.randn(9, 1, 8, 8), torch.arange(9)
    assert correct(net, (images, labels), 9) == correct(net, (images, labels), 1)


def test_the_curve_of_attention_keeps_no_scores() -> None:
    one, two = measured(8, 1), measured(16, 1)
    for mixer in ("attention", "hyperzzw"):
        assert 3 < two[mixer]["bytes"] / one[mixer]["bytes"] < 5  # linear: no kernel keeps N × N
    assert two["attention"]["operations"] > two["hyperzzw"]["operations"]


def test_clips_have_slow_and_fast_frames_of_two_sizes() -> None:
    processor, questions = new_processor(), Heldout(1)
    sizes = {frame for question in questions for frame in frames_of(processor.sample(question.messages))}
    assert sizes == {(8, 8), (4, 4)}


def test_the_control_convolves_each_frame_alone_and_without_its_kernel_it_is_attention() -> None:
    processor = new_processor()
    control, plain = (new_model(arm, processor, 0).eval() for arm in ("convolution", "attention"))
    grids = torch.tensor([[1, 4, 4], [1, 8, 8], [1, 4, 4]])
    pixels = torch.randint(256, (16 + 64 + 16, 3, 14, 14), dtype=torch.uint8)
    with torch.no_grad():
        all_frames, alone = control.visual(pixels, grids), control.visual(pixels[-16:], grids[2:])
        torch.testing.assert_close(all_frames[-16:], alone, atol=1e-5, rtol=0)
        assert (all_frames - plain.visual(pixels, grids)).abs().max() > 1e-3
        for layer in control.visual.encoder.layers:
            layer.self_attn.near.weight.zero_()
        assert torch.equal(control.visual(pixels, grids), plain.visual(pixels, grids))


def test_the_report_of_two_seeds_pairs_their_images() -> None:
    def one(right: list[bool]) -> dict:
        return {"right": right, "parameters": 5, "rate": 0.1, "seconds": 1.0, "alone": right, "cpu": 1.0}

    runs = {
        "net-digits-ours-AdamW-0": one([True, True, False, False]),
        "net-digits-ours-AdamW-1": one([True, True, True, False]),
        "net-digits-ours-Kar3-1": one([True, False, False, False]),
    }
    claims, tables, notes = report.written(runs, [*runs, "tower-attention-0"], 1)
    # Over the common seed: 0, −1, −1, 0.
    assert [claim.figure.split()[0] for claim in claims] == ["-50.0"] and claims[0].met
    assert tables[0].rows[0][3] == "50.0, 75.0" and "tower-attention-0" in notes[-1]


@pytest.mark.slow
def test_the_study_runs(tmp_path) -> None:
    command = [sys.executable, "-m", "scripts.bench.systems.hyperzzw", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    record = json.loads((tmp_path / "hyperzzw.json").read_text())
    assert record["quick"] and len(record["tables"]) == 7 and len(record["claims"]) == 13
