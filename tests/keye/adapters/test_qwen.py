"""The decisions of `keye.adapters.qwen`, and `qwen_models.py` in a process that has torchvision."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keye import SlowFastEncoder
from keye.adapters.qwen import clip_frames, visual_tokens
from keye.errors import KeyeError
from keye.slowfast.plan import VideoPlan
from tests.keye.adapters.torchvision_wheel import PACKAGE, fetch_torchvision

ROOT = Path(__file__).resolve().parents[3]


def plan_of(types: list[int]) -> VideoPlan:
    count = len(types)
    return VideoPlan(
        source="drawn",
        frame_types=torch.tensor(types),
        timestamps=torch.arange(count) / 2,
        frame_indices=torch.arange(count),
        similarity=torch.zeros(count),
        source_size=(112, 168),
        slow_size=(112, 168),
        fast_size=(56, 84),
        max_tokens=10_000,
        duration=count / 2,
        settings=SlowFastEncoder().settings,
    )


@given(st.lists(st.integers(0, 1), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_tokens_are_counted_run_by_run(types):
    plan = plan_of(types)
    expected, i = 0, 0
    while i < len(types):
        length = 1
        while i + length < len(types) and types[i + length] == types[i]:
            length += 1
        expected += -(-length // 2) * (24, 6)[types[i]]
        i += length
    assert visual_tokens(plan) == expected <= plan.tokens
    assert visual_tokens(plan, "images") == visual_tokens(plan, merge=1) == plan.tokens


def test_frames_sizes_and_times_of_a_clip():
    red, blue = (torch.zeros(1, 3, 112, 168, dtype=torch.uint8).index_fill(1, torch.tensor(c), 250) for c in (0, 2))
    video = torch.cat([red, red, red, blue, blue])
    clip = clip_frames(video, SlowFastEncoder())
    assert clip.plan.frame_types.tolist() == [0, 1, 1, 0, 1]
    assert [tuple(frame.shape) for frame in clip.frames] == [(3, *size) for size in clip.sizes]
    assert clip.sizes == clip.plan.frame_sizes and clip.timestamps == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [run.times for run in clip.runs] == [(0.0,), (0.5, 1.0), (1.5,), (2.0,)]
    assert torch.equal(torch.cat([run.frames.float().mean((2, 3)) for run in clip.runs]), video.float().mean((2, 3)))
    again = clip_frames(SlowFastEncoder()(video), SlowFastEncoder(fps=1))
    assert all(map(torch.equal, again.frames, clip.frames))


def test_frames_of_one_size_are_one_run_for_any_types():
    video = torch.zeros(4, 3, 56, 84, dtype=torch.uint8)
    clip = clip_frames(video, SlowFastEncoder(fast_ratio=1.0))
    assert clip.plan.frame_types.tolist() == [0, 1, 1, 1] and len(clip.runs) == 1


@pytest.mark.parametrize(
    ("times", "rate"),
    [([0.0], 2.0), ([0.0, 0.48, 1.0, 1.48], 2.0), ([0.0, 1.0, 2.0], 1.0), ([0.0, 0.1, 0.2], pytest.approx(10))],
)
def test_the_rate_is_the_encoders_where_the_times_agree(times, rate):
    video = torch.zeros(len(times), 3, 56, 84, dtype=torch.uint8)
    encoder = SlowFastEncoder()
    assert clip_frames(encoder(video, timestamps=times), encoder).rate == rate


def test_an_unknown_mode_is_an_error():
    with pytest.raises(KeyeError, match="mode is 'frames'; use"):
        visual_tokens(plan_of([0]), "frames")


@pytest.mark.slow
def test_on_processors_and_models_of_transformers():
    folder = fetch_torchvision()
    if folder is None:
        pytest.skip(f"pip cannot download {PACKAGE}, which the video processors of transformers need")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    path = os.pathsep.join(part for part in (folder, os.environ.get("PYTHONPATH", "")) if part)
    result = subprocess.run(
        [*command, str(Path(__file__).with_name("qwen_models.py"))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
