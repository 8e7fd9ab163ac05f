"""Exchange: plans and what is known of samples, between rank 0 and the others; encoded samples to who trains on them.

Everything here runs in the loader's thread, in a gloo group of its own, so that it never waits for, nor holds up, what
the training does in other groups.
"""

import io
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import keye.errors
from keye.errors import KeyeError
from keye.processor.processor import Sample
from stages.data.items import Item
from stages.distributed.parallel import Piece, piece_pixels

TENSORS = (
    "input_ids", "labels", "position_ids", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw",
)  # fmt: skip


class Failure(NamedTuple):
    """An error as it travels between ranks: its class where it is a KeyeError, and its message."""

    name: str
    text: str

    @classmethod
    def of(cls, error: Exception, rank: int) -> "Failure":
        name, text = type(error).__name__, str(error)
        known = getattr(keye.errors, name, None) is not None
        return cls(name, text) if known else cls("KeyeError", f"the data of rank {rank}: {name}: {text}")

    @property
    def error(self) -> KeyeError:
        return getattr(keye.errors, self.name)(self.text)


def make_group(ranks: int) -> dist.ProcessGroup | None:
    """A gloo group of all ranks for one loader; collective. None for a process alone."""
    return dist.new_group(backend="gloo") if ranks > 1 else None


def gather(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Plain values of every rank, by rank, on every rank."""
    if group is None:
        return [mine]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found


def collect(mine: Any, group: dist.ProcessGroup | None) -> list[Any] | None:
    """Plain values of every rank, by rank, on rank 0; None on the others."""
    if group is None:
        return [mine]
    found = [None] * dist.get_world_size(group) if dist.get_rank() == 0 else None
    dist.gather_object(mine, found, dst=0, group=group)
    return found


def broadcast(mine: Any, group: dist.ProcessGroup | None) -> Any:
    """What rank 0 has, on every rank."""
    if group is None:
        return mine
    box = [mine]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def agree(error: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank the error of the first rank that has one; without an error that is one number.

    Raises:
        KeyeError: of the class it had, or naming rank and class where it was no KeyeError.
    """
    if group is None:
        if error is not None:
            raise error
        return
    failed = torch.tensor([error is not None], dtype=torch.int32)
    dist.all_reduce(failed, group=group)
    if not failed:
        return
    failures = gather(None if error is None else Failure.of(error, dist.get_rank()), group)
    raise next(failure for failure in failures if failure is not None).error from error


def part(item: Item, stills: list[Piece] | None, frames: list[Piece] | None) -> Item:
    """An item with the pixels of these pieces of its stills and frames alone, as tensors of their own; None: all."""
    changed: dict[str, Tensor | None] = {}
    for name, grid, rows in (
        ("pixel_values", item.sample.image_grid_thw, stills),
        ("pixel_values_videos", item.sample.video_grid_thw, frames),
    ):
        pixels = getattr(item.sample, name)
        if pixels is not None and rows is not None:
            parts = pixels.split(grid.prod(1).tolist())
            own = [piece_pixels(parts[piece.frame], grid[piece.frame], piece) for piece in rows]
            changed[name] = torch.cat(own) if own else None
    return replace(item, sample=replace(item.sample, **changed))


def send(outgoing: list[list[tuple[Any, Item]]], group: dist.ProcessGroup) -> list[tuple[Any, Item]]:
    """Rank → its (key, item)s; returns the (key, item)s that all ranks sent here. Collective."""
    blobs = [_write(items) if items else torch.empty(0, dtype=torch.uint8) for items in outgoing]
    sent = torch.tensor([len(blob) for blob in blobs])
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    came = torch.empty(int(got.sum()), dtype=torch.uint8)
    dist.all_to_all_single(came, torch.cat(blobs), got.tolist(), sent.tolist(), group=group)
    return [pair for blob in came.split(got.tolist()) if len(blob) for pair in _read(blob)]


def _write(items: list[tuple[Any, Item]]) -> Tensor:
    """Items → bytes `[n]`: tensors and plain values, nothing that runs when it is read."""
    rows = []
    for key, item in items:
        tensors = {name: getattr(item.sample, name) for name in TENSORS}
        plain = (key, item.source, item.index, item.kind, item.caption, item.part)
        plain += (item.sample.all_warnings, item.sample.thinned)
        rows.append((plain, {name: value for name, value in tensors.items() if value is not None}))
    out = io.BytesIO()
    torch.save(rows, out)
    return torch.frombuffer(out.getbuffer(), dtype=torch.uint8)


def _read(blob: Tensor) -> list[tuple[Any, Item]]:
    rows = torch.load(io.BytesIO(blob.numpy()), weights_only=True)
    return [
        (key, Item(Sample(**tensors, warnings=warnings, thinned=thinned), *rest))
        for (key, *rest, warnings, thinned), tensors in rows
    ]
