"""Balance: what a sample costs before anything is computed, and packs dealt to ranks so that none waits for another."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from keye.model import flops
from stages.distributed.parallel import Piece


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of training on a sample, from its lengths alone (report §pre-training: load balance).

    All packs of a stage are about equally full, so what the decoder does per token weighs the same in each. What makes
    one pack dearer than another is the *excess*: the tower, the logits, and what grows with the square of a length.

    Args:
        config: the model's KeyeConfig. tower_trains, decoder_trains: see `flops.training_step`.
    """

    config: Any
    tower_trains: bool = True
    decoder_trains: bool = True

    @cached_property
    def per_token(self) -> int:
        """What the decoder's layers do for a token, whatever its sample."""
        one = flops.decoder(self.config.text_config, [1]).linear
        return one * (flops.TRAINING if self.decoder_trains else 2)

    def excess(self, tokens: int, labels: int, frames: Iterable[tuple[int, int]]) -> int:
        """Operations besides `tokens · per_token`; frames: (height, width) in patches of each still and frame."""
        whole = flops.training_step(self.config, frames, [tokens], labels, self.tower_trains, self.decoder_trains)
        return whole - tokens * self.per_token


@dataclass(frozen=True)
class TowerCost:
    """The same where the tower trains without a decoder (stage 0): all is excess. vision: the KeyeVisionConfig."""

    vision: Any
    per_token = 0

    def excess(self, tokens: int, labels: int, frames: Iterable[tuple[int, int]]) -> int:
        """Operations of the tower."""
        return flops.TRAINING * flops.tower(self.vision, frames).total


def rank_operations(
    config: Any,
    share: Iterable[Piece],
    frames: Sequence[tuple[int, int]],
    lengths: Iterable[int],
    labels: int,
    ranks: int,
    tower_trains: bool = True,
    decoder_trains: bool = True,
) -> float:
    """Operations of one rank of a sequence group in a training step on a pack; over all ranks, `flops.training_step`.

    Args:
        share: what the rank encodes of `frames`, sides in patches of all stills, then all frames.
        lengths: tokens of the pack's documents, whose decoder the `ranks` share evenly.
        labels: labelled positions among the rank's own tokens.
    """
    vision, text = config.vision_config, config.text_config
    tower, patches = 0.0, 0
    for piece in share:
        height, width = frames[piece.frame]
        tower += flops.tower(vision, [(height, width)]).total * 4 * piece.tokens / (height * width)
        patches += 4 * piece.tokens
    merged = flops.projector(vision.hidden_size, text.hidden_size, patches).total
    words, head = flops.decoder(text, lengths), flops.head(text, labels)
    return (
        tower * (flops.TRAINING if tower_trains else 1)
        + merged * (flops.TRAINING if tower_trains else 2)
        + (words.linear / ranks + head.linear) * (flops.TRAINING if decoder_trains else 2)
        + words.quadratic / ranks * flops.TRAINING
    )


def deal_rounds(costs: list[int], ranks: int) -> list[list[list[int]]]:
    """Packs dealt to ranks in rounds of one pack a rank; rank → round → its pack.

    The ranks meet after each round, so packs that cost about the same make a round together; inside a round the
    cheaper ones go to the ranks that have had more.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for first in range(0, len(order), ranks):
        lightest = sorted(range(ranks), key=lambda rank: (loads[rank], rank))
        for rank, pack in zip(lightest, order[first : first + ranks], strict=True):
            shares[rank].append(pack)
            loads[rank] += costs[pack]
    return [[[pack] for pack in share] for share in shares]


def deal_sums(costs: list[int], groups: int) -> list[list[int]]:
    """As many samples to each group, with sums as equal as most-expensive-first gets them; group → samples."""
    shares: list[list[int]] = [[] for _ in range(groups)]
    each = len(costs) // groups
    loads = [(0, group) for group in range(groups)]  # of the groups that are not full, a heap
    for sample in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, group = heapq.heappop(loads)
        shares[group].append(sample)
        if len(shares[group]) < each:
            heapq.heappush(loads, (load + costs[sample], group))
    return shares


def deal_parts(costs: list[int], ranks: int, parts: int = 1) -> list[list[list[int]]]:
    """As many samples to each of `parts` rounds of each rank, with sums as equal; rank → round → its samples."""
    groups = deal_sums(costs, ranks * parts)
    dealt = deal_rounds([sum(costs[sample] for sample in group) for group in groups], ranks)
    return [[groups[group] for (group,) in rounds] for rounds in dealt]
