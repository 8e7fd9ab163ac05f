"""A small processor: frames of 4 to 16 tokens, a byte-level tokenizer of 400 entries."""

import pytest

from keye import KeyeProcessor
from keye.processor.tokenizer import train_tokenizer

TINY = {"min_tokens_per_frame": 4, "max_tokens_per_frame": 16, "max_tokens": 512}


@pytest.fixture(scope="session")
def processor() -> KeyeProcessor:
    tokenizer = train_tokenizer(["user assistant Which colour? red or blue 0.5"] * 3, 400)
    return KeyeProcessor(tokenizer, encoder=TINY, image={"min_tokens": 4, "max_tokens": 16})
