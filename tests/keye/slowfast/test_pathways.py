import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keye.errors import KeyeError
from keye.slowfast.pathways import Adaptive, AllSlow, Uniform, Walk, get_policy


class Brightness:
    """1 - |difference of brightness|; frames are [T, 3, 1, 1]."""

    name, threshold = "brightness", 0.9

    def prepare(self, frames):
        return frames.float().mean((1, 2, 3)) / 100

    def compare(self, reference, features):
        return 1 - (features - reference).abs()


def frames_of(levels: list[int]) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)


def test_each_frame_is_compared_with_the_latest_slow_one():
    # 0 slow; 5 fast (0.95); 8 fast (0.92); 15 slow (0.85 to 0); 20 fast (0.95 to 15, though 0.80 to 0); 0 slow.
    types, scores = Walk(Brightness(), Adaptive(0.9)).step(frames_of([0, 5, 8, 15, 20, 0]))
    assert types == [0, 1, 1, 0, 1, 0]
    assert math.isnan(scores[0])
    assert scores[1:] == pytest.approx([0.95, 0.92, 0.85, 0.95, 0.85])


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.integers(1, 9), st.floats(0.3, 1.0))
def test_a_stream_equals_a_batch_and_the_rule(levels, step, threshold):
    batch = Walk(Brightness(), Adaptive(threshold)).step(frames_of(levels))[0]
    walk, streamed = Walk(Brightness(), Adaptive(threshold)), []
    for start in range(0, len(levels), step):
        streamed += walk.step(frames_of(levels[start : start + step]))[0]
    latest, expected = levels[0], [0]
    for level in levels[1:]:
        features = torch.tensor([latest, level]).float() / 100
        slow = float(1 - (features[1] - features[0]).abs()) < threshold
        latest = level if slow else latest
        expected.append(0 if slow else 1)
    assert batch == streamed == expected


def test_all_slow_and_uniform():
    frames = frames_of([0] * 9)
    assert Walk(Brightness(), AllSlow()).step(frames)[0] == [0] * 9
    assert Walk(Brightness(), Uniform(4)).step(frames)[0] == [0, 1, 1, 1, 0, 1, 1, 1, 0]


def test_policy_names():
    assert get_policy("adaptive", 0.8) == Adaptive(0.8)
    assert get_policy("all_slow", 0.8) == AllSlow()
    assert get_policy("uniform", 0.8) == Uniform(4)
    assert get_policy("uniform:8", 0.8).spec == "uniform:8"
    for wrong in ("fast", "uniform:0", "uniform:x", "adaptive:3"):
        with pytest.raises(KeyeError, match="use one of adaptive"):
            get_policy(wrong, 0.8)
