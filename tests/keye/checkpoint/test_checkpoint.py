"""Model directories: the released names one by one, and exact round trips."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from keye import KeyeConfig, KeyeForConditionalGeneration, KeyeProcessor, SlowFastEncoder
from keye.checkpoint import released_layout as names
from keye.checkpoint.convert import (
    Report,
    check,
    convert_released,
    export_released,
    load_released,
    save_released,
)
from keye.checkpoint.initialise import expected_shapes
from keye.checkpoint.shards import folded, open_checkpoint
from keye.commands.convert import main
from keye.errors import CheckpointError, run
from tests.keye.model import parts

# config.json as the release has it (vLLM's keye_vl1_5.py and Qwen3 read these), at a small size.
RELEASED = {
    "architectures": ["KeyeVL1_5ForConditionalGeneration"],
    "auto_map": {"AutoModel": "modeling_keye_vl_1_5.KeyeVL1_5ForConditionalGeneration"},
    "model_type": "KeyeVL1_5",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "vocab_size": 448,
    "max_position_embeddings": 131072,
    "max_window_layers": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 8000000,
    "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "mrope"},
    "attention_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
    "some_future_field": 7,
    "vision_config": {
        "model_type": "KeyeVL1_5",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 60,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "tokens_per_second": 2,
    },
}


def released(folder: Path, shards: int = 3, tokenizer: bool = True) -> dict[str, torch.Tensor]:
    """A tiny directory like the release's: bf16, sharded, with weights that its forward pass never reads."""
    config = KeyeConfig.from_dict(RELEASED)
    generator = torch.Generator().manual_seed(3)
    shapes = {names.to_released(name): shape for name, shape in expected_shapes(config).items()}
    shapes |= {names.PACKING: (40, 32), "visual.vision_model.head.probe": (1, 1, 32)}
    tensors = {
        name: torch.randn(shape, generator=generator).mul(0.05).to(torch.bfloat16) for name, shape in shapes.items()
    }
    folder.mkdir()
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(RELEASED))
    (folder / "processing_keye_vl_1_5.py").write_text("# code of the release\n")
    preprocessor = {"auto_map": {"AutoProcessor": "x.Y"}, "min_pixels": 3200, "max_pixels": 28 * 28 * 1280, "extra": 1}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    if tokenizer:
        parts.released_tokenizer().save_pretrained(folder)
    return tensors


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal names, dtypes and bits."""
    bits = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].view(bits[a[k].dtype]), b[k].view(bits[b[k].dtype])) for k in a
    )


# --- names and shapes -----------------------------------------------------------------------------------------------


def test_keye_8b_has_the_released_names_shapes_and_parameters() -> None:
    shapes = {names.to_released(n): s for n, s in expected_shapes(KeyeConfig.preset("keye_8b")).items()}
    assert set(shapes) == parts.released_names(tower_layers=27, decoder_layers=36)
    layer = "model.layers.35."
    tower = "visual.vision_model.encoder.layers.26."
    facts = {
        "model.embed_tokens.weight": (151_936, 4096),
        "lm_head.weight": (151_936, 4096),
        layer + "self_attn.q_proj.weight": (32 * 128, 4096),
        layer + "self_attn.k_proj.weight": (8 * 128, 4096),
        layer + "self_attn.v_proj.weight": (8 * 128, 4096),
        layer + "self_attn.o_proj.weight": (4096, 32 * 128),
        layer + "self_attn.q_norm.weight": (128,),
        layer + "mlp.gate_proj.weight": (12_288, 4096),
        layer + "mlp.down_proj.weight": (4096, 12_288),
        "visual.vision_model.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        "visual.vision_model.embeddings.position_embedding.weight": (27 * 27, 1152),
        tower + "self_attn.out_proj.weight": (1152, 1152),
        tower + "mlp.fc1.weight": (4304, 1152),
        tower + "mlp.fc2.bias": (1152,),
        "mlp_AR.pre_norm.weight": (4608,),
        "mlp_AR.linear_1.weight": (4608, 4608),
        "mlp_AR.linear_2.weight": (4096, 4608),
    }
    assert {name: shapes[name] for name in facts} == facts

    qwen3_layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 12_288 * 4096 + 2 * 128 + 2 * 4096
    qwen3 = 2 * 151_936 * 4096 + 36 * qwen3_layer + 4096
    assert qwen3 == 8_190_735_360  # Qwen3-8B: 8.19 B
    siglip_layer = 4 * (1152 * 1152 + 1152) + (1152 * 4304 + 4304) + (4304 * 1152 + 1152) + 4 * 1152
    siglip = (3 * 14 * 14 * 1152 + 1152) + 27 * 27 * 1152 + 27 * siglip_layer + 2 * 1152
    projector = 2 * 4608 + (4608 * 4608 + 4608) + (4608 * 4096 + 4096)
    assert sum(torch.Size(s).numel() for s in shapes.values()) == qwen3 + siglip + projector
    assert 8.6e9 < qwen3 + siglip + projector < 8.7e9  # published as "8B": a Qwen3-8B and a tower of 0.4 B


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.visual.embeddings.patch_embedding.bias", "visual.vision_model.embeddings.patch_embedding.bias"),
        (
            "model.visual.embeddings.position_embedding.weight",
            "visual.vision_model.embeddings.position_embedding.weight",
        ),
        (
            "model.visual.encoder.layers.3.self_attn.v_proj.bias",
            "visual.vision_model.encoder.layers.3.self_attn.v_proj.bias",
        ),
        ("model.visual.encoder.layers.3.mlp.fc1.weight", "visual.vision_model.encoder.layers.3.mlp.fc1.weight"),
        ("model.visual.encoder.layers.3.layer_norm2.weight", "visual.vision_model.encoder.layers.3.layer_norm2.weight"),
        ("model.visual.post_layernorm.weight", "visual.vision_model.post_layernorm.weight"),
        ("model.projector.pre_norm.weight", "mlp_AR.pre_norm.weight"),
        ("model.projector.linear_1.bias", "mlp_AR.linear_1.bias"),
        ("model.projector.linear_2.weight", "mlp_AR.linear_2.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.language_model.layers.7.self_attn.q_norm.weight", "model.layers.7.self_attn.q_norm.weight"),
        ("model.language_model.layers.7.mlp.down_proj.weight", "model.layers.7.mlp.down_proj.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)  # fmt: skip
def test_each_name_goes_there_and_back(ours: str, theirs: str) -> None:
    assert names.to_released(ours) == theirs and names.from_released(theirs) == ours
    mapped = theirs
    for pattern, replacement in names.KEY_MAPPING.items():
        mapped = re.sub(pattern, replacement, mapped)
    assert mapped == ours
    assert all(not re.search(pattern, ours) for pattern in names.KEY_MAPPING)


@pytest.mark.parametrize(
    "name", ["head.probe", "head.attention.in_proj_weight", "head.layernorm.bias", "head.mlp.fc1.bias"]
)
def test_what_the_forward_pass_never_reads_is_left_out(name: str) -> None:
    assert names.from_released(f"visual.vision_model.{name}") is None
    assert names.tower_name(name) is None and names.tower_name(f"vision_model.{name}") is None
    assert names.from_released(names.PACKING) is None and names.tower_name(names.PACKING) is None


# --- config.json and the processor's files ---------------------------------------------------------------------------


def test_config_fields_of_the_release() -> None:
    config = KeyeConfig.from_dict(RELEASED)
    text, vision = config.text_config, config.vision_config
    assert text.model_type == "qwen3" and not config.tie_word_embeddings
    for name in ("hidden_size", "head_dim", "vocab_size", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(text, name) == RELEASED[name]
    assert text.rope_parameters["rope_theta"] == 8e6 and text.rope_parameters["rope_type"] == "default"
    assert (vision.hidden_size, vision.position_grid, vision.patch_size) == (32, 4, 14)
    assert (config.image_token_id, config.video_token_id) == (5, 6)
    assert str(config.dtype) in ("torch.bfloat16", "bfloat16")

    back = names.config_to_released(config.to_dict())
    for name, value in RELEASED.items():
        if name not in ("auto_map", "some_future_field", "vision_config"):
            assert back[name] == value, name
    assert back["vision_config"].items() >= (RELEASED["vision_config"] | {"image_size": 56}).items()


def test_serving_engines_find_what_they_read() -> None:
    """vLLM's keye.py and keye_vl1_5.py: every field that they take from config.json and preprocessor_config.json."""
    values = names.config_to_released(KeyeConfig.preset("keye_8b").to_dict())
    assert values["architectures"] == ["KeyeVL1_5ForConditionalGeneration"]
    assert values["rope_scaling"]["mrope_section"] == [16, 24, 24] and values["rope_scaling"]["type"] == "mrope"
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    assert [values[name] for name in ids] == [151655, 151656, 151652, 151653]
    tower = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_channels": 3, "patch_size": 14, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
        "spatial_merge_size": 2,
    }  # fmt: skip
    assert values["vision_config"].items() >= tower.items()
    assert values["vision_config"]["image_size"] // 14 == 27
    qwen3 = {"hidden_size": 4096, "num_hidden_layers": 36, "head_dim": 128, "vocab_size": 151_936, "hidden_act": "silu"}
    assert values.items() >= qwen3.items()
    files = names.preprocessor()
    assert files.items() >= {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 1}.items()
    assert files["min_pixels"] == 4 * 28 * 28 and files["max_pixels"] == 20_480 * 28 * 28
    assert files["image_mean"] == files["image_std"] == [0.5, 0.5, 0.5]


