"""The released Keye-VL-1.5-8B layout: names of parameters, fields of config.json, files that serving engines read.

Sources: vLLM's `keye.py` and `keye_vl1_5.py` (modules, weight loading, the config fields they touch), keye-vl-utils
1.5.2 (pixels), the release's processor as proposed to transformers. The released tower is SigLIP's below
`visual.vision_model`, the projector is `mlp_AR`, and the decoder is Qwen3 with its own names; its config fields are at
the top level of config.json.
"""

import re
from collections.abc import Mapping
from typing import Any

from keye.errors import CheckpointError

MODEL_TYPE, ARCHITECTURE = "KeyeVL1_5", "KeyeVL1_5ForConditionalGeneration"

# Ours → released. Every parameter of the model starts with one of the four.
PREFIXES = {
    "model.visual.": "visual.vision_model.",
    "model.projector.": "mlp_AR.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
# The same for transformers' `key_mapping` (patterns → replacements); no pattern matches our own names.
KEY_MAPPING = {
    r"^visual\.vision_model\.": "model.visual.",
    r"^mlp_AR\.": "model.projector.",
    r"^model\.(?!visual\.|projector\.|language_model\.)": "model.language_model.",
}

PACKING = "visual.vision_model.embeddings.packing_position_embedding.weight"
PACKING_ROWS = 32_768
# Parameters of the release that its forward pass never reads. vLLM skips the head, but has a packing table and loads it
# from the files; an export therefore always has one.
UNUSED = {
    "visual.vision_model.head.": "SigLIP's pooling head",
    PACKING: "positions of packed rows, which interpolation replaces",
}
UNUSED_PATTERNS = [
    r"^(model\.)?visual\.(vision_model\.)?head\.",
    r"packing_position_embedding",
    r"rotary_emb\.inv_freq$",
]

VISION_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "layer_norm_eps",
)  # fmt: skip
# Fields that engines read, with the same values in every Keye-VL-1.5.
VISION_CONSTANTS = {
    "model_type": MODEL_TYPE,
    "num_channels": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "attention_dropout": 0.0,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "tokens_per_second": 2,
}
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "attention_bias", "attention_dropout", "use_sliding_window", "sliding_window", "max_window_layers",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# SigLIP's parameters below `vision_model.` that the tower has; the others are its pooling head and its text tower,
# which only stage 0 uses (`stages.contrastive`).
TOWER = re.compile(r"(embeddings\.(patch|position)_embedding|encoder\.layers\.\d+|post_layernorm)\.")
ID_FIELDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")

PROCESSOR_CLASS, IMAGE_PROCESSOR = "KeyeVL1_5Processor", "KeyeVL1_5ImageProcessor"
TOKEN_SIDE = 28  # pixels along a token: two patches of 14
IMAGE_TOKENS = (4, 20_480)  # keye-vl-utils 1.5.2
# preprocessor_config.json, without `min_pixels` and `max_pixels`.
PREPROCESSOR = {
    "processor_class": PROCESSOR_CLASS,
    "image_processor_type": IMAGE_PROCESSOR,
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,  # bicubic
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 1,
}


def to_released(name: str) -> str:
    """The released name of one of our parameters; KeyError for another name."""
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


def from_released(name: str) -> str | None:
    """Our name of a released parameter, None if the model does not need it (`UNUSED`); an unknown name is returned."""
    if unused(name) is not None:
        return None
    for ours, theirs in PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def unused(name: str) -> str | None:
    """Why a released parameter is not needed, None if it is needed."""
    if name.endswith("rotary_emb.inv_freq"):
        return "computed tables"
    return next((why for prefix, why in UNUSED.items() if name.startswith(prefix)), None)


def mrope_section(head_dim: int) -> list[int]:
    """How many frequencies rotate with time, height and width: 16/24/24 of 64, scaled to the head."""
    half = head_dim // 2
    time, height = round(half * 16 / 64), round(half * 24 / 64)
    return [time, height, half - time - height]


def is_released(config: Mapping[str, Any]) -> bool:
    """Whether config.json has the released layout: decoder fields at the top level, released names in the weights."""
    return "text_config" not in config and "hidden_size" in config


