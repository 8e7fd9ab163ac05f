"""Which group a rank is in, and what crosses between ranks: Ulysses sequence parallelism and shared vision work.

The ranks form a grid: `sequence` neighbours share one pack (sequence group), the groups side by side see different
packs (data-parallel). DeepSpeed is told nothing of it. Every collective here is differentiable and sums gradients, so
the gradient of the whole loss is the sum over *all* ranks; DeepSpeed averages over all ranks, and the trainer scales
each loss by their number. That makes ZeRO partition over the whole world, sequence group included.
"""

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
    """`[P, …]` → `[P, …]`: block p goes to rank p; its own transpose, so the backward is the same exchange."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad.contiguous(), ctx.group), None


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
    each rank attends over all L tokens with H / P heads. Fewer KV heads than ranks are repeated as often as needed.
    """
    ranks = dist.get_world_size(group)

    def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
        heads, kv_heads = q.shape[1], k.shape[1]
        if heads % ranks:
            raise RecipeError(f"sequence_parallel = {ranks} does not divide the model's {heads} heads; lower it")
        if kv_heads % ranks:
            copies = ranks // kv_heads if ranks % kv_heads == 0 else heads // kv_heads
            k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        q, k, v = (_to_heads(x, ranks, group) for x in (q, k, v))
        out = inner(q, k, v, cu_seqlens, causal)
        return _to_tokens(out, ranks, group)

    return attention


def _to_heads(x: Tensor, ranks: int, group: dist.ProcessGroup) -> Tensor:
    """`[L / P, H, D]` → `[L, H / P, D]`."""
    blocks = x.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
    return _AllToAll.apply(blocks, group).flatten(0, 1)


def _to_tokens(x: Tensor, ranks: int, group: dist.ProcessGroup) -> Tensor:
    """`[L, H / P, D]` → `[L / P, H, D]`."""
    blocks = _AllToAll.apply(x.unflatten(0, (ranks, -1)).contiguous(), group)
    return blocks.transpose(0, 1).flatten(1, 2)


def share_frames(costs: list[float], ranks: int) -> list[list[int]]:
    """Frames (or stills) dealt to ranks, dearest first, each to the least loaded; each rank's list in stream order."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for frame in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = loads.index(min(loads))
        loads[least] += costs[frame]
        shares[least].append(frame)
    return [sorted(share) for share in shares]


def shard(pack: dict[str, Tensor], grid: Grid, image_token: int, video_token: int) -> dict[str, object]:
    """One pack → the model's arguments on this rank.

    Without sequence parallelism that is the pack itself. With it: this rank's L / P tokens, the frames it encodes, and
    the two seams `varlen` and `exchange`. L must be a multiple of P (`data.packing` sees to it).
    """
    if grid.sequence_group is None:
        return dict(pack)
    length = pack["input_ids"].shape[1] // grid.sequence
    mine = slice(grid.sequence_rank * length, (grid.sequence_rank + 1) * length)
    inputs: dict[str, object] = {
        "input_ids": pack["input_ids"][:, mine],
        "position_ids": pack["position_ids"][:, :, mine],
        "shift_labels": pack["shift_labels"][:, mine],
        "cu_seqlens": pack["cu_seqlens"],
        "varlen": ulysses(grid.sequence_group),
    }
    pixels = [pack[name] for name in ("pixel_values", "pixel_values_videos") if name in pack]
    if not pixels:
        return inputs
    grids = torch.cat([pack[name] for name in ("image_grid_thw", "video_grid_thw") if name in pack])
    sizes = grids.prod(1).tolist()
    shares = share_frames([size + size**2 / 4096 for size in sizes], grid.sequence)
    # A rank without a frame encodes the first one, which nobody then takes, so that all ranks run the same graph.
    frames = shares[grid.sequence_rank] or [0]
    parts = torch.cat(pixels).split(sizes)
    inputs["pixel_values"] = torch.cat([parts[i] for i in frames])
    inputs["image_grid_thw"] = grids[frames]
    ids = pack["input_ids"][0]
    inputs["exchange"] = _exchange(grid, [size // 4 for size in sizes], shares, ids, mine, image_token, video_token)
    return inputs


def _exchange(
    grid: Grid, tokens: list[int], shares: list[list[int]], ids: Tensor, mine: slice, image_token: int, video_token: int
) -> Callable[[Tensor], Tensor]:
    """A function from the features this rank encoded to those its own placeholders take: stills first, then frames.

    tokens: visual tokens of each still and frame in stream order, stills first; ids `[L]` of the whole pack.
    """
    held = [sum(tokens[i] for i in share) for share in shares]
    longest = max(*held, tokens[0])
    # Where visual token j (stills first) is in the gathered buffer [P · longest].
    starts = [0] * len(tokens)
    for rank, share in enumerate(shares):
        at = rank * longest
        for frame in share:
            starts[frame], at = at, at + tokens[frame]
    where = torch.cat([torch.arange(s, s + n, device=ids.device) for s, n in zip(starts, tokens, strict=True)])
    wanted, first = [], 0
    for token in (image_token, video_token):
        place = ids == token
        before, inside = int(place[: mine.start].sum()), int(place[mine].sum())
        wanted.append(where[first + before : first + before + inside])
        first += int(place.sum())
    chosen = torch.cat(wanted)

    def exchange(features: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(features, (0, 0, 0, longest - len(features)))
        return all_gather(padded, grid.sequence_group).flatten(0, 1)[chosen]

    return exchange
