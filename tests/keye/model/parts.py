"""Tiny pretrained parts in the format of the real ones: decoder and SigLIP directories with random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from keye.processor.tokenizer import train_tokenizer

DECODERS = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}
SIZES = {
    "vocab_size": 448,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
WORDS = ["the quick brown fox jumps over the lazy dog assistant user 0123456789\n"] * 4


def plain_tokenizer(tokens: int = 300):
    """A tokenizer without the stream's special tokens except the three of ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def decoder(
    folder: Path, family: str = "qwen3", dtype: torch.dtype = torch.float32, shard: str = "50KB", **more: Any
) -> PreTrainedModel:
    """Write a decoder with its tokenizer, sharded; returns the model."""
    torch.manual_seed(1)
    config = DECODERS[family](**{**SIZES, "initializer_range": 0.3, **more})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    plain_tokenizer().save_pretrained(folder)
    return model


def siglip(folder: Path, complete: bool = False, **more: Any) -> PreTrainedModel:
    """Write a SigLIP's vision model, or the `complete` SigLIP; returns it."""
    torch.manual_seed(2)
    config = SiglipVisionConfig(**{**TOWER, "image_size": 56, **more})
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if complete:
        model = SiglipModel(SiglipConfig(vision_config=config.to_dict(), text_config={**text, "vocab_size": 64}))
    else:
        model = SiglipVisionModel(config)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model.eval()


def gguf_of(model: PreTrainedModel, path: Path) -> None:
    """A Llama with a tied head as a GGUF file in float32; queries and keys are stored in pairs, not half-split."""
    import gguf

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {"token_embd": state["model.embed_tokens.weight"], "output_norm": state["model.norm.weight"]}
    blocks = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    for i in range(config.num_hidden_layers):
        for theirs, ours in blocks.items():
            tensor = state[f"model.layers.{i}.{ours}.weight"]
            if theirs in heads:
                tensor = tensor.unflatten(0, (heads[theirs], 2, -1)).transpose(1, 2).flatten(0, 2)
            tensors[f"blk.{i}.{theirs}"] = tensor
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.detach().numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def released_names(tower_layers: int, decoder_layers: int) -> set[str]:
    """Every name of a released checkpoint, written out from the modules of vLLM's keye.py and of its Qwen3."""
    found = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for i in range(decoder_layers):
        layer = f"model.layers.{i}"
        found |= {f"{layer}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{layer}.self_attn.{part}_proj.weight" for part in "qkvo"}
        found |= {f"{layer}.self_attn.{part}_norm.weight" for part in "qk"}
        found |= {f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    tower = "visual.vision_model"
    modules = [f"{tower}.embeddings.patch_embedding", f"{tower}.post_layernorm"]
    for i in range(tower_layers):
        layer = f"{tower}.encoder.layers.{i}"
        modules += [f"{layer}.layer_norm1", f"{layer}.layer_norm2", f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"]
        modules += [f"{layer}.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")]
    modules += ["mlp_AR.pre_norm", "mlp_AR.linear_1", "mlp_AR.linear_2"]
    found |= {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    return found | {f"{tower}.embeddings.position_embedding.weight"}


def released_tokenizer():
    """Every special token of the stream is known, in the order of `SPECIAL_TOKENS`."""
    return train_tokenizer(WORDS, 400)