def config_from_released(config: Mapping[str, Any]) -> dict[str, Any]:
    """The released config.json → the fields of `KeyeConfig`.

    Raises:
        CheckpointError: a tower with another activation than this model's.
    """
    vision = config.get("vision_config") or {}
    patch = vision.get("patch_size", 14)
    if vision.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise CheckpointError(
            f"vision_config.hidden_act is {vision['hidden_act']!r}, the tower has gelu_pytorch_tanh; name the "
            "directory of a Keye-VL-1.5"
        )
    text = {name: config[name] for name in TEXT_FIELDS if config.get(name) is not None}
    text["model_type"] = "qwen3"
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    # transformers 5 writes rope_parameters, earlier ones rope_scaling and rope_theta.
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    section = list(rope.pop("mrope_section", None) or mrope_section(head))
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta = rope.pop("rope_theta", None) or config.get("rope_theta", 1_000_000.0)
    text["rope_parameters"] = {**rope, "rope_type": "default" if kind == "mrope" else kind, "rope_theta": float(theta)}
    if section != mrope_section(head):
        text["rope_parameters"]["mrope_section"] = section
    text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", False))
    ours = {
        "model_type": MODEL_TYPE,
        "vision_config": {name: vision[name] for name in VISION_FIELDS if name in vision}
        | {"position_grid": vision.get("image_size", 384) // patch},
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    dtype = config.get("dtype") or config.get("torch_dtype")
    return ours | {name: config[name] for name in ID_FIELDS if name in config} | ({"dtype": dtype} if dtype else {})


def config_to_released(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our config.json (`KeyeConfig.to_dict()`) → the release's, as vLLM and the release's own code read it.

    Raises:
        CheckpointError: a model that the release's code cannot run: another decoder than Qwen3, no rotary in the tower.
    """
    vision, text = config["vision_config"], config["text_config"]
    if text["model_type"] != "qwen3":
        raise CheckpointError(
            f"text_config.model_type is {text['model_type']}: serving engines build Keye-VL-1.5 with Qwen3 only; "
            "keep this model in its own layout"
        )
    if vision.get("mixer", "attention") != "attention":
        raise CheckpointError(
            f"vision_config.mixer is {vision['mixer']}: the released tower has attention; keep this model in its own "
            "layout"
        )
    if vision.get("motion") is not None:
        raise CheckpointError(
            "vision_config.motion: the released tower has no motion pathway; keep this model in its own layout"
        )
    if not vision.get("rotary", True) or vision.get("rope_theta", 10_000.0) != 10_000.0:
        raise CheckpointError(
            "vision_config: the released tower always has 2-D RoPE of base 10000; set rotary and rope_theta so"
        )
    rope = dict(text.get("rope_parameters") or {})
    theta, kind = rope.pop("rope_theta", 1_000_000.0), rope.pop("rope_type", "default")
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    scaling = {"mrope_section": mrope_section(head), **rope, "rope_type": kind}
    if kind == "default":
        scaling["type"] = "mrope"
    theirs = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{name: text[name] for name in TEXT_FIELDS if name in text},
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        **{name: config[name] for name in ID_FIELDS},
        "vision_config": VISION_CONSTANTS
        | {name: vision[name] for name in VISION_FIELDS}
        | {"image_size": vision["position_grid"] * vision["patch_size"]},
    }
    dtype = config.get("dtype") or config.get("torch_dtype")
    return theirs | ({"torch_dtype": str(dtype).removeprefix("torch.")} if dtype else {})


def preprocessor(image: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """preprocessor_config.json for serving; image: `min_tokens` and `max_tokens` of an image."""
    image = image or {}
    low, high = image.get("min_tokens") or IMAGE_TOKENS[0], image.get("max_tokens") or IMAGE_TOKENS[1]
    pixels = {"min_pixels": low * TOKEN_SIDE**2, "max_pixels": high * TOKEN_SIDE**2}
    return PREPROCESSOR | pixels | {"size": dict(pixels)}


def decoder_name(name: str) -> str | None:
    """Our name of a parameter of a transformers decoder (`ForCausalLM` or bare); None for computed tables."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    if name.startswith("lm_head."):
        return name
    return "model.language_model." + name.removeprefix("model.")


def tower_name(name: str) -> str | None:
    """Our name of a parameter of a SigLIP (`SiglipModel`, `SiglipVisionModel`, old or new names); None: not needed."""
    bare = re.sub(r"^(visual\.)?(vision_model\.)?", "", name)
    return "model.visual." + bare if TOWER.match(bare) else None
