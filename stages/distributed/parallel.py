"""Parallelism across ranks: the rank grid, Ulysses sequence parallelism, and the division of vision work.

The ranks form a grid: `sequence` neighbours share one pack (a sequence group); different groups have different packs
(data-parallel). DeepSpeed does not know of the grid. Every collective here is differentiable and sums gradients, so the
gradient of the loss is the sum over *all* ranks. DeepSpeed averages over all ranks, and the trainer scales each loss by
their number. ZeRO therefore partitions over all ranks, those of a sequence group included.
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from keye.errors import RecipeError
from keye.model.attention import Varlen, varlen
from keye.model.projector import merge_order
from keye.model.vision import FRAME_PATCHES, FramePart
from stages.distributed.collectives import all_to_all, exchange_rows

UNEVEN = 0.02  # share of the mean by which the most expensive rank of a sequence group may exceed it


@dataclass(frozen=True)
class ParallelDims:
    """This rank's place in the grid. `sequence_group` is None if a pack belongs to a single rank."""

    rank: int
    world: int
    sequence: int
    sequence_group: dist.ProcessGroup | None

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence

    @property
    def data_size(self) -> int:
        return self.world // self.sequence


def build_parallel_dims(sequence: int = 1) -> ParallelDims:
    """The grid of the running processes; collective: every rank calls it with the same `sequence`.

    Raises:
        RecipeError: `sequence` does not divide the number of processes.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    check_sequence("STAGE", sequence, world)
    group = None
    if sequence > 1:
        for first in range(0, world, sequence):
            made = dist.new_group(list(range(first, first + sequence)))
            group = made if first <= rank < first + sequence else group
    return ParallelDims(rank, world, sequence, group)


def check_sequence(stage: str, sequence: int, world: int) -> None:
    """Raise RecipeError if `world` processes cannot be divided into a stage's groups of `sequence`."""
    if world % sequence:
        enough = -(-world // sequence) * sequence
        raise RecipeError(
            f"{stage}.sequence_parallel = {sequence} needs a multiple of {sequence} processes, and {world} "
            f"{'was' if world == 1 else 'were'} started; use torchrun --nproc_per_node {enough}"
            f", or --set {stage}.sequence_parallel={math.gcd(sequence, world)}"
        )


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a detached tensor over all ranks (a copy; the same on every rank)."""
    value = value.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


class _ToHeads(torch.autograd.Function):
    """Queries, keys and values of this rank's tokens → those of its heads for all tokens, in one exchange.

    A rank receives its query heads, then its key heads, then its value heads. The backward pass is explicit, because
    autograd would keep several copies of all three at the time when a layer needs the most memory.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        wanted: list[list[int]],
        lengths: list[int],
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, ...]:
        ctx.wanted, ctx.group, ctx.shapes = wanted, group, (q.shape, k.shape)
        ctx.lengths = lengths
        (length, heads, size), mine = q.shape, wanted[dist.get_rank(group)]
        own = heads // len(wanted)
        widths = [own + 2 * len(kv) for kv in wanted]
        sent = q.new_empty(length * sum(widths), size)
        for taker, (block, kv) in enumerate(zip(_blocks(sent, length, widths), wanted, strict=True)):
            parts = block.split([own, len(kv), len(kv)], dim=1)
            for part, heads_of, first in zip(parts, (q, k, v), (taker * own, kv[0], kv[0]), strict=True):
                part.copy_(heads_of.narrow(1, first, part.shape[1]))
        width = own + 2 * len(mine)
        got = exchange_rows(sent, [length * w for w in widths], [n * width for n in lengths], group)
        return tuple(got.view(-1, width, size).split([own, len(mine), len(mine)], dim=1))

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        (length, heads, size), kv_shape = ctx.shapes
        own = heads // len(ctx.wanted)
        widths = [own + 2 * len(kv) for kv in ctx.wanted]
        sent = torch.cat(grads, dim=1)
        width, sent = sent.shape[1], sent.flatten(0, 1)
        got = exchange_rows(sent, [n * width for n in ctx.lengths], [length * w for w in widths], ctx.group)
        del sent, grads
        grad_q = got.new_empty(length, heads, size)
        # Ranks may share a KV head; its gradients are summed in fp32.
        wide = torch.promote_types(got.dtype, torch.float32)
        grad_k, grad_v = (got.new_zeros(kv_shape, dtype=wide) for _ in range(2))
        for taker, (block, kv) in enumerate(zip(_blocks(got, length, widths), ctx.wanted, strict=True)):
            of_q, of_k, of_v = block.split([own, len(kv), len(kv)], dim=1)
            grad_q[:, taker * own : (taker + 1) * own] = of_q
            grad_k[:, kv[0] : kv[-1] + 1] += of_k
            grad_v[:, kv[0] : kv[-1] + 1] += of_v
        return grad_q, grad_k.to(got.dtype), grad_v.to(got.dtype), None, None, None


