"""A small model directory like the release's, and comparisons of directories."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from keye import KeyeConfig
from keye.checkpoint import released_layout as names
from keye.checkpoint.initialise import expected_shapes
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
