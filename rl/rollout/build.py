"""The rollout engine of a recipe."""

from __future__ import annotations

from torch import nn

from keye.errors import RecipeError
from keye.processor.processor import KeyeProcessor
from rl.rollout.config import Rollout
from rl.rollout.engine import RolloutEngine
from rl.rollout.inprocess import InProcessRollout, end_tokens
from rl.rollout.served import ServedRollout


def build_rollout(
    config: Rollout, model: nn.Module, processor: KeyeProcessor, batch: int, rank: int = 0
) -> RolloutEngine:
    """The engine of `[rollout]`.

    Args:
        batch: answers that are decoded together at most. rank: of this process.

    Raises:
        RecipeError: a stop token that the tokenizer does not have, or no server.
        KeyeError: a served engine without the package openai.
    """
    stop = token_ids(config.stop_tokens, processor)
    if config.engine == "served":
        return ServedRollout(config.servers(), processor, None, end_tokens(model, processor).union(stop), rank)
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
