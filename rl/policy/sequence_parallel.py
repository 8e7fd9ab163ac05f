"""Sequence parallelism in the update: the ranks of a group share their questions and divide every row of tokens.

Each rank answers its own questions. Before the update the ranks of a group exchange questions and answers, without
pixels, and all of them form the same micro-batches of the group's questions. A row is divided into equal parts of
consecutive tokens. In attention a rank has a share of the heads and all tokens (`stages.distributed.parallel.ulysses`),
so the shared attention of `rl.policy.prefix` is computed as on one rank. Frames are divided among the ranks; for each
pass their pixels go from the rank that asked the question to the ranks that encode them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from keye.errors import RecipeError
from keye.slowfast.pixels import normalised
from rl.policy.prefix import PrefixTree
from rl.policy.scoring import Group, Score, packed, row_scores
from stages.distributed.collectives import exchange_rows
from stages.distributed.parallel import (
    ParallelDims,
    Piece,
    build_parallel_dims,
    piece_pixels,
    shard_vision,
    ulysses,
    vision_shares,
)
from stages.distributed.ranks import PATIENCE, gather

KINDS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))


@dataclass(frozen=True)
class SharedGroup(Group):
    """A group that several ranks train on; only the rank that asked the question has its pixels."""

    source: int = 0
    """The rank in the sequence group that has the pixels."""

    uint8: bool = False
    """Whether all its pixels are uint8."""


@dataclass(frozen=True)
class Frames:
    """The stills, then the frames, of a row: grids int64 [F, 3], and for each the source and the pixels, if here."""

    grids: Tensor
    sources: list[int]
    pixels: list[Tensor | None] = field(repr=False)


class SequenceParallel:
    """The sequence group of this rank; collective: every rank builds it with the same arguments.

    Args:
        ranks: neighbouring ranks that share a row. config: `KeyeConfig` of the model.

    Raises:
        RecipeError: `ranks` does not divide the processes and the heads.
    """

    def __init__(self, ranks: int, config: Any) -> None:
        heads = config.text_config.num_attention_heads
        if heads % ranks:
            raise RecipeError(
                f"gspo.sequence_parallel = {ranks} does not divide the model's {heads} attention heads; lower it"
            )
        self.grid = build_parallel_dims(ranks)
        self.waiting = _waiting_group(self.grid)

    @property
    def first(self) -> bool:
        """Whether this rank measures what all ranks of its group compute."""
        return self.grid.sequence_rank == 0

    def shared(
        self, groups: list[Group], advantages: Tensor, parts: list[slice]
    ) -> tuple[list[SharedGroup], Tensor, list[slice]]:
        """The groups of all ranks of the sequence group instead of this rank's, the same on each; collective.

        Args, Returns:
            groups: P groups. advantages: float32 [P, G]. parts: the groups of each mini-batch.
        """
        rank = self.grid.sequence_rank
        mine = [[(_shared(groups[i], rank), advantages[i].clone()) for i in range(len(groups))[part]] for part in parts]
        bare = [[(_without_pixels(group), row) for group, row in part] for part in mine]
        ranks = gather(bare, self.waiting)
        ranks[rank] = mine
        batches = [[pair for part in ranks for pair in part[place]] for place in range(len(parts))]
        pairs = [pair for batch in batches for pair in batch]
        ends = [0, *accumulate(map(len, batches))]
        rows = torch.stack([row for _, row in pairs])
        return [group for group, _ in pairs], rows, [slice(begin, end) for begin, end in pairwise(ends)]

    def score(self, model: nn.Module, groups: Sequence[SharedGroup], temperature: float = 1.0) -> Score:
        """`rl.policy.scoring.score` of groups of `shared`, of which each rank computes a part; collective in the group.

        All ranks get the results of all T completion tokens. The gradient of a rank is the part of its tokens: the sum
        over the ranks is the gradient of one of their equal losses.
        """
        grid, device = self.grid, next(model.parameters()).device
        row = packed(list(groups))
        tree, length = row.tree, -(-row.tree.length // grid.sequence)
        missing = length * grid.sequence - tree.length
        own = slice(grid.sequence_rank * length, (grid.sequence_rank + 1) * length)
        # The last token belongs to a completion, so that no placeholder is added.
        ids = F.pad(row.input_ids, (0, missing), value=int(row.input_ids[-1]))
        predictors = tree.predictors()
        makers = predictors // length
        mine = makers == grid.sequence_rank
        scores = model(
            input_ids=ids[None, own].to(device),
            position_ids=F.pad(row.position_ids, (0, missing))[:, None, own].to(device),
            cu_seqlens=tree.cu_seqlens().to(device),
            varlen=ulysses(grid.sequence_group, partial(_padded, tree)),
            logits_to_keep=(predictors[mine] - own.start).to(device),
            row_targets=row.targets[mine].to(device),
            row_scores=row_scores(model, temperature),
            **self._vision(getattr(model, "module", model).config, groups, ids, device),
        ).scores
        counts = makers.bincount(minlength=grid.sequence).tolist()
        table = _GatherRows.apply(torch.stack(scores, dim=1), counts, grid.sequence_group)
        table = table[makers.argsort(stable=True).argsort().to(device)]
        return Score(table[:, 0], table[:, 1].detach(), tree.owner().to(device))

    def _vision(
        self, config: Any, groups: Sequence[SharedGroup], ids: Tensor, device: torch.device
    ) -> dict[str, object]:
        """The model's vision arguments on this rank; `ids` [L] of the complete row."""
        kinds = {name: [getattr(group.sample, name) for group in groups] for _, name in KINDS}
        found = {name: [grid for grid in grids if grid is not None] for name, grids in kinds.items()}
        pack = {name: torch.cat(grids).to(device) for name, grids in found.items() if grids}
        if not pack:
            return {}
        pack["input_ids"] = ids[None].to(device)
        pixels = self._exchanged(groups, config.vision_config.patch_size, device)
        if pixels is not None:
            pack["pixel_values_mine"] = pixels
        return shard_vision(pack, self.grid, config.image_token_id, config.video_token_id, config.attention)

    def _exchanged(self, groups: Sequence[SharedGroup], size: int, device: torch.device) -> Tensor | None:
        """The pixels [n, 3, size, size] of this rank's pieces in order, from the ranks with them; None without any."""
        rank, frames = self.grid.sequence_rank, _frames(groups)
        shares = vision_shares(frames.grids, self.grid.sequence)
        as_bytes = all(group.uint8 for group in groups)
        sent = [[piece for piece in share if frames.sources[piece.frame] == rank] for share in shares]
        parts = [_pixels(frames, piece, as_bytes).to(device) for share in sent for piece in share]
        empty = torch.empty(0, 3, size, size, dtype=torch.uint8 if as_bytes else torch.float32, device=device)
        order = sorted(range(len(shares[rank])), key=lambda i: frames.sources[shares[rank][i].frame])  # stable
        got = [0] * self.grid.sequence
        for piece in shares[rank]:
            got[frames.sources[piece.frame]] += 4 * piece.tokens
        counts = [sum(4 * piece.tokens for piece in share) for share in sent]
        rows = exchange_rows(torch.cat([empty, *parts]), counts, got, self.grid.sequence_group)
        received = dict(zip(order, rows.split([4 * shares[rank][i].tokens for i in order]), strict=True))
        return torch.cat([received[i] for i in range(len(order))]) if order else None


