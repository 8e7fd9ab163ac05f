"""Arguments of the encoder's calls: streams, sizes, names, options and formats."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from keye.encoder import SlowFastEncoder
from keye.errors import KeyeError, VideoError
from keye.video.clip import open_clip
from scripts.clips import clip
from tests.keye.test_encoder import TINY, noise


@pytest.mark.parametrize("policy", [
    "adaptive", "adaptive:max_gap=2", "all_slow", "uniform:3", "strided:2", "random:every=2",
])  # fmt: skip
def test_a_stream_decides_as_the_plan_does(policy):
    encoder = SlowFastEncoder(policy=policy, fps=4)
    with open_clip(clip("bikes.mp4"), 4, 100) as opened:
        frames = [(frame.time, frame.pixels) for frame in opened]
    plan = encoder.plan(torch.stack([pixels for _, pixels in frames]), timestamps=[time for time, _ in frames])
    taken = []

    def camera():
        for frame in frames:
            taken.append(frame)
            yield frame

    for count, decision in enumerate(encoder.stream(camera()), start=1):
        assert len(taken) == count  # nothing is read ahead
        assert decision.frame_type == plan.frame_types[decision.index]
        assert decision.time == pytest.approx(float(plan.timestamps[decision.index]))
        assert np.array_equal(np.float32(decision.similarity), plan.similarity[decision.index], equal_nan=True)
        assert decision.size == (plan.slow_size, plan.fast_size)[decision.frame_type]
        assert not decision.beyond_budget
    assert count == len(plan)


@pytest.mark.parametrize(
    "limit", [{"max_frames": 5}, {"max_tokens": 40, "min_tokens_per_frame": 8, "slow_multiple": 0}]
)
def test_a_stream_marks_frames_that_a_plan_would_leave_out(limit):
    encoder, frames = SlowFastEncoder(**limit), [noise(3, 56, 56, seed=i) for i in range(7)]
    assert encoder.most_frames == 5
    decisions = list(encoder.stream(frames))
    assert [decision.beyond_budget for decision in decisions] == [False] * 5 + [True] * 2
    for count in (4, 5):
        plan = encoder.plan(torch.stack(frames[:count]), timestamps=[i / encoder.fps for i in range(count)])
        assert plan.frame_types.tolist() == [decision.frame_type for decision in decisions[:count]]
    plan = encoder.plan(torch.stack(frames), timestamps=[i / encoder.fps for i in range(7)])
    assert len(plan) == 5 and plan.warnings


def test_policies_and_frames_that_cannot_be_streamed():
    with pytest.raises(KeyeError, match="needs all frames of a clip to decide"):
        SlowFastEncoder(policy="two_stream").stream([])
    with pytest.raises(VideoError, match="frame 1 is 30x30 pixels and the first 40x40"):
        list(SlowFastEncoder().stream([noise(3, 40, 40), noise(3, 30, 30)]))
    for path in ("clip.mp4", Path("clip.mp4"), b"clip"):
        with pytest.raises(VideoError, match="a stream takes frames, not a file"):
            SlowFastEncoder().stream(path)


@pytest.mark.parametrize("times", [(math.nan,), (math.inf,), ("a",), (None,), (1.0, 0.5), (1.0, 1.0)])
def test_times_of_a_stream_are_finite_and_ascend(times):
    stream = SlowFastEncoder().stream([(time, noise(3, 40, 40)) for time in times])
    with pytest.raises(VideoError, match=f"the time of frame {len(times) - 1} is .*; give finite seconds"):
        list(stream)


@pytest.mark.parametrize("item", [(0.0, noise(3, 40, 40), 1), (noise(3, 40, 40),), ()])
def test_items_of_a_stream_are_frames_or_pairs(item):
    with pytest.raises(
        VideoError, match=r"item 0 of the stream has \d values; give frames, or pairs \(seconds, frame\)"
    ):
        list(SlowFastEncoder().stream([item]))


@pytest.mark.parametrize("size", [np.int64(56), np.float32(56), torch.tensor([56, 56]), (56, np.int64(56))])
def test_sizes_of_frames_may_be_numbers_of_other_kinds(size):
    assert SlowFastEncoder(**TINY).frames(noise(2, 3, 60, 60), size=size, source_fps=1).slow.shape[2:] == (56, 56)


@pytest.mark.parametrize("size", ["56", object(), 0, -1, 5.5, math.nan, (1, 2, 3), (), (56, "56"), True])
def test_impossible_sizes_of_frames_are_refused_before_any_work(size):
    for name in ("size", "fast_size"):
        with pytest.raises(KeyeError, match=f"^{name} is .*; give "):
            SlowFastEncoder().frames("missing.mp4", **{name: size})


def test_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    encoder = SlowFastEncoder()
    assert len(encoder.plan(".")) == 1
    for source in ("", {"path": "", "bytes": None}):
        with pytest.raises(VideoError, match="a video names no file"):
            encoder.plan(source)
        with pytest.raises(VideoError, match="an image names no file"):
            encoder.image(source)
    with pytest.raises(VideoError, match="names no file"):
        encoder.plan("file://")
    with pytest.raises(VideoError, match="an image names no file"):
        encoder.plan([tmp_path / "a.png", ""], source_fps=1)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"fps": 1}, "fps is a setting of the encoder; use encoder.with_settings\\(fps="),
        ({"max_frames": 1}, "max_frames is a setting of the encoder"),
        ({"strat": 1}, "strat is not an option; did you mean start"),
        ({"urls": None}, "urls is not an option"),
    ],
)
def test_unknown_options_are_refused_before_any_work(wrong, match):
    encoder = SlowFastEncoder()
    for call in (encoder, encoder.plan, encoder.frames):
        with pytest.raises(KeyeError, match=match):
            call("missing.mp4", **wrong)
    with pytest.raises(KeyeError, match="dtpye is not an option; did you mean dtype"):
        encoder("missing.mp4", dtpye=torch.uint8)
    with pytest.raises(KeyeError, match="dtype is an option of pixels"):
        encoder.plan("missing.mp4", dtype=torch.uint8)


@pytest.mark.parametrize("device", ["fast", "cuda:99"])
def test_a_device_that_torch_lacks_is_refused_before_planning(device):
    with pytest.raises(KeyeError, match=f"device {device} cannot be used") as error:
        SlowFastEncoder()("missing.mp4", device=device)
    assert "\n" not in str(error.value)


def test_formats_by_position():
    video = SlowFastEncoder(**TINY)(noise(2, 3, 56, 56), source_fps=1, dtype=torch.uint8)
    expected = video.to(dtype=torch.bfloat16, device="cpu")
    for target in ((torch.bfloat16,), ("cpu", torch.bfloat16), (torch.device("cpu"), torch.bfloat16)):
        assert torch.equal(video.to(*target).pixel_values, expected.pixel_values)
    assert video.to("cpu").format == video.to(device="cpu").format
    with pytest.raises(KeyeError, match="dtype is given twice"):
        video.to(torch.bfloat16, dtype=torch.uint8)
