"""Which group a rank is in, and what crosses between ranks: Ulysses sequence parallelism and shared vision work.

The ranks form a grid: `sequence` neighbours share one pack (sequence group), the groups side by side see different
packs (data-parallel). DeepSpeed is told nothing of it. Every collective here is differentiable and sums gradients, so
the gradient of the whole loss is the sum over *all* ranks; DeepSpeed averages over all ranks, and the trainer scales
each loss by their number. That makes ZeRO partition over the whole world, sequence group included.
"""

import heapq
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
from keye.model.vision import FRAME_PATCHES, FramePart, merge_order

UNEVEN = 0.02  # of the mean: what the most expensive rank of a sequence group may encode more than the others


@dataclass(frozen=True)
class ParallelDims:
    """This rank's place. `sequence_group` is None when a pack belongs to one rank alone."""

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
    """The grid of the running processes; collective: every rank calls it, with the same `sequence`.

    Raises:
        RecipeError: `sequence` does not divide the number of processes.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    check_sequence(sequence, world)
    group = None
    if sequence > 1:
        for first in range(0, world, sequence):
            made = dist.new_group(list(range(first, first + sequence)))
            group = made if first <= rank < first + sequence else group
    return ParallelDims(rank, world, sequence, group)


def check_sequence(sequence: int, world: int) -> None:
    """RecipeError when `world` processes cannot be cut into groups of `sequence`."""
    if world % sequence:
        raise RecipeError(
            f"sequence_parallel = {sequence} does not divide the {world} processes; "
            f"start a multiple of {sequence} or lower it with --set STAGE.sequence_parallel=…"
        )


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a detached tensor over all ranks (a copy; the same on every rank)."""
    value = value.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


class _AllToAll(torch.autograd.Function):
    """`_swap` with a gradient: it is its own transpose, so the backward is the same exchange the other way."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.got, ctx.group = sent, got, group
        return _swap(x, sent, got, group)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad, ctx.got, ctx.sent, ctx.group), None, None, None


class _ToHeads(torch.autograd.Function):
    """Queries, keys and values of this rank's tokens → those of its heads, for all tokens, in one exchange.

    A rank is sent its query heads, then its key heads, then its value heads. Written out rather than left to autograd,
    which would hold several copies of all three at the moment when a layer needs the most memory.
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
            for part, whole, first in zip(parts, (q, k, v), (taker * own, kv[0], kv[0]), strict=True):
                part.copy_(whole.narrow(1, first, part.shape[1]))
        width = own + 2 * len(mine)
        got = _swap(sent, [length * w for w in widths], [n * width for n in lengths], group)
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
        got = _swap(sent, [n * width for n in ctx.lengths], [length * w for w in widths], ctx.group)
        del sent, grads
        grad_q = got.new_empty(length, heads, size)
        # Ranks may share a KV head: their gradients of it are summed in fp32.
        wide = torch.promote_types(got.dtype, torch.float32)
        grad_k, grad_v = (got.new_zeros(kv_shape, dtype=wide) for _ in range(2))
        for taker, (block, kv) in enumerate(zip(_blocks(got, length, widths), ctx.wanted, strict=True)):
            of_q, of_k, of_v = block.split([own, len(kv), len(kv)], dim=1)
            grad_q[:, taker * own : (taker + 1) * own] = of_q
            grad_k[:, kv[0] : kv[-1] + 1] += of_k
            grad_v[:, kv[0] : kv[-1] + 1] += of_v
        return grad_q, grad_k.to(got.dtype), grad_v.to(got.dtype), None, None, None


def _blocks(rows: Tensor, length: int, widths: list[int]) -> list[Tensor]:
    """Rows `[length · sum(widths), D]` → for each rank its block `[length, width, D]`, as views."""
    parts = rows.split([length * width for width in widths])
    return [part.view(length, width, -1) for part, width in zip(parts, widths, strict=True)]


