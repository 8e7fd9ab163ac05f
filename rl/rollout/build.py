"""The rollout engine of a recipe."""

from __future__ import annotations

from torch import nn

from keye.errors import RecipeError
from keye.processor.processor import KeyeProcessor
from rl.rollout.config import Rollout
from rl.rollout.engine import RolloutEngine
from rl.rollout.inprocess import InProcessRollout


def build_rollout(config: Rollout, model: nn.Module, processor: KeyeProcessor, batch: int) -> RolloutEngine:
    """The engine of `[rollout]`; batch: answers that are decoded together at most.

    Raises:
        RecipeError: a stop token that the tokenizer does not have.
    """
    stop = token_ids(config.stop_tokens, processor)
    return InProcessRollout(
        model, processor, None, batch, config.cache_mb << 20, config.top_p, config.top_k, stop_tokens=stop
    )


def token_ids(tokens: tuple[str, ...], processor: KeyeProcessor) -> list[int]:
    """Ids of tokens, by their spelling in the vocabulary.

    Raises:
        RecipeError: a token that the tokenizer does not have.
    """
    vocabulary = processor.tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise RecipeError(f"rollout.stop_tokens: the model's tokenizer has no token {token!r}; remove it")
    return [vocabulary[token] for token in tokens]
