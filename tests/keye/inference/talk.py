"""A tiny model directory for chats: random weights, a trained tokenizer, an encoder of few tokens."""

from pathlib import Path

import torch

from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor
from keye.processor.tokenizer import train_tokenizer

WORDS = ["user assistant system Which colour comes first? red or blue? How many? <think> </think> 0123456789."] * 3
ENCODER = {"max_tokens": 256, "min_tokens_per_frame": 1, "max_tokens_per_frame": 16, "fps": 2.0}


def tiny_directory(path: Path, **text: object) -> Path:
    """Write it; `text` changes the decoder's config."""
    processor = KeyeProcessor(train_tokenizer(WORDS, 400), encoder=ENCODER, image={"min_tokens": 1, "max_tokens": 16})
    torch.manual_seed(0)
    # Random weights give the same answer to every question unless they are large.
    config = processor.configure(KeyeConfig.preset("tiny", vocab_size=len(processor.tokenizer), **text))
    model = KeyeForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.language_model.layers.parameters():
            if parameter.ndim == 2:
                parameter *= 3
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path
