"""The content of one optimizer step: samples of each kind as the recipe's budgets allow them, and their sums.

Nobody has looked at the data: what the recipe does not say is assumed here.
"""

import math
from dataclasses import dataclass
from typing import Any

from keye.aggregation.settings import FeatureAggregation
from stages.recipe import Recipe, StageRecipe
from stages.recipe_checks import KINDS
from stages.stage import choose_sources


@dataclass(frozen=True)
class Kind:
    """An average sample of one kind.

    tokens: of a document, visual ones included. visual: share of visual tokens. patches: four for each visual token of
    a frame or still. labels: share of tokens with a label. encoded: the frame's own patches over `patches`, above 1
    where an encoder's aggregation pools tokens.
    """

    tokens: float
    visual: float
    patches: float
    labels: float
    encoded: float = 1.0


@dataclass(frozen=True)
class Work:
    """One optimizer step over all ranks: tokens of each document, (height, width) in patches of each frame, labels."""

    documents: list[int]
    frames: list[tuple[int, int]]
    labels: int

    @property
    def patches(self) -> int:
        return sum(height * width for height, width in self.frames)


def kinds_of(recipe: Recipe, stage: StageRecipe) -> dict[str, Kind]:
    """Average samples of each kind according to the recipe's budgets.

    A clip takes half of the encoder's budget or of the context, whichever is smaller; its frames have the geometric
    mean of the smallest and largest size; with an aggregation all are encoded at the largest. A still has 500 tokens
    within its limits, a photograph of 600 × 650 pixels, and 200 tokens of text. A text takes a quarter of the context.
    """
    encoder = {**recipe.processor.encoder, **stage.encoder}
    low, high = encoder.get("min_tokens_per_frame", 48), encoder.get("max_tokens_per_frame", 768)
    frame = (low * high) ** 0.5
    context = stage.context if stage.limit is not None else math.inf  # stage 0 has none
    clip = min(encoder.get("max_tokens", 75_000), context) / 2
    stills = recipe.processor.image
    still = min(max(500.0, stills.get("min_tokens", 4)), stills.get("max_tokens", 20_480), context / 2)
    words = min(200.0, context / 4)
    mark = 8.0  # tokens of a frame's timestamp
    clip_tokens = clip * (1 + mark / frame) + words
    encoded = _encoded_tokens(encoder, high) / frame if encoder.get("aggregation") else 1.0
    return {
        "video": Kind(clip_tokens, clip / clip_tokens, 4 * frame, 0.1, encoded),
        "image": Kind(still + words, still / (still + words), 4 * still, 0.25),
        "text": Kind(stage.context / 4, 0.0, 4.0, 0.9),
    }


def _encoded_tokens(encoder: dict[str, Any], largest: float) -> float:
    """Tokens of a frame before it is pooled, of an encoder whose largest frames have `largest` tokens."""
    spec = encoder.get("aggregation")
    return largest * (1 if spec is None else FeatureAggregation.of(spec).oversample ** 2)


def largest_frame(recipe: Recipe, stage: StageRecipe, frames: bool = True) -> int:
    """Patches of the largest still or frame that the recipe's limits allow in a stage; any rank may get it in any step.

    frames: whether the stage has clips.
    """
    still = recipe.processor.image.get("max_tokens", 20_480)
    encoder = {**recipe.processor.encoder, **stage.encoder}
    context = stage.context if stage.limit is not None else math.inf
    frame = _encoded_tokens(encoder, min(encoder.get("max_tokens_per_frame", 768), context)) if frames else 0
    # A sequence group cuts frames larger than a chunk among its ranks.
    return round(4 * max(min(still, context), frame) / stage.sequence_parallel)


def mixture_read(name: str, recipe: Recipe, tokens: float) -> dict[str, float]:
    """Kind → share of the `tokens` that a stage, or a phase of it, reads, first lessons included.

    A source with `first_tokens` is read until it has given them; the stage's mixture divides the tokens that are left.
    """
    chosen = choose_sources(name, recipe) if any(source.first_tokens for source in recipe.data.sources) else []
    if not any(source.first_tokens for source, _ in chosen):
        return recipe.chain[name].mixture
    # A source has given first_tokens + share × level tokens once the others are that far. If the lessons alone exceed
    # the stage's tokens, the level is negative, and sources without a lesson have given nothing.
    level, left = 0.0, list(chosen)
    while left:
        level = (tokens - sum(source.first_tokens for source, _ in left)) / sum(share for _, share in left)
        given = [(source, share) for source, share in left if source.first_tokens + share * level > 0]
        if len(given) == len(left):
            break
        left = given
    read = dict.fromkeys((source.kind for source, _ in chosen), 0.0)
    for source, share in chosen:
        read[source.kind] += max(0.0, source.first_tokens + share * level) / tokens
    return read


def work_of(stage: StageRecipe, kinds: dict[str, Kind]) -> Work:
    """An average step of a language stage: its tokens divided by the mixture into complete documents and frames."""
    tokens = stage.global_batch_size * stage.context
    mixture = stage.mixture or dict.fromkeys(KINDS, 1 / len(KINDS))
    documents: list[int] = []
    frames: list[tuple[int, int]] = []
    labels = 0.0
    for name, share in mixture.items():
        kind = kinds[name]
        count = max(1, round(share * tokens / kind.tokens)) if share else 0
        documents += [round(share * tokens / count)] * count if count else []
        patches = 4 * share * tokens * kind.visual
        frames += [square(kind.patches * kind.encoded)] * round(patches / kind.patches)
        labels += share * tokens * kind.labels
    return Work(documents, frames, round(labels))


def square(patches: float) -> tuple[int, int]:
    """Even (height, width) of a square frame of about so many patches."""
    side = max(2, 2 * round(patches**0.5 / 2))
    return side, side
