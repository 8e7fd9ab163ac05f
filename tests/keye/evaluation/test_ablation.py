"""The sweep: costs rise with the threshold, detail refers to the original frames, finished results are kept."""

import csv
import json
from pathlib import Path

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from keye import SlowFastEncoder
from keye.errors import KeyeError
from keye.evaluation import Outcome, Report, ablation
from keye.video.clip import open_clip
from scripts.clips import clip

ROOT = Path(__file__).resolve().parents[3]
SHORT = {"max_frames": 3}


def answers(threshold: float) -> Report:
    """Two of three replies are correct, and all of one family."""
    kinds = [("count", True), ("count", False), ("read", True)]
    return Report(
        "made",
        [Outcome(i, str(i), family, "", "", right, 0.5, False) for i, (family, right) in enumerate(kinds)],
    )


def test_a_higher_threshold_never_costs_less_on_a_clip_with_cuts(tmp_path):
    settings = {"max_frames": 12, "max_tokens_per_frame": 200}
    rows, details = ablation.sweep([clip("bikes.mp4")], [0.0, 0.5, 1.0], settings, progress=False)
    shares = [row.slow_share for row in rows]
    assert shares[0] == pytest.approx(1 / details[0]["frames"])  # only the first frame is slow
    assert shares == sorted(shares) and shares[-1] == 1
    assert rows[-1].tokens_share == 1
    assert rows[0].psnr < rows[1].psnr < rows[2].psnr and rows[0].ssim < rows[1].ssim < rows[2].ssim <= 1

    ablation.save(tmp_path, rows, details, {"measure": "patch_l1"})
    report = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["threshold"] for row in report["rows"]] == [0.0, 0.5, 1.0]
    assert report["rows"][0]["accuracy"] is None
    with (tmp_path / "ablation.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    assert (tmp_path / "ablation.png").stat().st_size > 1000


def test_detail_refers_to_the_original_frames_and_not_to_an_all_slow_encoding():
    """With few tokens per frame, all-slow frames differ much from the original frames."""
    settings = {**SHORT, "max_tokens_per_frame": 20, "min_tokens_per_frame": 4}
    path = clip("bikes.mp4")
    rows, _ = ablation.sweep([path], [1.0], settings, progress=False)
    assert rows[0].slow_share == 1 and rows[0].ssim < 0.9 and rows[0].psnr < 35

    pictures = SlowFastEncoder(**settings, policy="all_slow")(path).pictures()
    with open_clip(path, 2.0, 3) as opened:
        originals = [frame.pixels for frame in opened]
    enlarged = [
        ablation.resize(p[None], tuple(o.shape[1:]), "bicubic")[0] for p, o in zip(pictures, originals, strict=True)
    ]
    expected = [
        peak_signal_noise_ratio(o.numpy(), e.numpy(), data_range=255) for o, e in zip(originals, enlarged, strict=True)
    ]
    assert rows[0].psnr == pytest.approx(sum(expected) / len(expected))


def test_originals_keep_their_size_up_to_a_limit(monkeypatch):
    encoder = SlowFastEncoder(**SHORT)
    originals, source, times = ablation.sampled(clip("carphone_pristine.mp4"), encoder)
    with open_clip(clip("carphone_pristine.mp4"), 2.0, 3) as opened:
        assert tuple(originals[0].shape[1:]) == opened.size
    assert len(originals) == len(source) == len(times) == 3

    monkeypatch.setattr(ablation, "REFERENCE_TOKENS", 20)
    monkeypatch.setattr(ablation, "FULL_SIZE_BYTES", 1000)  # too small for the frames: the clip is decoded again
    originals, source, times = ablation.sampled(clip("carphone_pristine.mp4"), encoder)
    height, width = originals[0].shape[1:]
    assert height * width <= 20 * 28 * 28 and times is None and source == clip("carphone_pristine.mp4")


def test_frames_in_memory_give_the_same_results_as_the_clip(monkeypatch):
    path, thresholds = clip("bikes.mp4"), [0.5, 0.9]
    once = list(ablation.measure_clip(path, thresholds, {"max_frames": 6}))
    monkeypatch.setattr(ablation, "FULL_SIZE_BYTES", 1000)
    assert list(ablation.measure_clip(path, thresholds, {"max_frames": 6})) == once


def test_accuracy_is_in_the_row_and_accuracy_of_families_in_the_json(tmp_path):
    rows, details = ablation.sweep([clip("carphone_pristine.mp4")], [0.5], SHORT, answers, progress=False)
    assert rows[0].accuracy == pytest.approx(2 / 3) and rows[0].questions == 3 and rows[0].accuracy_stderr > 0
    ablation.save(tmp_path, rows, details, {})
    families = json.loads((tmp_path / "ablation.json").read_text())["rows"][0]["families"]
    assert families["count"]["accuracy"] == 0.5 and families["count"]["n"] == 2 and families["read"]["accuracy"] == 1


def test_detail_is_perfect_for_the_same_picture_and_decreases_with_blur():
    sharp = torch.randint(0, 256, (3, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small = ablation.resize(sharp[None], (56, 56), "bicubic")[0]
    assert ablation.detail(sharp, sharp) == (60.0, 1.0)
    psnr, ssim = ablation.detail(small, sharp)
    assert psnr < 30 and ssim < 0.9


def test_an_interrupted_sweep_resumes_where_it_stopped(tmp_path, monkeypatch):
    clips = [clip("carphone_pristine.mp4"), clip("bikes.mp4")]
    complete = ablation.sweep(clips, [0.3, 0.9], SHORT, answers, progress=False)
    measured: list[tuple] = []
    real = ablation.measure_clip

    def counted(path, thresholds, settings):
        for entry in real(path, thresholds, settings):
            if len(measured) == 3:
                raise KeyboardInterrupt
            measured.append((Path(path).name, entry["threshold"]))
            yield entry

    monkeypatch.setattr(ablation, "measure_clip", counted)
    with pytest.raises(KeyboardInterrupt):
        ablation.sweep(clips, [0.3, 0.9], SHORT, answers, tmp_path, {"model": 1}, progress=False)
    with (tmp_path / "ablation.csv").open("a") as file:
        assert sum(1 for _ in (tmp_path / "ablation.csv").open()) == 4  # the header and three lines
        file.write("bikes.mp4,0.9,3,10")  # an incomplete line, as a killed process leaves it

    measured.clear()
    asked: list[float] = []

    def asking(threshold: float) -> Report:
        asked.append(threshold)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answers(threshold)

    with pytest.raises(KeyboardInterrupt):
        ablation.sweep(clips, [0.3, 0.9], SHORT, asking, tmp_path, {"model": 1}, progress=False)
    assert measured == [("bikes.mp4", 0.9)] and asked == [0.3, 0.9]

    asked = [0.0, 0.0]
    assert ablation.sweep(clips, [0.3, 0.9], SHORT, asking, tmp_path, {"model": 1}, progress=False) == complete
    assert len(measured) == 1 and asked[2:] == [0.9]


def test_other_settings_are_measured_again_and_another_model_is_asked_again(tmp_path):
    clips = [clip("carphone_pristine.mp4")]
    calls: list[float] = []

    def asking(threshold: float) -> Report:
        calls.append(threshold)
        return answers(threshold)

    first, _ = ablation.sweep(clips, [0.9], SHORT, asking, tmp_path, {"model": 1}, progress=False)
    ablation.sweep(clips, [0.9], SHORT, asking, tmp_path, {"model": 2}, progress=False)
    assert len(calls) == 2
    other, details = ablation.sweep(clips, [0.9], {**SHORT, "measure": "patch_cosine"}, None, tmp_path, progress=False)
    assert other[0].slow_share != first[0].slow_share
    assert (tmp_path / "ablation.csv").read_text().count("\n") == 2 and len(details) == 1


def test_without_a_terminal_every_clip_prints_a_line_with_the_time_left(capsys):
    ablation.sweep([clip("carphone_pristine.mp4"), clip("bikes.mp4")], [0.5], SHORT, answers)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("clips 1/2  carphone_pristine.mp4, about") and lines[1] == "clips 2/2  bikes.mp4"
    assert lines[2] == "questions 1/1  threshold 0.5: accuracy 66.7%"


def test_thresholds_are_ranges_and_lists():
    from keye.commands import ablate

    assert ablate.thresholds("0.1:0.5:0.2") == [0.1, 0.3, 0.5]
    assert ablate.thresholds("0.9,0.2") == [0.2, 0.9]
    assert ablate.thresholds("0.5,0.8:0.9:0.05") == [0.5, 0.8, 0.85, 0.9]
    for wrong in (
        "0.9:0.1:0.1",
        "high",
        "0.1:0.9",
        "0.1,",
        "0:1:0",
        "inf",
        "nan",
        "0:inf:0.1",
        "0:1:nan",
        "1.5",
        "-1",
        "0:1:1e-12",
    ):
        with pytest.raises(KeyeError, match="threshold"):
            ablate.thresholds(wrong)
