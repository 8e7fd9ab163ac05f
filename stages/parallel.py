"""Which group a rank is in, and what crosses between ranks: Ulysses sequence parallelism and shared vision work.

The ranks form a grid: `sequence` neighbours share one pack (sequence group), the groups side by side see different
packs (data-parallel). DeepSpeed is told nothing of it. Every collective here is differentiable and sums gradients, so
the gradient of the whole loss is the sum over *all* ranks; DeepSpeed averages over all ranks, and the trainer scales
each loss by their number. That makes ZeRO partition over the whole world, sequence group included.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from keye.errors import RecipeError
from keye.model.attention import Varlen, varlen


@dataclass(frozen=True)
class Grid:
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


def make_grid(sequence: int = 1) -> Grid:
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
    return Grid(rank, world, sequence, group)


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
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, ...]:
        ctx.wanted, ctx.group, ctx.shapes = wanted, group, (q.shape, k.shape)
        (length, heads, size), mine = q.shape, wanted[dist.get_rank(group)]
        own = heads // len(wanted)
        widths = [own + 2 * len(kv) for kv in wanted]
        sent = q.new_empty(length * sum(widths), size)
        for taker, (block, kv) in enumerate(zip(_blocks(sent, length, widths), wanted, strict=True)):
            parts = block.split([own, len(kv), len(kv)], dim=1)
            for part, whole, first in zip(parts, (q, k, v), (taker * own, kv[0], kv[0]), strict=True):
                part.copy_(whole.narrow(1, first, part.shape[1]))
        width = own + 2 * len(mine)
        got = _swap(sent, [length * w for w in widths], [length * width] * len(wanted), group)
        return tuple(got.view(-1, width, size).split([own, len(mine), len(mine)], dim=1))

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (length, heads, size), kv_shape = ctx.shapes
        ranks, own = len(ctx.wanted), heads // len(ctx.wanted)
        widths = [own + 2 * len(kv) for kv in ctx.wanted]
        sent = torch.cat(grads, dim=1).flatten(0, 1)
        got = _swap(sent, [len(sent) // ranks] * ranks, [length * w for w in widths], ctx.group)
        del sent, grads
        grad_q = got.new_empty(length, heads, size)
        grad_k, grad_v = (got.new_zeros(kv_shape) for _ in range(2))
        for taker, (block, kv) in enumerate(zip(_blocks(got, length, widths), ctx.wanted, strict=True)):
            of_q, of_k, of_v = block.split([own, len(kv), len(kv)], dim=1)
            grad_q[:, taker * own : (taker + 1) * own] = of_q
            grad_k[:, kv[0] : kv[-1] + 1] += of_k
            grad_v[:, kv[0] : kv[-1] + 1] += of_v
        return grad_q, grad_k, grad_v, None, None


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


def ulysses(group: dist.ProcessGroup, inner: Varlen = varlen) -> Varlen:
    """Packed attention over a sequence that is cut among `group` (DeepSpeed-Ulysses, arXiv 2309.14509).

    Takes `[L / P, H, D]` of this rank's tokens and the boundaries of the whole pack; trades tokens for heads, so that
    each rank attends over all L tokens with H / P heads. A rank is sent the KV heads that its queries read and no
    others, each once: where there are fewer of them than ranks, several ranks get the same one.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)

    def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
        heads, kv_heads, length = q.shape[1], k.shape[1], len(q)
        if heads % ranks:
            raise RecipeError(f"sequence_parallel = {ranks} does not divide the model's {heads} heads; lower it")
        wanted = key_heads(heads, kv_heads, ranks)
        own, mine = heads // ranks, wanted[rank]
        q, k, v = _ToHeads.apply(q, k, v, wanted, group)
        reads = [(rank * own + i) * kv_heads // heads - mine[0] for i in range(own)]
        if reads != [i * len(mine) // own for i in range(own)] or own % len(mine):
            # Query heads that share KV heads unevenly, which no kernel knows: copied here, after they were sent.
            k, v = k[:, reads], v[:, reads]
        out = inner(q, k, v, cu_seqlens, causal)
        rows = [length] * ranks
        out = _AllToAll.apply(out, rows, rows, group)
        return out.unflatten(0, (ranks, length)).transpose(0, 1).flatten(1, 2)

    return attention


def key_heads(heads: int, kv_heads: int, ranks: int) -> list[list[int]]:
    """Rank → the KV heads that its `heads / ranks` neighbouring query heads read, rising and without a gap."""
    own, shared = heads // ranks, heads // kv_heads
    return [list(range(r * own // shared, ((r + 1) * own - 1) // shared + 1)) for r in range(ranks)]


def share_frames(costs: list[float], ranks: int) -> list[list[int]]:
    """Frames (or stills) dealt to ranks, dearest first, each to the least loaded; each rank's list in stream order."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for frame in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, least = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[frame], least))
        shares[least].append(frame)
    return [sorted(share) for share in shares]


def vision_shares(grids: Tensor, ranks: int) -> list[list[int]]:
    """Rank of a sequence group → the stills and frames it encodes, as rows of `grids` `[F, 3]` (stills first).

    A frame of n patches costs n + n² / 4096: attention weighs as much as the tower's products at about this size, as
    in SigLIP-so400m with the projector.
    """
    return share_frames([size + size**2 / 4096 for size in grids.prod(1).tolist()], ranks)


def own_pixels(pack: dict[str, Tensor], share: list[int]) -> Tensor | None:
    """The pixels `[n, 3, 14, 14]` of the stills and frames `share` of a pack; None when there are none."""
    kinds = [("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")]
    parts: list[Tensor] = []
    for pixels, grid in kinds:
        if grid in pack:
            parts += pack[pixels].split(pack[grid].prod(1).tolist())
    return torch.cat([parts[i] for i in share]) if share else None


def shard(pack: dict[str, Tensor], grid: Grid, image_token: int, video_token: int) -> dict[str, object]:
    """One pack → the model's arguments on this rank.

    Without sequence parallelism that is the pack itself. With it: this rank's L / P tokens, the frames it encodes, and
    the two seams `varlen` and `exchange`. L must be a multiple of P (`data.packing` sees to it). The pack may hold the
    pixels of all frames, or as `pixel_values_mine` only those of this rank's `vision_shares`, in their order (absent
    where the rank has none); uint8 or normalised floats.
    """
    if grid.sequence_group is None:
        return dict(pack)
    length = pack["input_ids"].shape[1] // grid.sequence
    inputs: dict[str, object] = {
        **{name: _cut(pack[name], grid, length) for name in ("input_ids", "position_ids", "shift_labels")},
        "cu_seqlens": pack["cu_seqlens"],
        "varlen": ulysses(grid.sequence_group),
    }
    both = [pack[name] for name in ("image_grid_thw", "video_grid_thw") if name in pack]
    if not both:
        return inputs
    grids = torch.cat(both)
    shares = vision_shares(grids, grid.sequence)
    mine = shares[grid.sequence_rank]
    if mine:
        inputs["pixel_values"] = pack["pixel_values_mine"] if "pixel_values_mine" in pack else own_pixels(pack, mine)
        inputs["image_grid_thw"] = grids[mine]
    ids = pack["input_ids"][0]
    stills, frames = ((ids == token).nonzero()[:, 0] for token in (image_token, video_token))
    route = route_features(grids, shares, torch.cat([stills, frames]) // length, grid.sequence_rank)
    inputs["exchange"] = _exchange(route, grid.sequence_group)
    return inputs


def _cut(whole: Tensor, grid: Grid, length: int) -> Tensor:
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


def route_features(grids: Tensor, shares: list[list[int]], takers: Tensor, rank: int) -> Route:
    """How the visual tokens of a pack reach the ranks that hold their places.

    Args:
        grids: `[F, 3]` of all stills, then all frames. shares: rank → the rows of `grids` that it encodes.
        takers: `[V]` the rank that holds the place of each visual token, stills first.
        rank: whose route it is.
    """
    ranks, counts = len(shares), grids.prod(1) // 4
    makers = torch.empty(len(grids), dtype=torch.long, device=takers.device)
    for maker, share in enumerate(shares):
        makers[share] = maker
    makers = makers.repeat_interleave(counts.to(takers.device), output_size=len(takers))
    made = takers[makers == rank]
    came = makers[takers == rank]
    return Route(
        send=made.argsort(stable=True),
        sent=made.bincount(minlength=ranks).tolist(),
        got=came.bincount(minlength=ranks).tolist(),
        order=came.argsort(stable=True).argsort(),
    )


def _exchange(route: Route, group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """Features this rank encoded `[n, hidden]` → those its own placeholders take: stills first, then frames."""

    def exchange(features: Tensor) -> Tensor:
        return _AllToAll.apply(features[route.send], route.sent, route.got, group)[route.order]

    return exchange