def _blocks(rows: Tensor, length: int, widths: list[int]) -> list[Tensor]:
    """Rows `[length · sum(widths), D]` → the block `[length, width, D]` of each rank, as views."""
    parts = rows.split([length * width for width in widths])
    return [part.view(length, width, -1) for part, width in zip(parts, widths, strict=True)]


def ulysses(group: dist.ProcessGroup, inner: Varlen = varlen, lengths: list[int] | None = None) -> Varlen:
    """Packed attention over a sequence that is divided among `group` (DeepSpeed-Ulysses, arXiv 2309.14509).

    It takes `[L / P, H, D]` of this rank's tokens and the boundaries of the complete pack. Tokens are exchanged for
    heads, so each rank attends over all L tokens with H / P heads. A rank receives only the KV heads that its queries
    read, each once. With fewer KV heads than ranks, several ranks receive the same one.

    lengths: tokens of each rank, if they are not all L / P.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)

    def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
        heads, kv_heads, length = q.shape[1], k.shape[1], len(q)
        if heads % ranks:
            raise RecipeError(f"sequence_parallel = {ranks} does not divide the model's {heads} heads; lower it")
        wanted = key_heads(heads, kv_heads, ranks)
        own, mine = heads // ranks, wanted[rank]
        cut = [length] * ranks if lengths is None else lengths
        q, k, v = _ToHeads.apply(q, k, v, wanted, cut, group)
        reads = [(rank * own + i) * kv_heads // heads - mine[0] for i in range(own)]
        if reads != [i * len(mine) // own for i in range(own)] or own % len(mine):
            # No kernel supports query heads that share KV heads unevenly: copy the KV heads after the exchange.
            k, v = k[:, reads], v[:, reads]
        out = inner(q, k, v, cu_seqlens, causal)
        out = all_to_all(out, cut, [length] * ranks, group)
        return out.unflatten(0, (ranks, length)).transpose(0, 1).flatten(1, 2)

    return attention


def key_heads(heads: int, kv_heads: int, ranks: int) -> list[list[int]]:
    """Rank → the KV heads that its `heads / ranks` neighbouring query heads read, in order and without a gap."""
    own, shared = heads // ranks, heads // kv_heads
    return [list(range(r * own // shared, ((r + 1) * own - 1) // shared + 1)) for r in range(ranks)]


def share_frames(costs: list[float], ranks: int) -> list[list[int]]:
    """Assign frames (or stills) to ranks, most expensive first to the lowest load; rank → frames in stream order."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for frame in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, least = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[frame], least))
        shares[least].append(frame)
    return [sorted(share) for share in shares]


class Piece(NamedTuple):
    """A rank's part of a still or frame: `tokens` of its tokens from `first` on. frame: row of the pack's grids."""

    frame: int
    first: int
    tokens: int


