"""Balance: the cost of a sample before anything is computed, and packs assigned to ranks so that no rank waits."""

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

    All packs of a stage are about equally full, so the decoder's work per token is the same in each. Packs differ in
    the *excess*: the tower, the logits, and everything that grows with the square of a length.

    Args:
        config: the model's KeyeConfig.
        tower_trains, decoder_trains: see `flops.training_step`.
    """

    config: Any
    tower_trains: bool = True
    decoder_trains: bool = True

    @cached_property
    def per_token(self) -> int:
        """Operations of the decoder's layers for a token of any sample."""
        one = flops.decoder(self.config.text_config, [1]).linear
        return one * (flops.TRAINING if self.decoder_trains else 2)

    def excess(self, tokens: int, labels: int, frames: Iterable[tuple[int, int]]) -> int:
        """Operations beyond `tokens · per_token`; frames: (height, width) in patches of each still and frame."""
        total = flops.training_step(self.config, frames, [tokens], labels, self.tower_trains, self.decoder_trains)
        return total - tokens * self.per_token


@dataclass(frozen=True)
class TowerCost:
    """The cost if the tower trains without a decoder (stage 0): all of it is excess. vision: the KeyeVisionConfig."""

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
        share: the pieces of `frames` that the rank encodes.
        frames: sides in patches of all stills, then of all frames.
        lengths: tokens of the pack's documents; the `ranks` share their decoder evenly.
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


def assign_rounds(costs: list[int], ranks: int) -> list[list[list[int]]]:
    """Assign packs to ranks in rounds of one pack per rank; rank → round → its pack.

    The ranks wait for each other after each round, so packs of similar cost share a round. Within a round the cheaper
    packs go to the ranks with the higher cost so far.
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


def assign_sums(costs: list[int], groups: int) -> list[list[int]]:
    """Assign equally many samples to each group, most expensive first to the lowest sum; group → samples."""
    shares: list[list[int]] = [[] for _ in range(groups)]
    each = len(costs) // groups
    loads = [(0, group) for group in range(groups)]  # a heap of the groups that are not full
    for sample in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, group = heapq.heappop(loads)
        shares[group].append(sample)
        if len(shares[group]) < each:
            heapq.heappush(loads, (load + costs[sample], group))
    return shares


def assign_parts(costs: list[int], ranks: int, parts: int = 1) -> list[list[list[int]]]:
    """Assign equally many samples of similar sums to each of `parts` rounds of each rank; rank → round → samples."""
    groups = assign_sums(costs, ranks * parts)
    assigned = assign_rounds([sum(costs[sample] for sample in group) for group in groups], ranks)
    return [[groups[group] for (group,) in rounds] for rounds in assigned]
