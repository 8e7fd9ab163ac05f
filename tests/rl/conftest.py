"""A model of a few thousand weights with its processor, and prompts with different clips."""

import pytest
import torch

from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.tokenizer import train_tokenizer

QUESTIONS = ("how many flashes?", "which colour came first, red or green?", "is it day or night?")


@pytest.fixture(scope="session")
def processor() -> KeyeProcessor:
    tokenizer = train_tokenizer([*QUESTIONS, "user assistant 0123456789 red green"] * 4, 400)
    encoder = {"min_tokens_per_frame": 1, "max_tokens_per_frame": 4, "max_tokens": 64}
    return KeyeProcessor(tokenizer, encoder=encoder)


@pytest.fixture
def model(processor: KeyeProcessor) -> KeyeForConditionalGeneration:
    torch.manual_seed(0)
    config = KeyeConfig.preset("tiny", vocab_size=len(processor.tokenizer), num_hidden_layers=2)
    config.vision_config.num_hidden_layers = 1
    return KeyeForConditionalGeneration(processor.configure(config))


@pytest.fixture
def prompts(processor: KeyeProcessor) -> list[Sample]:
    """Three prompts of different length: 3 frames, 5 frames, text alone."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for question, frames in zip(QUESTIONS, (3, 5, 0), strict=True):
        content = [{"type": "text", "text": question}]
        if frames:
            clip = torch.randint(0, 255, (frames, 3, 56, 56), dtype=torch.uint8, generator=generator)
            content.insert(0, {"type": "video", "video": clip})
        samples.append(processor.sample([{"role": "user", "content": content}], add_generation_prompt=True))
    return samples
