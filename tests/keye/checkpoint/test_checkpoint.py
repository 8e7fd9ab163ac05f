"""Model directories: the released names one by one, exact round trips, and models made of pretrained parts."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from keye import KeyeConfig, KeyeForConditionalGeneration, KeyeProcessor
from keye.checkpoint import released_layout as names
from keye.checkpoint.convert import (
    Report,
    check,
    convert_released,
    export_released,
    initialise,
    load_released,
    save_released,
)
from keye.checkpoint.initialise import EMBEDDINGS, HEAD, expected_shapes
from keye.checkpoint.shards import folded, open_checkpoint
from keye.errors import CheckpointError
from keye.model.config import KeyeVisionConfig
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
    with pytest.raises(CheckpointError, match="cut short"):
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


# --- Keyes of pretrained parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", parts.DECODERS)
@pytest.mark.parametrize("tied", [False, True])
def test_made_of_a_decoder_it_generates_what_the_decoder_generates(family: str, tied: bool, tmp_path: Path) -> None:
    decoder = parts.decoder(tmp_path / "text", family, tie_word_embeddings=tied)
    report = initialise(tmp_path / "text", KeyeVisionConfig(**parts.TOWER), out=tmp_path / "keye", max_shard=60_000)
    assert report.clean and len(list((tmp_path / "keye").glob("model-*.safetensors"))) > 2
    model = KeyeForConditionalGeneration.from_pretrained(tmp_path / "keye").eval()
    processor = KeyeProcessor.from_pretrained(tmp_path / "keye")
    assert model.config.image_token_id == processor.token_id("<|image_pad|>")
    assert processor.tokenizer.eos_token_id in model.generation_config.eos_token_id

    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = decoder(ids).logits, model(input_ids=ids).logits
    before = len(parts.plain_tokenizer())
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours[..., :before], theirs[..., :before], rtol=1e-5, atol=1e-5)
    old, new = decoder.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(old[:before], new[:before])


def test_new_rows_stand_around_the_mean_and_use_the_padding_first(tmp_path: Path) -> None:
    tokens = parts.plain_tokenizer()
    decoder = parts.decoder(tmp_path / "text", dtype=torch.bfloat16, vocab_size=len(tokens) + 2)
    report = initialise(tmp_path / "text", KeyeVisionConfig(**parts.TOWER), out=tmp_path / "keye")
    assert report.made["9 rows of new tokens around the mean"] == [EMBEDDINGS, HEAD]
    stored = open_checkpoint(tmp_path / "keye")
    state = decoder.state_dict()
    for ours, theirs in ((EMBEDDINGS, "model.embed_tokens.weight"), (HEAD, "lm_head.weight")):
        rows, old = stored[ours].read(), state[theirs]
        known, count = len(tokens), len(tokens) + 9
        assert rows.dtype == torch.bfloat16 and len(rows) % 64 == 0 and len(rows) >= count
        assert torch.equal(rows[:known], old[:known])
        mean, deviation = old[:known].float().mean(0), old[:known].float().std(0)
        distance = (rows[known:count].float() - mean) / deviation
        assert 0.07 < distance.square().mean().sqrt() < 0.13  # a tenth of the spread
        assert len({tuple(row.tolist()) for row in rows[known:count]}) == 9
        assert torch.equal(rows[count:], mean.to(torch.bfloat16).expand(len(rows) - count, -1))


def test_padding_rows_are_enough_when_there_are_many(tmp_path: Path) -> None:
    decoder = parts.decoder(tmp_path / "text", vocab_size=448)
    initialise(tmp_path / "text", KeyeVisionConfig(**parts.TOWER), out=tmp_path / "keye")
    rows, known = open_checkpoint(tmp_path / "keye")[EMBEDDINGS].read(), len(parts.plain_tokenizer())
    assert rows.shape == (448, 64)
    old = decoder.get_input_embeddings().weight
    assert torch.equal(rows[known + 9 :], old[known + 9 :])
    assert not torch.equal(rows[known : known + 9], old[known : known + 9])


@pytest.mark.parametrize("whole", [False, True])
def test_a_siglip_is_taken_over_without_its_head(whole: bool, tmp_path: Path) -> None:
    parts.decoder(tmp_path / "text")
    siglip = parts.siglip(tmp_path / "vision", complete=whole)
    report = initialise(tmp_path / "text", tmp_path / "vision", out=tmp_path / "keye")
    left = report.left_out["SigLIP's pooling head and text tower"]
    assert all("head." in name or name.startswith(("text_model.", "logit_")) for name in left) and len(left) >= 11
    config = KeyeConfig.from_pretrained(tmp_path / "keye")
    config.vision_config.rotary = False
    model = KeyeForConditionalGeneration.from_pretrained(tmp_path / "keye", config=config).eval()
    assert config.vision_config.position_grid == 4
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    tower = siglip.vision_model if whole else siglip
    patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14)[0].permute(1, 2, 0, 3, 4).flatten(0, 1)
    with torch.no_grad():
        theirs = tower(pixel_values=pixels).last_hidden_state[0]
        ours = model.visual(patches, torch.tensor([[1, 4, 4]]))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_siglip_of_larger_patches_takes_larger_tokens(tmp_path: Path) -> None:
    parts.decoder(tmp_path / "text")
    parts.siglip(tmp_path / "vision", patch_size=16, image_size=64)
    initialise(tmp_path / "text", tmp_path / "vision", out=tmp_path / "keye")
    processor = KeyeProcessor.from_pretrained(tmp_path / "keye")
    model = KeyeForConditionalGeneration.from_pretrained(tmp_path / "keye")
    sample = processor.sample(
        [{"role": "user", "content": [{"type": "video", "video": torch.zeros(2, 3, 64, 96, dtype=torch.uint8)}]}]
    )
    inputs = processor.collate([sample])
    assert inputs["pixel_values_videos"].shape[1:] == (3, 16, 16)
    assert model(**inputs).logits.isfinite().all()


def test_random_weights_are_initialised_like_a_siglip(tmp_path: Path) -> None:
    parts.decoder(tmp_path / "text")
    sizes = {**parts.TOWER, "hidden_size": 96, "intermediate_size": 192}
    initialise(tmp_path / "text", KeyeVisionConfig(**sizes, position_grid=4), out=tmp_path / "keye")
    siglip = parts.siglip(tmp_path / "vision", **sizes).state_dict()
    drawn = {name: stored.read() for name, stored in open_checkpoint(tmp_path / "keye").items()}
    compared = 0
    for name, tensor in siglip.items():
        if not name.startswith("head."):
            mine = drawn["model.visual." + name]
            assert abs(float(mine.mean() - tensor.mean())) < 0.02, name
            assert float(mine.std()) == pytest.approx(float(tensor.std()), rel=0.15, abs=1e-5), name
            compared += 1
    assert compared == 2 + 1 + 2 * 16 + 2
    projector = drawn["model.projector.linear_1.weight"]  # Xavier, uniform
    assert float(projector.abs().max()) == pytest.approx((6 / (384 + 384)) ** 0.5, rel=0.01)
    assert float(projector.std()) == pytest.approx((2 / (384 + 384)) ** 0.5, rel=0.05)
    assert torch.equal(drawn["model.projector.pre_norm.weight"], torch.ones(384))


def test_made_of_a_gguf_file_it_generates_what_transformers_generates(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    decoder = parts.decoder(tmp_path / "text", "llama", tie_word_embeddings=True)
    parts.gguf_of(decoder, tmp_path / "text" / "tiny.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "text", gguf_file="tiny.gguf").eval()
    parts.plain_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tower, out = KeyeVisionConfig(**parts.TOWER), tmp_path / "keye"
    initialise(tmp_path / "text", tower, out=out, gguf_file="tiny.gguf", tokenizer=tmp_path / "tokenizer")
    ours = KeyeForConditionalGeneration.from_pretrained(out).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, logits = theirs(input_ids=ids).logits, ours(input_ids=ids).logits
    known = len(parts.plain_tokenizer())
    torch.testing.assert_close(logits[..., :known], expected[..., :known], rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # the file holds the decoder's own weights
        torch.testing.assert_close(expected, decoder(ids).logits, rtol=1e-4, atol=1e-4)


def test_parts_that_do_not_fit_are_named_and_leave_nothing(tmp_path: Path) -> None:
    parts.decoder(tmp_path / "text")
    parts.siglip(tmp_path / "vision", hidden_act="gelu")
    out = tmp_path / "keye"
    with pytest.raises(CheckpointError, match="gelu_pytorch_tanh"):
        initialise(tmp_path / "text", tmp_path / "vision", out=out)
    with pytest.raises(CheckpointError, match="not a SigLIP"):
        initialise(tmp_path / "text", tmp_path / "text", out=out)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        initialise(tmp_path / "vision", out=out)
    parts.plain_tokenizer(420).save_pretrained(tmp_path / "tokenizer")
    parts.decoder(tmp_path / "small", vocab_size=310)
    with pytest.raises(CheckpointError, match="the decoder.s tokenizer"):
        initialise(tmp_path / "small", KeyeVisionConfig(**parts.TOWER), out=out, tokenizer=tmp_path / "tokenizer")
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        initialise(tmp_path / "text", KeyeVisionConfig(**parts.TOWER), out=out)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    released(tmp_path / "theirs")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_released(tmp_path / "theirs", tmp_path / "ours", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_recipe_starts_from_such_a_directory(tmp_path: Path) -> None:
    from stages import recipe as recipes
    from stages.run import load_model, make_processor, prepare_tokenizer

    parts.decoder(tmp_path / "text", "llama", dtype=torch.bfloat16)
    parts.siglip(tmp_path / "vision")
    initialise(tmp_path / "text", tmp_path / "vision", out=tmp_path / "keye")
    recipe = recipes.load(Path(recipes.__file__).parent / "recipes" / "tiny.toml", [f"model.path={tmp_path / 'keye'}"])
    (tmp_path / "run").mkdir()
    prepare_tokenizer(recipe, tmp_path / "run")
    name = recipe.stages[0]
    processor = make_processor(recipe, getattr(recipe, name), tmp_path / "run")
    model = load_model(name, recipe, tmp_path / "run")
    assert model.dtype == torch.float32 and model.config.text_config.model_type == "llama"
    assert len(processor.tokenizer) <= model.config.text_config.vocab_size
    assert processor.token_id("<|video_pad|>") == model.config.video_token_id
    stored = open_checkpoint(tmp_path / "vision")["embeddings.patch_embedding.weight"].read()
    assert torch.equal(model.visual.embeddings.patch_embedding.weight, stored.to(torch.bfloat16).float())