class _GatherRows(torch.autograd.Function):
    """Rows [n, …] of this rank → those of all ranks in order of rank, on every rank.

    All ranks compute the same loss of the rows, so the gradient of a rank's rows is its own, without a sum over ranks.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.rank = counts, dist.get_rank(group)
        return exchange_rows(rows.repeat(len(counts), 1), [len(rows)] * len(counts), counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.split(ctx.counts)[ctx.rank], None, None


def _padded(tree: PrefixTree, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    """The attention of a tree, and zeros for the tokens after its end."""
    out = tree.attention(*(x[: tree.length] for x in (q, k, v)), cu_seqlens, causal)
    return F.pad(out, (0, 0, 0, 0, 0, len(q) - tree.length))


def _waiting_group(grid: ParallelDims) -> dist.ProcessGroup:
    """A gloo group of the sequence group without a practical time limit; collective over all ranks."""
    for first in range(0, grid.world, grid.sequence):
        made = dist.new_group(list(range(first, first + grid.sequence)), timeout=PATIENCE, backend="gloo")
        if first <= grid.rank < first + grid.sequence:
            own = made
    return own


def _shared(group: Group, source: int) -> SharedGroup:
    """A group with what the update needs, as tensors of their own in host memory.

    Raises:
        RecipeError: its frames are aggregated, which needs all frames of a video on one rank.
    """
    if group.sample.video_blocks is not None:
        raise RecipeError(
            "aggregation needs all frames of a video on one rank, and gspo.sequence_parallel divides them; "
            "set gspo.sequence_parallel = 1 or use a model whose processor has no aggregation"
        )
    pixels = [value for name, _ in KINDS if (value := getattr(group.sample, name)) is not None]
    return SharedGroup(
        replace(group.sample, labels=group.sample.labels[:0], plans=[]),
        [completion.cpu().clone() for completion in group.completions],
        [row.cpu().clone() for row in group.log_probs],
        group.finished,
        [""] * len(group.completions),
        source=source,
        uint8=all(value.dtype == torch.uint8 for value in pixels),
    )


def _without_pixels(group: SharedGroup) -> SharedGroup:
    return replace(group, sample=replace(group.sample, **{name: None for name, _ in KINDS}))


def _frames(groups: Sequence[SharedGroup]) -> Frames:
    grids, sources, pixels = [], [], []
    for values, sizes in KINDS:
        for group in groups:
            grid, found = getattr(group.sample, sizes), getattr(group.sample, values)
            if grid is None:
                continue
            grids.append(grid)
            sources += [group.source] * len(grid)
            pixels += [None] * len(grid) if found is None else found.split(grid.prod(1).tolist())
    return Frames(torch.cat(grids), sources, pixels)


def _pixels(frames: Frames, piece: Piece, as_bytes: bool) -> Tensor:
    found = piece_pixels(frames.pixels[piece.frame], frames.grids[piece.frame], piece)
    return found if as_bytes else normalised(found).float()
