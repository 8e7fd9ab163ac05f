import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from keye.encoder import SlowFastEncoder
from keye.encoder_config import EncoderConfig
from keye.errors import CheckpointError, KeyeError
from keye.slowfast.concessions import concede
from keye.slowfast.frame_buffer import FrameBuffer
from keye.slowfast.measures import get_measure
from keye.slowfast.measures.pixelwise import SSIM
from keye.slowfast.policies import Adaptive, Decisions, Limits, get_policy
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


def test_presets_and_settings():
    released, report = SlowFastEncoder.released(), SlowFastEncoder.report(max_tokens=2_000)
    assert released.settings == {
        "threshold": 0.9,
        "measure": "patch_cosine",
        "policy": "adaptive",
        "fast_ratio": 0.3,
        "max_tokens": 65_536,
        "min_tokens_per_frame": 48,
        "max_tokens_per_frame": 768,
        "fps": 2.0,
        "max_frames": None,
        "slow_multiple": 0.0,
        "token_side": 28,
    }
    assert SlowFastEncoder().slow_multiple == 4 and SlowFastEncoder.report().slow_multiple == 0
    assert report.settings["threshold"] == 0.95 and report.settings["max_tokens"] == 2_000
    assert SlowFastEncoder.report().max_tokens == 75_000
    custom = SlowFastEncoder(policy="uniform:5", fps=1.5, max_frames=7)
    assert SlowFastEncoder(**json.loads(json.dumps(custom.settings))).settings == custom.settings


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"fast_ratio": 0}, "fast_ratio is 0"),
        ({"min_tokens_per_frame": 9, "max_tokens_per_frame": 8}, "give 1 <= min <= max"),
        ({"max_tokens": 40}, "max_tokens=40 does not hold one frame"),
        ({"fps": -1}, "fps is -1"),
        ({"max_frames": 0}, "max_frames is 0"),
        ({"token_side": 27}, "token_side is 27"),
        ({"measure": "psnr"}, "use one of"),
        ({"policy": "slow"}, "use one of"),
    ],
)
def test_impossible_settings(wrong, match):
    with pytest.raises(KeyeError, match=match):
        SlowFastEncoder(**wrong)


class Plain:
    """A measure that lacks what its keys say, for messages."""

    def __init__(self, **parts):
        vars(self).update(parts)


METHODS = {"prepare": lambda frames: frames, "compare": lambda reference, features: features}
IMPOSSIBLE = [
    *(({name: value}, name) for name in ("threshold", "fast_ratio") for value in (95, math.nan, -1, "0.5", True)),
    *(
        ({name: value}, name)
        for name in ("max_tokens", "min_tokens_per_frame", "max_tokens_per_frame", "max_frames", "token_side")
        for value in (8000.5, math.nan, math.inf, -1, 0, "8", True, None)
        if (name, value) != ("max_frames", None)
    ),
    *(({"fps": value}, "fps") for value in (0, -1, math.nan, math.inf, "2", None)),
    ({"measure": SSIM}, r"measure is the class SSIM; give an instance of it: SSIM\(…\)"),
    ({"measure": None}, "measure is None, which has no method prepare"),
    ({"measure": Plain(**METHODS)}, "the measure Plain has no name"),
    ({"measure": Plain(**METHODS, name="mine", threshold=95)}, "threshold of the measure 'mine' is 95"),
    ({"measure": Plain(**METHODS, name="mine")}, "threshold of the measure 'mine' is None"),
    ({"policy": Adaptive}, "policy is the class Adaptive; give an instance"),
    ({"policy": None}, "policy is None; give a name"),
    ({"tower": 3}, "tower is a int; give a function"),
    ({"urls": True}, "urls is True; give UrlRules"),
]


@pytest.mark.parametrize(("wrong", "match"), IMPOSSIBLE)
def test_a_value_that_is_impossible_is_named(wrong, match):
    with pytest.raises(KeyeError, match=match) as error:
        SlowFastEncoder(**wrong)
    assert "\n" not in str(error.value)


def test_the_threshold_that_is_reported_is_the_one_that_decides():
    """Frames with similarities between two thresholds: what is reported and what is decided must agree."""
    frames = torch.stack([torch.full((3, 60, 80), 20 * step, dtype=torch.uint8) for step in range(8)])
    for threshold in (None, 0.9):
        encoder = SlowFastEncoder(threshold=threshold, policy=Adaptive(0.9), measure="mse")
        plan = encoder.plan(frames)
        assert encoder.threshold == encoder.settings["threshold"] == plan.settings["threshold"] == 0.9
        assert plan == SlowFastEncoder(threshold=0.9, measure="mse").plan(frames)
        assert SlowFastEncoder(**encoder.settings).policy == encoder.policy
    with pytest.raises(KeyeError, match="threshold is 0.5 and the policy's own threshold 0.9; give one of the two"):
        SlowFastEncoder(threshold=0.5, policy=Adaptive(0.9))
    assert SlowFastEncoder(policy="all_slow").threshold == get_measure("change").threshold


def test_numbers_of_other_kinds_become_plain_ones():
    encoder = SlowFastEncoder(max_tokens=np.int64(9000), fps=1, threshold=np.float32(0.5), max_frames=4.0)
    assert json.loads(json.dumps(encoder.settings)) == encoder.settings == encoder.config.to_dict()
    assert (encoder.max_tokens, encoder.fps, encoder.threshold, encoder.max_frames) == (9000, 1.0, 0.5, 4)
    assert encoder.config == EncoderConfig(**encoder.settings)


@pytest.mark.parametrize("threshold", [95, math.nan, -1, None])
def test_a_policy_checks_its_own_threshold(threshold):
    with pytest.raises(KeyeError, match="policy adaptive: threshold is"):
        Adaptive(threshold)


@pytest.mark.parametrize("limits", [{"max_tokens": 64.5}, {"min_tokens": math.nan}, {"min_tokens": 9, "max_tokens": 8}])
def test_impossible_limits_of_a_still(limits):
    with pytest.raises(KeyeError, match="min_tokens|max_tokens"):
        SlowFastEncoder().image(noise(3, 60, 60), **limits)


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


def test_a_directory_that_is_not_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="no preprocessor_config.json"):
        SlowFastEncoder.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match='no key "encoder"'):
        SlowFastEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'"text"'])
def test_damaged_settings_of_a_model_name_their_file(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="preprocessor_config.json.*; save the processor again"):
        SlowFastEncoder.from_pretrained(tmp_path)


def test_settings_of_a_model_are_checked_before_its_weights_are_loaded(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    for saved, match in (({"threshold": 7}, "threshold is 7"), ({"tower": None}, "tower is not a setting")):
        path.write_text(json.dumps({"encoder": saved}))
        with pytest.raises(CheckpointError, match=f'key "encoder": {match}.*; save the processor again'):
            SlowFastEncoder.from_pretrained(tmp_path)
    path.write_text(json.dumps({"encoder": SlowFastEncoder().settings}))
    with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path))} .*; give"):  # there is no model
        SlowFastEncoder.from_pretrained(tmp_path)


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


def test_settings_are_changed_by_with_settings_only():
    encoder = SlowFastEncoder(max_tokens=900)
    with pytest.raises(AttributeError, match="with_settings"):
        encoder.max_tokens = 800
    assert encoder.with_settings(max_tokens=800).settings == {**encoder.settings, "max_tokens": 800}
    assert encoder.with_settings(threshold=0.25).policy.threshold == 0.25 and encoder.threshold != 0.25
    with pytest.raises(KeyeError, match="max_token is not a setting.*did you mean max_tokens"):
        encoder.with_settings(max_token=800)
