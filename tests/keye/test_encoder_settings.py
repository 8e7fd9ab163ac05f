"""Settings of the encoder: presets, impossible values, and those of a saved model."""

import json
import math
import re

import numpy as np
import pytest
import torch

from keye.encoder import SlowFastEncoder
from keye.encoder_config import EncoderConfig
from keye.errors import CheckpointError, KeyeError
from keye.slowfast.measures import get_measure
from keye.slowfast.measures.pixelwise import SSIM
from keye.slowfast.policies import Adaptive
from tests.keye.test_encoder import noise


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


def test_settings_are_changed_by_with_settings_only():
    encoder = SlowFastEncoder(max_tokens=900)
    with pytest.raises(AttributeError, match="with_settings"):
        encoder.max_tokens = 800
    assert encoder.with_settings(max_tokens=800).settings == {**encoder.settings, "max_tokens": 800}
    assert encoder.with_settings(threshold=0.25).policy.threshold == 0.25 and encoder.threshold != 0.25
    with pytest.raises(KeyeError, match="max_token is not a setting.*did you mean max_tokens"):
        encoder.with_settings(max_token=800)
