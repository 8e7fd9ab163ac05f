import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from keye.encoder import SlowFastEncoder
from keye.errors import KeyeError
from keye.slowfast.concessions import concede
from keye.slowfast.frame_buffer import FrameBuffer
from keye.slowfast.policies import Decisions, Limits, get_policy
from keye.video.clip import open_clip
from scripts.clips import clip
from tests.keye.video.make import numbered, write_video

TINY = {"min_tokens_per_frame": 4, "max_tokens_per_frame": 16, "max_tokens": 100}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_importing_needs_no_training_packages():
    code = (
        "import sys; from keye import SlowFastEncoder, VideoPlan; SlowFastEncoder();"
        "bad = {'transformers', 'deepspeed', 'datasets', 'accelerate', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_without_transformers_the_model_says_what_to_install():
    code = (
        "import sys; sys.modules['transformers'] = None\n"  # as if it were not installed
        "import keye; keye.SlowFastEncoder(); keye.KeyeProcessor"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "pip install 'keye[model]'" in result.stderr.splitlines()[-1]


def test_slow_frames_sit_at_the_cuts_of_a_real_clip():
    plan = SlowFastEncoder(threshold=0.3, measure="patch_l1", fps=5).plan(clip("bikes.mp4"))
    slow = plan.timestamps[plan.frame_types == 0].tolist()
    for cut in (1.20, 3.04, 5.48, 7.48, 9.68):
        assert any(cut - 0.01 <= moment <= cut + 0.25 for moment in slow), (cut, slow)
    assert len(slow) <= 8  # the first frame, five cuts, and a cyclist who fills the picture


def test_the_default_detects_more_than_the_released_measure():
    ours, released = SlowFastEncoder(fps=5), SlowFastEncoder.released(fps=5)
    path = clip("bikes.mp4")
    cuts = (1.20, 3.04, 5.48, 7.48, 9.68)

    def found(plan):
        slow = plan.timestamps[plan.frame_types == 0]
        return sum(bool(((slow >= cut - 0.01) & (slow <= cut + 0.25)).any()) for cut in cuts)

    assert found(ours.plan(path)) == 5 >= found(released.plan(path))


def test_pixels_are_the_resized_frames():
    frames = noise(3, 3, 150, 200)
    encoded = SlowFastEncoder(policy="uniform:2", min_tokens_per_frame=1)(frames)
    assert encoded.plan.frame_types.tolist() == [0, 1, 0]
    assert encoded.grid_thw.tolist() == [[1, h // 14, w // 14] for h, w in encoded.plan.frame_sizes]
    assert encoded.pixel_values.shape == (4 * encoded.plan.tokens, 3, 14, 14)
    assert encoded.pixel_values.dtype == torch.float32
    start = 0
    for frame, size in zip(frames, encoded.plan.frame_sizes, strict=True):
        resized = torch.nn.functional.interpolate(frame[None], size=size, mode="bicubic", antialias=True)[0]
        expected = (resized / 255 - 0.5) / 0.5
        for row in range(0, size[0], 14):
            for column in range(0, size[1], 14):
                patch = expected[:, row : row + 14, column : column + 14]
                assert torch.allclose(encoded.pixel_values[start], patch, atol=1e-6)
                start += 1
    assert start == len(encoded.pixel_values)


def test_pictures_are_restored():
    frames = noise(2, 3, 112, 112)
    encoded = SlowFastEncoder(policy="all_slow", **TINY)(frames)
    assert all(torch.equal(one, other) for one, other in zip(encoded.pictures(), frames, strict=True))


@pytest.mark.parametrize("kept_whole", [0, 1 << 30])
def test_a_large_clip_is_kept_at_a_smaller_size_with_the_right_pixels(monkeypatch, kept_whole):
    """Frames are scaled while decoding; the result is that of resizing the full frames, to 1/255 in the mean."""
    path = clip("bigbuckbunny.mp4")
    monkeypatch.setattr("keye.slowfast.frame_buffer.FULL_SIZE_BYTES", kept_whole)
    encoder = SlowFastEncoder(max_tokens=2000, min_tokens_per_frame=16)
    encoded = encoder(path)
    with open_clip(path, 2.0, 100) as opened:
        full = [frame.pixels for frame in opened]
    for picture, frame, size in zip(encoded.pictures(), full, encoded.plan.frame_sizes, strict=True):
        direct = torch.nn.functional.interpolate(frame[None], size=size, mode="bicubic", antialias=True)[0]
        assert float((picture.float() - direct.float()).abs().mean()) < 1.0
    assert encoded.plan.tokens <= 2000


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 12),
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    low=st.integers(1, 12),
    more=st.integers(0, 30),
    budget=st.integers(12, 200),
    ratio=st.floats(0.05, 1),
    policy=st.sampled_from(["adaptive", "all_slow", "uniform:3", "two_stream:slow=2,fast_tokens=3"]),
    multiple=st.sampled_from([0, 1, 4, 9.5]),
)
def test_never_above_the_budget_never_empty(count, height, width, low, more, budget, ratio, policy, multiple):
    if policy.startswith("two_stream") and budget < low + 3:
        return
    encoder = SlowFastEncoder(
        policy=policy,
        fast_ratio=ratio,
        min_tokens_per_frame=low,
        max_tokens_per_frame=low + more,
        max_tokens=budget,
        threshold=0.9,
        slow_multiple=multiple,
    )
    frames = noise(count, 3, height, width)
    encoded = encoder(frames, source_fps=2)
    plan = encoded.plan
    shown = len(plan.frame_indices.unique())
    assert 1 <= shown <= count and plan.frame_types[0] == 0
    assert plan.tokens == len(encoded.pixel_values) // 4 <= budget
    assert bool(torch.isnan(plan.similarity[0])) and not bool(torch.isnan(plan.similarity[1:]).any())
    without = encoder.with_settings(slow_multiple=0).plan(frames, source_fps=2)
    if not plan.warnings or plan.warnings == without.warnings:  # nothing was given up for the multiple
        assert torch.equal(plan.frame_types, without.frame_types) and plan.frame_sizes == without.frame_sizes
    elif multiple:
        assert not without.warnings or shown < count or "the budget of" in plan.warnings[-1]
        assert 0 in plan.counts or plan.slow_tokens >= multiple * plan.fast_tokens or plan.fast_tokens == 1
    if not multiple and not policy.startswith("two_stream"):
        assert bool(plan.warnings) == (len(plan) < count)
    assert encoded.pixel_values.isfinite().all()
    assert type(plan).from_json(plan.to_json()) == plan


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("measure", ["change", "patch_l1", "patch_cosine", "ssim", "mse", "lab"])
def test_a_clip_without_change(level, measure):
    plan = SlowFastEncoder(measure=measure).plan(torch.full((5, 3, 60, 80), level, dtype=torch.uint8))
    assert plan.frame_types.tolist() == [0, 1, 1, 1, 1]
    assert plan.similarity[1:].tolist() == pytest.approx([1.0] * 4, abs=1e-5)


def test_too_many_frames_are_thinned_with_a_warning(tmp_path):
    path = write_video(tmp_path / "long.mp4", numbered(250))
    plan = SlowFastEncoder(fps=25, min_tokens_per_frame=4, max_tokens_per_frame=9, max_tokens=50).plan(path)
    assert len(plan) == 12 and plan.tokens <= 50
    assert "12 of 250" in plan.warnings[0]
    steps = plan.timestamps.diff()
    assert float(steps.max() - steps.min()) <= 0.05
    limited = SlowFastEncoder(max_frames=3).plan(path)
    assert len(limited) == 3
    assert limited.warnings == (f"3 of 20 frames of {path} are used, spread evenly: max_frames=3",)
    assert not SlowFastEncoder(max_frames=20).plan(path).warnings  # which thins nothing


def test_plan_and_call_agree():
    encoder = SlowFastEncoder(fps=3)
    assert encoder.plan(clip("bikes.mp4")) == encoder(clip("bikes.mp4")).plan


def test_images(tmp_path):
    encoder = SlowFastEncoder()
    picture = noise(3, 100, 60)
    pixel_values, grid = encoder.image(picture)
    assert grid.tolist() == [[1, 8, 4]] and pixel_values.shape == (32, 3, 14, 14)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    for source in (
        tmp_path / "a.png",
        (tmp_path / "a.png").read_bytes(),
        Image.open(tmp_path / "a.png"),
        picture.numpy(),
    ):
        assert torch.equal(encoder.image(source)[0], pixel_values)
    large, grid = encoder.image(noise(3, 900, 900), max_tokens=64)
    assert grid.tolist() == [[1, 16, 16]] and len(large) == 256
    assert encoder.image(noise(3, 9, 9))[1].tolist() == [[1, 4, 4]]
    clear = Image.fromarray(np.zeros((56, 56, 4), dtype=np.uint8))
    assert torch.equal(encoder.image(clear)[0], torch.ones(16, 3, 14, 14))
    for wrong in (tmp_path / "none.png", b"no picture", torch.full((4, 4), 1.5)):
        with pytest.raises(KeyeError):
            encoder.image(wrong)


def test_a_tower_fills_the_features():
    def tower(pixel_values, grid_thw):
        assert int(grid_thw.prod(1).sum()) == len(pixel_values)
        return pixel_values.reshape(len(pixel_values) // 4, -1)

    encoded = SlowFastEncoder(tower=tower, **TINY)(noise(3, 3, 112, 112))
    assert encoded.features.shape == (encoded.plan.tokens, 4 * 588)
    assert SlowFastEncoder(**TINY)(noise(3, 3, 112, 112)).features is None


@pytest.mark.parametrize("policy", ["adaptive_budget:share=0.2", "two_stream:slow=3,fast_tokens=4"])
def test_policies_that_need_all_frames_read_a_large_clip_twice(monkeypatch, policy):
    encoder = SlowFastEncoder(policy=policy, max_tokens=2000, min_tokens_per_frame=4)
    once = encoder(clip("bikes.mp4"))
    monkeypatch.setattr("keye.slowfast.frame_buffer.FULL_SIZE_BYTES", 0)
    twice = encoder(clip("bikes.mp4"))
    assert once.plan == twice.plan and torch.equal(once.pixel_values, twice.pixel_values)


def test_the_slow_frames_of_two_streams_are_in_both():
    frames = noise(9, 3, 112, 112)
    encoded = SlowFastEncoder(policy="two_stream:slow=3,fast_tokens=4", min_tokens_per_frame=4)(frames)
    plan, pictures = encoded.plan, encoded.pictures()
    assert plan.frame_indices.tolist().count(0) == 2 and len(plan) == 12
    for index, kind, picture in zip(plan.frame_indices.tolist(), plan.frame_types.tolist(), pictures, strict=True):
        size = (plan.slow_size, plan.fast_size)[kind]
        assert tuple(picture.shape[1:]) == size
        expected = torch.nn.functional.interpolate(frames[index][None], size=size, mode="bicubic", antialias=True)[0]
        assert torch.equal(picture, expected)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    count=st.integers(1, 60),
    budget=st.integers(60, 400),
    ratio=st.floats(0.1, 1),
    multiple=st.sampled_from([0, 1.5, 4]),
    low=st.sampled_from([1, 5]),
)
def test_kept_frames_are_large_enough_and_within_a_multiple_of_the_budget(data, count, budget, ratio, multiple, low):
    """For all types, every frame is kept large enough, and their total is little more than the budget."""
    limits = Limits((700, 900), ratio, low, 100, budget, multiple=multiple)
    count = min(count, budget // low)
    policy = get_policy("adaptive", 0.5)
    buffer = FrameBuffer(limits, count, policy)
    buffer._full_size = False
    types = [0] + data.draw(st.lists(st.integers(0, 1), min_size=count - 1, max_size=count - 1))
    for kind in types:
        buffer.add(torch.zeros(1, 3, 700, 900, dtype=torch.uint8), [kind])
    scores = [math.nan] + data.draw(st.lists(st.integers(0, 8), min_size=count - 1, max_size=count - 1))
    decided, allocation = concede(Decisions(types, scores, list(range(count))), limits, policy)
    sizes = [(allocation.slow_size, allocation.fast_size)[kind] for kind in decided.types]
    kept = sum(frame.shape[1] * frame.shape[2] for frame in buffer.frames) / 28**2
    assert kept <= 4 * budget * (1 + np.log(count))  # a bound covers all grids that are possible
    if multiple and not buffer.frames:
        return  # the clip is read again
    assert buffer.has(decided.positions, sizes)


def test_a_policys_own_budget_is_the_plans():
    plan = SlowFastEncoder(policy="adaptive_budget:tokens=700", measure="patch_l1").plan(clip("bikes.mp4"))
    assert plan.max_tokens == 700 and plan.tokens <= 700
