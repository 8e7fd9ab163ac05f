"""The released layout: names of parameters one by one, shapes, and fields of config.json."""

import re

import pytest
import torch

from keye import KeyeConfig
from keye.checkpoint import released_layout as names
from keye.checkpoint.initialise import expected_shapes
from keye.errors import CheckpointError
from tests.keye.checkpoint.directories import RELEASED
from tests.keye.model import parts


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