def vision_shares(grids: Tensor, ranks: int) -> list[list[Piece]]:
    """Rank of a sequence group → its pieces of the stills and frames `grids` `[F, 3]` (stills first), in order.

    Frames stay undivided if that is even. Otherwise the largest frames are divided among all ranks until it is even,
    unless they are too small to be worth the exchange (`FRAME_PATCHES`). A frame of n patches costs n + n² / 6800: at
    6800 patches SigLIP-so400m's attention takes as many operations as its products and the projector's.
    """
    sizes = grids.prod(1).tolist()
    costs = [size + size**2 / 6800 for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    large = sum(size > FRAME_PATCHES for size in sizes) if ranks > 1 else 0
    for split in range(large + 1):
        rest = sorted(order[split:])
        undivided = share_frames([costs[i] for i in rest], ranks)
        loads = [sum(costs[rest[i]] for i in share) for share in undivided]
        if max(loads) - sum(loads) / ranks <= UNEVEN * sum(costs) / ranks:
            break
    shares = [[Piece(rest[i], 0, sizes[rest[i]] // 4) for i in share] for share in undivided]
    for frame in order[:split]:
        bounds = [sizes[frame] // 4 * rank // ranks for rank in range(ranks + 1)]
        for rank, share in enumerate(shares):
            share.append(Piece(frame, bounds[rank], bounds[rank + 1] - bounds[rank]))
    return [sorted(share) for share in shares]


def piece_pixels(pixels: Tensor, grid: Tensor, piece: Piece) -> Tensor:
    """The pixels of a piece of a still or frame with `pixels` `[n, 3, 14, 14]` and `grid` `[3]`."""
    if 4 * piece.tokens == len(pixels):
        return pixels
    return pixels[merge_order(grid[None])[piece.first : piece.first + piece.tokens].flatten()]


def own_pixels(pack: dict[str, Tensor], share: list[Piece]) -> Tensor | None:
    """The pixels `[n, 3, 14, 14]` of the pieces `share` of a pack, in their order; None if there are none."""
    kinds = [("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")]
    parts: list[tuple[Tensor, Tensor]] = []
    for pixels, grid in kinds:
        if grid in pack:
            parts += zip(pack[pixels].split(pack[grid].prod(1).tolist()), pack[grid], strict=True)
    return torch.cat([piece_pixels(*parts[piece.frame], piece) for piece in share]) if share else None


def shard(
    pack: dict[str, Tensor], grid: ParallelDims, image_token: int, video_token: int, attention: str = "auto"
) -> dict[str, object]:
    """One pack → the model's arguments on this rank.

    Without sequence parallelism the arguments are the pack itself. With it they are this rank's L / P tokens, the
    frames that it encodes, and the functions `varlen` and `exchange` and the list `frame_parts`.

    Args:
        pack: L is a multiple of P (`stages.data.collate.pack`). It has the pixels of all frames, or only those of this
            rank's `vision_shares` in their order as `pixel_values_mine` (absent if there are none); uint8 or normalised
            floats.
        grid: this rank's place.
        image_token, video_token: ids of the placeholders.
        attention: the backend of packed attention, as in the model's config.
    """
    if grid.sequence_group is None:
        return dict(pack)
    length = pack["input_ids"].shape[1] // grid.sequence
    inputs: dict[str, object] = {
        **{name: _cut(pack[name], grid, length) for name in ("input_ids", "position_ids", "shift_labels")},
        "cu_seqlens": pack["cu_seqlens"],
        "varlen": ulysses(grid.sequence_group, partial(varlen, backend=attention)),
    }
    return inputs | shard_vision(pack, grid, image_token, video_token, attention)


def shard_vision(
    pack: dict[str, Tensor], grid: ParallelDims, image_token: int, video_token: int, attention: str = "auto"
) -> dict[str, object]:
    """The vision inputs of `shard`, with the same arguments; of the other tensors only `input_ids` are needed.

    Empty for a pack without stills and frames.

    Raises:
        RecipeError: the frames of the pack are aggregated, which needs all frames of a video on one rank.
    """
    if "video_blocks" in pack:
        raise RecipeError(
            "aggregation needs all frames of a video on one rank, and sequence parallelism divides them; "
            "set sequence_parallel = 1 or remove aggregation from the encoder's settings and the messages"
        )
    both = [pack[name] for name in ("image_grid_thw", "video_grid_thw") if name in pack]
    if not both:
        return {}
    inputs: dict[str, object] = {}
    grids = torch.cat(both)
    shares = vision_shares(grids, grid.sequence)
    mine = shares[grid.sequence_rank]
    if mine:
        pixels = pack["pixel_values_mine"] if "pixel_values_mine" in pack else own_pixels(pack, mine)
        inputs |= _visual_inputs(pixels, grids, shares, grid, attention)
    ids = pack["input_ids"][0]
    length = len(ids) // grid.sequence
    stills, frames = ((ids == token).nonzero()[:, 0] for token in (image_token, video_token))
    route = route_features(grids, shares, torch.cat([stills, frames]) // length, grid.sequence_rank)
    inputs["exchange"] = _exchange(route, grid.sequence_group)
    return inputs


def _visual_inputs(
    pixels: Tensor, grids: Tensor, shares: list[list[Piece]], grid: ParallelDims, backend: str
) -> dict[str, object]:
    """The pixels of this rank's pieces as the model takes them: complete frames and parts of frames."""
    mine, sizes = shares[grid.sequence_rank], grids.prod(1).tolist()
    split = pixels.split([4 * piece.tokens for piece in mine])
    pairs = list(zip(mine, split, strict=True))
    complete = [(piece.frame, part) for piece, part in pairs if 4 * piece.tokens == sizes[piece.frame]]
    inputs: dict[str, object] = {}
    if complete:
        inputs["pixel_values"] = pixels if len(complete) == len(mine) else torch.cat([part for _, part in complete])
        inputs["image_grid_thw"] = grids[[frame for frame, _ in complete]]
    parts = inputs["frame_parts"] = []
    for piece, part in pairs:
        if 4 * piece.tokens != sizes[piece.frame]:
            lengths = [4 * other.tokens for share in shares for other in share if other.frame == piece.frame]
            attention = _frame_attention(grid.sequence_group, lengths, backend)
            parts.append(FramePart(part, *grids[piece.frame].tolist()[1:], piece.first, max(lengths), attention))
    return inputs


def _frame_attention(group: dist.ProcessGroup, lengths: list[int], backend: str) -> Varlen:
    """`ulysses` over the parts of a frame; zero heads are added to a multiple of the ranks."""
    attend = ulysses(group, partial(varlen, backend=backend), lengths)

    def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
        heads, missing = q.shape[1], -q.shape[1] % len(lengths)
        if missing:
            q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
        return attend(q, k, v, cu_seqlens, causal)[:, :heads]

    return attention


def _cut(full: Tensor, grid: ParallelDims, length: int) -> Tensor:
    """This rank's `length` tokens of the last dimension, copied, so that the memory of all tokens can be freed."""
    return full.narrow(-1, grid.sequence_rank * length, length).clone()


@dataclass(frozen=True)
class Route:
    """The exchange of visual tokens. Indices are LongTensors, counts are by rank.

    send: rows of this rank's features in the order of sending. sent, got: rows sent to and received from each rank.
    order: received rows in the order of the stream (stills, then frames).
    """

    send: Tensor
    sent: list[int]
    got: list[int]
    order: Tensor


def route_features(grids: Tensor, shares: list[list[Piece]], takers: Tensor, rank: int) -> Route:
    """The route of the visual tokens of a pack to the ranks with their placeholders.

    Args:
        grids: `[F, 3]` of all stills, then all frames.
        shares: rank → its pieces of the rows of `grids`; its features are in this order, parts of frames before
            complete frames.
        takers: `[V]` the rank with the placeholder of each visual token, stills first.
        rank: the rank of the route.
    """
    ranks, counts = len(shares), (grids.prod(1) // 4).tolist()
    pieces = sorted((piece, maker) for maker, share in enumerate(shares) for piece in share)  # in token order
    makers, tokens = torch.tensor([(maker, piece.tokens) for piece, maker in pieces]).T.to(takers.device)
    makers = makers.repeat_interleave(tokens, output_size=len(takers))
    made = takers[makers == rank]
    received = makers[takers == rank]
    return Route(
        send=_places(shares[rank], counts).to(takers.device)[made.argsort(stable=True)],
        sent=made.bincount(minlength=ranks).tolist(),
        got=received.bincount(minlength=ranks).tolist(),
        order=received.argsort(stable=True).argsort(),
    )


def _places(share: list[Piece], counts: list[int]) -> Tensor:
    """The row of each token of a rank's pieces, in stream order, in its features, where parts come first."""
    parts = torch.tensor([piece.tokens < counts[piece.frame] for piece in share], dtype=torch.bool)
    tokens = torch.tensor([piece.tokens for piece in share], dtype=torch.long)
    return (~parts).long().repeat_interleave(tokens).argsort(stable=True).argsort()


def _exchange(route: Route, group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """This rank's features `[n, hidden]` → those of its own placeholders: stills first, then frames."""

    def exchange(features: Tensor) -> Tensor:
        return all_to_all(features[route.send], route.sent, route.got, group)[route.order]

    return exchange
