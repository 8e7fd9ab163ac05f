"""A tiny Keye model with a drawn clip, and tiny causal LMs of four families, all with random weights."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config

from keye.evaluation.trace import Prompt, Tracer
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor
from keye.processor.tokenizer import train_tokenizer
from keye.world import texts
from keye.world.render import write_mp4

SIZES = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}  # fmt: skip
GPT2 = {"vocab_size": 120, "n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.3}
FAMILIES = {
    "qwen3": lambda: Qwen3Config(**SIZES),
    "llama": lambda: LlamaConfig(**SIZES),
    "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=64, query_pre_attn_scalar=8),
    "gpt2": lambda: GPT2Config(**GPT2),
}


def text_model(family: str):
    """A causal LM with large random weights, so that every token matters."""
    torch.manual_seed(3)
    attention = "eager" if family == "gemma2" else "sdpa"
    return AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=attention).eval()


def text_prompt(length: int = 12, seed: int = 0) -> Prompt:
    """Random ids without groups."""
    ids = torch.randint(1, 119, (length,), generator=torch.Generator().manual_seed(seed))
    return Prompt(ids, torch.arange(length)[None])


def keye_parts(motion=None, **encoder):
    """(model, processor) with three blocks and large random weights; motion pathway and settings of the encoder."""
    torch.manual_seed(4)
    tokenizer = train_tokenizer(texts(samples=5), 600)
    settings = {"max_tokens": 256, "min_tokens_per_frame": 1, "max_tokens_per_frame": 4, "fast_ratio": 0.3,
                "threshold": 0.97, **encoder}  # fmt: skip
    processor = KeyeProcessor(tokenizer, settings, image={"min_tokens": 1, "max_tokens": 4})
    config = processor.configure(KeyeConfig.preset("tiny", {"motion": motion}, vocab_size=len(tokenizer)))
    model = KeyeForConditionalGeneration(config).eval()
    for name, value in model.model.language_model.named_parameters():
        if value.ndim == 2 and "embed" not in name:
            torch.nn.init.normal_(value, std=0.3)
    return model, processor


def write_clip(path, levels=(30, 30, 200, 200, 90, 90), seed: int = 0) -> None:
    """A clip at two frames a second; the picture changes with the grey level."""
    noise = np.random.default_rng(seed).integers(0, 40, (56, 56, 3))
    write_mp4(path, [np.clip(noise + level, 0, 255).astype(np.uint8) for level in levels], 2)


def question(*files: str, text: str = "What does the card say?"):
    """A chat with these clips and images, and the text between and after them."""
    kinds = [{"type": "image" if file.endswith("png") else "video"} for file in files]
    content = [kind | {kind["type"]: file} for kind, file in zip(kinds, files, strict=True)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def keye_prompt(model, processor, folder, *files, **more):
    """(sample, prompt) of a question about clips and images in a folder."""
    sample = processor.sample(question(*files, **more), base_dir=folder, add_generation_prompt=True)
    return sample, Prompt.of_sample(model, processor, sample)


__all__ = ["FAMILIES", "Tracer", "keye_parts", "keye_prompt", "question", "text_model", "text_prompt", "write_clip"]