def _swap(x: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows `[sum(sent), …]` → rows `[sum(got), …]`: the first `sent[0]` go to rank 0, and so on."""
    out = x.new_empty(sum(got), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), got, sent, group=group)
    return out


class _AllGather(torch.autograd.Function):
    """`[n, …]` → `[P, n, …]`; the backward sums what every rank sends back to a block's owner."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather(list(out.unbind(0)), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """`[n, …]`, of one shape on all ranks → `[P, n, …]` with gradient; one process: `[1, n, …]`."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return x[None]
    return _AllGather.apply(x, group)


def ulysses(group: dist.ProcessGroup, inner: Varlen = varlen, lengths: list[int] | None = None) -> Varlen:
    """Packed attention over a sequence that is cut among `group` (DeepSpeed-Ulysses, arXiv 2309.14509).

    Takes `[L / P, H, D]` of this rank's tokens and the boundaries of the whole pack; trades tokens for heads, so that
    each rank attends over all L tokens with H / P heads. A rank is sent the KV heads that its queries read and no
    others, each once: where there are fewer of them than ranks, several ranks get the same one.

    lengths: tokens of each rank, where they are not all L / P.
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
            # Query heads that share KV heads unevenly, which no kernel knows: copied here, after they were sent.
            k, v = k[:, reads], v[:, reads]
        out = inner(q, k, v, cu_seqlens, causal)
        out = _AllToAll.apply(out, cut, [length] * ranks, group)
        return out.unflatten(0, (ranks, length)).transpose(0, 1).flatten(1, 2)

    return attention


def key_heads(heads: int, kv_heads: int, ranks: int) -> list[list[int]]:
    """Rank → the KV heads that its `heads / ranks` neighbouring query heads read, rising and without a gap."""
    own, shared = heads // ranks, heads // kv_heads
    return [list(range(r * own // shared, ((r + 1) * own - 1) // shared + 1)) for r in range(ranks)]


def share_frames(costs: list[float], ranks: int) -> list[list[int]]:
    """Frames (or stills) dealt to ranks, largest first, each to the least loaded; each rank's list in stream order."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for frame in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, least = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[frame], least))
        shares[least].append(frame)
    return [sorted(share) for share in shares]


class Piece(NamedTuple):
    """What a rank encodes of a still or frame: `tokens` of them from `first` on; frame: the row of the pack's grids."""

    frame: int
    first: int
    tokens: int


def vision_shares(grids: Tensor, ranks: int) -> list[list[Piece]]:
    """Rank of a sequence group → what it encodes of the stills and frames `grids` `[F, 3]` (stills first), in order.

    Frames are dealt whole where that is even. Otherwise as many of the largest are cut among all ranks as make it
    even, unless they are too small to be worth the exchange (`FRAME_PATCHES`). A frame of n patches costs
    n + n² / 6800: there SigLIP-so400m's attention takes as many operations as its products and the projector's.
    """
    sizes = grids.prod(1).tolist()
    costs = [size + size**2 / 6800 for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    large = sum(size > FRAME_PATCHES for size in sizes) if ranks > 1 else 0
    for split in range(large + 1):
        rest = sorted(order[split:])
        dealt = share_frames([costs[i] for i in rest], ranks)
        loads = [sum(costs[rest[i]] for i in share) for share in dealt]
        if max(loads) - sum(loads) / ranks <= UNEVEN * sum(costs) / ranks:
            break
    shares = [[Piece(rest[i], 0, sizes[rest[i]] // 4) for i in share] for share in dealt]
    for frame in order[:split]:
        bounds = [sizes[frame] // 4 * rank // ranks for rank in range(ranks + 1)]
        for rank, share in enumerate(shares):
            share.append(Piece(frame, bounds[rank], bounds[rank + 1] - bounds[rank]))
    return [sorted(share) for share in shares]


def piece_pixels(pixels: Tensor, grid: Tensor, piece: Piece) -> Tensor:
    """A piece of a still or frame of pixels `[n, 3, 14, 14]` and `grid` `[3]`: of a whole one all, else its squares."""
    if 4 * piece.tokens == len(pixels):
        return pixels
    return pixels[merge_order(grid[None])[piece.first : piece.first + piece.tokens].flatten()]


def own_pixels(pack: dict[str, Tensor], share: list[Piece]) -> Tensor | None:
    """The pixels `[n, 3, 14, 14]` of the pieces `share` of a pack, in their order; None when there are none."""
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

    Without sequence parallelism that is the pack itself. With it: this rank's L / P tokens, the frames it encodes, and
    the seams `varlen`, `frame_parts` and `exchange`. L must be a multiple of P (`data.packing` sees to it). The pack
    may hold the pixels of all frames, or as `pixel_values_mine` only those of this rank's `vision_shares`, in their
    order (absent where the rank has none); uint8 or normalised floats. attention: the backend of packed attention, as
    the model's config names it.
    """
    if grid.sequence_group is None:
        return dict(pack)
    length = pack["input_ids"].shape[1] // grid.sequence
    inputs: dict[str, object] = {
        **{name: _cut(pack[name], grid, length) for name in ("input_ids", "position_ids", "shift_labels")},
        "cu_seqlens": pack["cu_seqlens"],
        "varlen": ulysses(grid.sequence_group, partial(varlen, backend=attention)),
    }
    both = [pack[name] for name in ("image_grid_thw", "video_grid_thw") if name in pack]
    if not both:
        return inputs
    grids = torch.cat(both)
    shares = vision_shares(grids, grid.sequence)
    mine = shares[grid.sequence_rank]
    if mine:
        pixels = pack["pixel_values_mine"] if "pixel_values_mine" in pack else own_pixels(pack, mine)
        inputs |= _visual_inputs(pixels, grids, shares, grid, attention)
    ids = pack["input_ids"][0]
    stills, frames = ((ids == token).nonzero()[:, 0] for token in (image_token, video_token))
    route = route_features(grids, shares, torch.cat([stills, frames]) // length, grid.sequence_rank)
    inputs["exchange"] = _exchange(route, grid.sequence_group)
    return inputs


def _visual_inputs(
    pixels: Tensor, grids: Tensor, shares: list[list[Piece]], grid: ParallelDims, backend: str
) -> dict[str, object]:
    """The pixels of this rank's pieces as whole frames and parts of frames, for the model."""
    mine, sizes = shares[grid.sequence_rank], grids.prod(1).tolist()
    split = pixels.split([4 * piece.tokens for piece in mine])
    pairs = list(zip(mine, split, strict=True))
    whole = [(piece.frame, part) for piece, part in pairs if 4 * piece.tokens == sizes[piece.frame]]
    inputs: dict[str, object] = {}
    if whole:
        inputs["pixel_values"] = pixels if len(whole) == len(mine) else torch.cat([part for _, part in whole])
        inputs["image_grid_thw"] = grids[[frame for frame, _ in whole]]
    inputs["frame_parts"] = [
        _frame_part(part, grids[piece.frame].tolist(), piece, shares, grid.sequence_group, backend)
        for piece, part in pairs
        if 4 * piece.tokens != sizes[piece.frame]
    ]
    return inputs


def _frame_part(
    pixels: Tensor, size: list[int], piece: Piece, shares: list[list[Piece]], group: dist.ProcessGroup, backend: str
) -> FramePart:
    lengths = [4 * other.tokens for share in shares for other in share if other.frame == piece.frame]
    return FramePart(pixels, *size[1:], piece.first, max(lengths), _frame_attention(group, lengths, backend))


def _frame_attention(group: dist.ProcessGroup, lengths: list[int], backend: str) -> Varlen:
    """`ulysses` over the parts of a frame; heads of nothing make up what the ranks do not divide."""
    attend = ulysses(group, partial(varlen, backend=backend), lengths)

    def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
        heads, missing = q.shape[1], -q.shape[1] % len(lengths)
        if missing:
            q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
        return attend(q, k, v, cu_seqlens, causal)[:, :heads]

    return attention


def _cut(whole: Tensor, grid: ParallelDims, length: int) -> Tensor:
    """This rank's `length` tokens of the last dimension, as a tensor of its own, so that the whole can go."""
    return whole.narrow(-1, grid.sequence_rank * length, length).clone()


@dataclass(frozen=True)
class Route:
    """Which visual tokens go where. Indices are LongTensors, counts are by rank.

    send: rows of this rank's features in the order they are sent. sent, got: how many go to and come from each rank.
    order: what came, brought into the order of the stream (stills, then frames).
    """

    send: Tensor
    sent: list[int]
    got: list[int]
    order: Tensor


def route_features(grids: Tensor, shares: list[list[Piece]], takers: Tensor, rank: int) -> Route:
    """How the visual tokens of a pack reach the ranks that hold their places.

    Args:
        grids: `[F, 3]` of all stills, then all frames. shares: rank → what it encodes of the rows of `grids`; its
            features are in this order, but parts of frames come before whole frames.
        takers: `[V]` the rank that holds the place of each visual token, stills first.
        rank: whose route it is.
    """
    ranks, counts = len(shares), (grids.prod(1) // 4).tolist()
    pieces = sorted((piece, maker) for maker, share in enumerate(shares) for piece in share)  # as the tokens go
    makers, tokens = torch.tensor([(maker, piece.tokens) for piece, maker in pieces]).T.to(takers.device)
    makers = makers.repeat_interleave(tokens, output_size=len(takers))
    made = takers[makers == rank]
    came = makers[takers == rank]
    return Route(
        send=_places(shares[rank], counts).to(takers.device)[made.argsort(stable=True)],
        sent=made.bincount(minlength=ranks).tolist(),
        got=came.bincount(minlength=ranks).tolist(),
        order=came.argsort(stable=True).argsort(),
    )


def _places(share: list[Piece], counts: list[int]) -> Tensor:
    """For each token of a rank's pieces, in stream order, its row in the features, where parts come first."""
    parts = torch.tensor([piece.tokens < counts[piece.frame] for piece in share], dtype=torch.bool)
    tokens = torch.tensor([piece.tokens for piece in share], dtype=torch.long)
    return (~parts).long().repeat_interleave(tokens).argsort(stable=True).argsort()


def _exchange(route: Route, group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """Features this rank encoded `[n, hidden]` → those its own placeholders take: stills first, then frames."""

    def exchange(features: Tensor) -> Tensor:
        return _AllToAll.apply(features[route.send], route.sent, route.got, group)[route.order]

    return exchange