def test_a_model_that_engines_cannot_build_is_refused() -> None:
    llama = KeyeConfig(text_config={"model_type": "llama", **parts.SIZES}, vision_config=parts.TOWER).to_dict()
    with pytest.raises(CheckpointError, match="with Qwen3 only"):
        names.config_to_released(llama)
    plain = KeyeConfig.preset("tiny")
    plain.vision_config.rotary = False
    with pytest.raises(CheckpointError, match="2-D RoPE"):
        names.config_to_released(plain.to_dict())


# --- round trips -----------------------------------------------------------------------------------------------------


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
        ("image", 3, "image is 3"),
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


# --- strictness ------------------------------------------------------------------------------------------------------


def drop(folder: Path, name: str, instead: dict[str, torch.Tensor] | None = None) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    path = folder / index[name]
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors | (instead or {}), path)


def test_missing_weights_are_an_error_unless_allowed(tmp_path: Path) -> None:
    released(tmp_path / "theirs")
    drop(tmp_path / "theirs", "mlp_AR.linear_1.bias")
    assert check(tmp_path / "theirs").missing == ["model.projector.linear_1.bias"]
    with pytest.raises(CheckpointError, match="model.projector.linear_1.bias"):
        convert_released(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(CheckpointError, match="1 weights are missing"):
        load_released(tmp_path / "theirs")
    assert not (tmp_path / "ours").exists()
    report = convert_released(tmp_path / "theirs", tmp_path / "ours", allow_missing=True)
    assert report.missing == ["model.projector.linear_1.bias"] and "1 missing" in str(report)


def test_other_shapes_and_unknown_names_are_reported(tmp_path: Path) -> None:
    released(tmp_path / "theirs")
    drop(tmp_path / "theirs", "mlp_AR.linear_2.bias", {"mlp_AR.linear_2.bias": torch.zeros(3), "fast.x": torch.ones(2)})
    report = check(tmp_path / "theirs")
    assert report.mismatched == [("model.projector.linear_2.bias", (3,), (64,))] and report.unexpected == ["fast.x"]
    assert "model.projector.linear_2.bias is [3]" in str(report) and "fast.x" in str(report)
    with pytest.raises(CheckpointError, match=r"shape \[3\], the model's is \[64\]"):
        convert_released(tmp_path / "theirs", tmp_path / "ours", allow_missing=True)


def test_damaged_directories_are_named(tmp_path: Path) -> None:
    released(tmp_path / "theirs")
    shard = tmp_path / "theirs" / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        check(tmp_path / "theirs")
    shard.write_bytes(b"no header at all")
    with pytest.raises(CheckpointError, match="damaged"):
        check(tmp_path / "theirs")
    shard.unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors is missing"):
        check(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="no such"):
        check(tmp_path / "nowhere")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text(json.dumps(RELEASED))
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled"):
        check(tmp_path / "pickled")
    (tmp_path / "pickled" / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(CheckpointError, match="'qwen2_vl'"):
        check(tmp_path / "pickled")


def test_report_folds_layers() -> None:
    layers = [f"visual.encoder.layers.{i}.mlp.fc1.bias" for i in (0, 1, 2)] + ["lm_head.weight"]
    assert folded(layers) == ["visual.encoder.layers.{0..2}.mlp.fc1.bias", "lm_head.weight"]
    assert folded([f"a.{i}.b" for i in (0, 2)]) == ["a.{0,2}.b"]
    assert str(Report(loaded=3)) == "3 tensors fit"


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    released(tmp_path / "theirs")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_released(tmp_path / "theirs", tmp_path / "ours", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_directory_that_is_no_release_is_named_before_a_progress_bar(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["keye convert", "from-released", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        run(main)
    wanted = "is not a released Keye-VL-1.5 directory; name the directory of the downloaded release"
    assert capsys.readouterr().err == f"error: {tmp_path} {wanted}\n"
