"""The settings of a processor, given or saved: each mistake is an error that names the file, the key and the remedy."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from keye import KeyeProcessor, SlowFastEncoder
from keye.encoder_config import EncoderConfig
from keye.errors import CheckpointError, KeyeError
from keye.processor.tokenizer import train_tokenizer

WRONG = [
    ("encoder", {"urls": None}, "encoder: urls is not a setting of the encoder; use one of threshold"),
    ("encoder", {"tower": None}, "encoder: tower is not a setting of the encoder; "),
    ("encoder", {"treshold": 0.5}, "encoder: treshold is not a setting of the encoder; did you mean threshold?"),
    ("encoder", {"fps": 0}, "encoder: fps is 0; give "),
    ("encoder", [1], "encoder is [1]; give a table"),
    ("image", {"max_token": 9}, "image: max_token is not a setting of images; did you mean max_tokens?"),
    ("image", {"urls": {}}, "image: urls is not a setting of images; use one of min_tokens, max_tokens"),
    ("image", {"max_tokens": "9"}, "image: max_tokens is '9'; give a whole number"),
    ("image", {"min_tokens": None}, "image: min_tokens is None; give a whole number"),
    ("image", {"min_tokens": 9, "max_tokens": 4}, "image: min_tokens=9 is above max_tokens=4; give "),
    ("image", 3, "image is 3; give a table"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["user assistant red blue"] * 3, 400)


@pytest.mark.parametrize(("key", "value", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_settings_are_errors(tokenizer: Any, tmp_path: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(KeyeError, match=f"^{re.escape(message)}"):
        KeyeProcessor(tokenizer, **{key: value})
    KeyeProcessor(tokenizer).save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    for load in (KeyeProcessor.from_pretrained, AutoProcessor.from_pretrained):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "KeyeVL1_5"}))
        with pytest.raises(CheckpointError, match=f"^{re.escape(f'{path}: {message}')}"):
            load(tmp_path)


@pytest.mark.parametrize("name", EncoderConfig.names())
@pytest.mark.parametrize("value", [[], {}, "x", -1, float("nan"), True, [1, 2]])
def test_any_wrong_value_of_the_encoder_is_an_error_of_the_user(tokenizer: Any, name: str, value: Any) -> None:
    with pytest.raises(KeyeError, match=r"^encoder: .*; "):
        KeyeProcessor(tokenizer, {name: value})


@pytest.mark.parametrize(("given", "saved"), [({"max_tokens": 2}, {"max_tokens": 2}), ({"min_tokens": 8.0}, None)])
def test_limits_of_an_image_are_integers_and_either_may_be_omitted(tokenizer: Any, given: dict, saved: Any) -> None:
    processor = KeyeProcessor(tokenizer, image=given)
    saved = saved or {"min_tokens": 8}
    assert processor.image == saved and all(type(value) is int for value in processor.image.values())
    still = {"type": "image", "image": Image.new("RGB", (56, 56))}
    sample = processor.sample([{"role": "user", "content": [still]}, {"role": "assistant", "content": "red"}])
    tokens = int(torch.as_tensor(sample.image_grid_thw).prod()) // 4
    assert tokens <= 2 if "max_tokens" in given else tokens >= 8


def test_the_settings_of_an_encoder_are_accepted(tokenizer: Any) -> None:
    settings = SlowFastEncoder(0.4, fps=1).settings
    assert KeyeProcessor(tokenizer, settings, {"min_tokens": 4, "max_tokens": 9}).encoder == settings
