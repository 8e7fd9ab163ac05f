"""Conversions between the released layout and ours: exact round trips, and models in memory."""

import json
from pathlib import Path

import pytest
import torch

from keye import KeyeForConditionalGeneration, KeyeProcessor, SlowFastEncoder
from keye.checkpoint import released_layout as names
from keye.checkpoint.convert import check, convert_released, export_released, load_released, save_released
from keye.checkpoint.initialise import expected_shapes
from keye.checkpoint.shards import open_checkpoint
from keye.errors import CheckpointError
from tests.keye.checkpoint.directories import RELEASED, everything, released, same
from tests.keye.model import parts


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    tensors = released(tmp_path / "theirs")
    report = convert_released(tmp_path / "theirs", tmp_path / "ours", max_shard=60_000)
    assert report.clean and sum(map(len, report.left_out.values())) == 2
    shards = list((tmp_path / "ours").glob("model-*.safetensors"))
    assert len(shards) > 2 and all(path.stat().st_size < 70_000 for path in shards)
    assert check(tmp_path / "ours").clean
    processor = KeyeProcessor.from_pretrained(tmp_path / "ours")
    assert (processor.encoder["measure"], processor.encoder["threshold"]) == ("patch_cosine", 0.9)  # as it was trained
    assert processor.image == {"min_tokens": 4, "max_tokens": 1280}

    export_released(tmp_path / "ours", tmp_path / "back", max_shard=60_000)
    assert same(everything(tmp_path / "back"), tensors)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: config[name] for name in RELEASED if name != "vision_config"} == {
        name: value for name, value in RELEASED.items() if name != "vision_config"
    }
    assert config["vision_config"].items() >= RELEASED["vision_config"].items()
    assert (tmp_path / "back" / "processing_keye_vl_1_5.py").is_file()
    preprocessor = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    kept = {"auto_map": {"AutoProcessor": "x.Y"}, "min_pixels": 3200, "max_pixels": 28 * 28 * 1280, "extra": 1}
    assert preprocessor.items() >= kept.items()
    assert check(tmp_path / "back").clean


def test_an_exported_directory_comes_back_with_its_own_encoder(tmp_path: Path) -> None:
    released(tmp_path / "theirs")
    convert_released(tmp_path / "theirs", tmp_path / "ours")
    tokenizer = KeyeProcessor.from_pretrained(tmp_path / "ours").tokenizer
    encoder = SlowFastEncoder(0.4, measure="patch_l1", fps=1, max_tokens=900).settings
    for image in ({}, {"max_tokens": 77}):
        KeyeProcessor(tokenizer, encoder, image).save_pretrained(tmp_path / "ours")
        back = tmp_path / f"back{len(image)}"
        export_released(tmp_path / "ours", back)
        convert_released(back, tmp_path / f"again{len(image)}")
        again = KeyeProcessor.from_pretrained(tmp_path / f"again{len(image)}")
        assert again.encoder == encoder and again.image == image

    path = back / "preprocessor_config.json"
    values = json.loads(path.read_text())
    for key, wrong, match in (
        ("encoder", [1], "encoder is"),
        ("encoder", {**encoder, "fps": 0}, "encoder: fps is 0"),
        ("encoder", {"treshold": 1}, "did you mean threshold"),
        ("encoder", {"urls": {}}, "encoder: urls is not a setting"),
        ("encoder", {"tower": 1}, "encoder: tower is not a setting"),
        ("image", 3, "image is 3"),
        ("image", {"max_token": 9}, "image: max_token is not .*did you mean max_tokens"),
        ("image", {"max_tokens": "9"}, "image: max_tokens is '9'; give"),
        ("min_pixels", "many", "min_pixels is 'many'; give"),
    ):
        path.write_text(json.dumps(values | {key: wrong}))
        with pytest.raises(CheckpointError, match=f"preprocessor_config.json: .*{match}"):
            convert_released(back, tmp_path / "wrong")


def test_released_directory_loads_directly_and_is_saved_with_our_names(tmp_path: Path) -> None:
    tensors = released(tmp_path / "theirs")
    model, report = load_released(tmp_path / "theirs")
    assert report.clean and model.dtype == torch.bfloat16
    state = {names.to_released(name): t for name, t in model.state_dict().items()}
    assert same(state, {name: tensors[name] for name in state}) and len(state) == len(tensors) - 2
    convert_released(tmp_path / "theirs", tmp_path / "ours")
    converted = KeyeForConditionalGeneration.from_pretrained(tmp_path / "ours")
    ids = torch.tensor([[7, 8, 9, 10]])
    assert torch.equal(model(input_ids=ids).logits, converted(input_ids=ids).logits)

    model.save_pretrained(tmp_path / "saved")
    assert set(open_checkpoint(tmp_path / "saved")) == set(expected_shapes(model.config))


def test_a_model_in_memory_is_written_as_released(tmp_path: Path) -> None:
    released(tmp_path / "theirs")
    model, _ = load_released(tmp_path / "theirs")
    convert_released(tmp_path / "theirs", tmp_path / "ours")
    processor = KeyeProcessor.from_pretrained(tmp_path / "ours")
    report = save_released(model, processor, tmp_path / "alone")
    assert report.made["zeros that engines load and never use"] == [names.PACKING]
    written = open_checkpoint(tmp_path / "alone")
    assert set(written) == parts.released_names(2, 2) | {names.PACKING}
    assert written[names.PACKING].shape == (32_768, 32)
    settings = json.loads((tmp_path / "alone" / "processor_config.json").read_text())
    assert settings["processor_class"] == "KeyeVL1_5Processor"
    again = KeyeProcessor.from_pretrained(tmp_path / "alone")
    assert again.encoder == processor.encoder and again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    tokenizer = json.loads((tmp_path / "alone" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 has no TokenizersBackend
    assert isinstance(tokenizer.get("extra_special_tokens", {}), dict)  # nor lists here
    assert "<|frame|>" in tokenizer["additional_special_tokens"]

    save_released(model, processor, tmp_path / "like", like=tmp_path / "theirs")
    assert same(everything(tmp_path / "like"), everything(tmp_path / "theirs"))
