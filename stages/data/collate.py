"""Collate: encoded samples are cut into the pieces of each rank, sent where they train and joined into one row.

Everything here runs in the loader's thread, in a gloo group of its own: it never waits for the training's collectives
and never delays them.
"""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from keye.processor.sample import Sample, batch_blocks
from keye.slowfast.pixels import join
from stages.data.items import PIXELS, Item
from stages.data.packing.samples import Samples
from stages.distributed.parallel import Piece, piece_pixels, vision_shares

IGNORED = -100
GRIDS = ("image_grid_thw", "video_grid_thw")
TENSORS = ("input_ids", "labels", "position_ids", *PIXELS, *GRIDS, "video_blocks")

Share = tuple[list[Piece] | None, list[Piece] | None]
"""What a rank encodes of a sample's stills and of its frames; None: all."""


def pack(samples: list[Sample], multiple: int = 1, pad: int = 0) -> dict[str, Tensor]:
    """Join samples end to end into one row.

    Returns:
        input_ids `[1, L]`, position_ids `[3, 1, L]`, shift_labels `[1, L]` (the label at i is token i + 1; the last one
        of each document is masked, so no document predicts the first token of the next), cu_seqlens int32 `[D + 1]`,
        the pixels and grids of all stills and frames in stream order, and `video_blocks` if a sample has any. L is a
        multiple of `multiple`: a last document of `pad` tokens without labels fills the row.
    """
    documents = [(s.input_ids, s.position_ids, F.pad(s.labels[1:], (0, 1), value=IGNORED)) for s in samples]
    rest = -sum(len(ids) for ids, _, _ in documents) % multiple
    if rest:
        positions = torch.arange(rest).expand(3, rest)
        documents.append((torch.full((rest,), pad), positions, torch.full((rest,), IGNORED)))
    lengths = torch.tensor([0] + [len(ids) for ids, _, _ in documents])
    row: dict[str, Tensor] = {
        "input_ids": torch.cat([ids for ids, _, _ in documents])[None],
        "position_ids": torch.cat([positions for _, positions, _ in documents], 1)[:, None],
        "shift_labels": torch.cat([labels for _, _, labels in documents])[None],
        "cu_seqlens": lengths.cumsum(0).to(torch.int32),
    }
    for name in (*PIXELS, *GRIDS):
        parts = [getattr(s, name) for s in samples if getattr(s, name) is not None]
        if parts:
            row[name] = join(parts)
    if (blocks := batch_blocks(samples)) is not None:
        row["video_blocks"] = blocks
    return row


def pixel_shares(samples: Samples, ranks: int) -> list[list[Share]]:
    """The pixels that each rank of a sequence group encodes of a pack's samples; sample → rank → its share."""
    if ranks == 1:
        return [[(None, None)]] * len(samples)
    # In the order of a pack: the stills of all samples, then the frames of all samples.
    stills, sizes = samples.stills.tolist(), samples.sizes
    rows = [(place, 0, i) for place, count in enumerate(stills) for i in range(count)]
    rows += [(place, 1, i) for place, count in enumerate(stills) for i in range(len(sizes[place]) - count)]
    found: list[list[tuple[list[Piece], list[Piece]]]] = [[([], []) for _ in range(ranks)] for _ in stills]
    if rows:
        both = [size[:n] for size, n in zip(sizes, stills, strict=True)]
        both += [size[n:] for size, n in zip(sizes, stills, strict=True)]
        grids = torch.from_numpy(np.concatenate(both).astype(np.int64))
        grids = torch.cat([torch.ones(len(grids), 1, dtype=torch.long), grids], 1)
        for rank, share in enumerate(vision_shares(grids, ranks)):
            for piece in share:
                place, which, i = rows[piece.frame]
                found[place][rank][which].append(piece._replace(frame=i))
    return found


def with_share(item: Item, share: Share) -> Item:
    """The item with the pixels of a rank's share alone, copied into tensors of their own."""
    changed: dict[str, Tensor | None] = {}
    for name, grid_name, pieces in zip(PIXELS, GRIDS, share, strict=True):
        pixels, grid = getattr(item.sample, name), getattr(item.sample, grid_name)
        if pixels is not None and pieces is not None:
            parts = pixels.split(grid.prod(1).tolist())
            own = [piece_pixels(parts[piece.frame], grid[piece.frame], piece) for piece in pieces]
            changed[name] = torch.cat(own) if own else None
    return replace(item, sample=replace(item.sample, **changed))


def send(blobs: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Send `blobs[rank]` (uint8 `[n]`) to each rank; returns those that the ranks sent here, by rank. Collective."""
    sent = torch.tensor([len(blob) for blob in blobs])
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    received = torch.empty(int(got.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, torch.cat(blobs), got.tolist(), sent.tolist(), group=group)
    return list(received.split(got.tolist()))


def to_bytes(items: list[tuple[Any, Item]]) -> Tensor:
    """(key, item)s → uint8 `[n]`: tensors and plain values only, so reading them executes nothing; none → `[0]`."""
    if not items:
        return torch.empty(0, dtype=torch.uint8)
    rows = []
    for key, item in items:
        tensors = {name: getattr(item.sample, name) for name in TENSORS}
        plain = (key, item.source, item.index, item.kind, item.caption, item.part)
        plain += (item.sample.all_warnings, item.sample.thinned)
        rows.append((plain, {name: value for name, value in tensors.items() if value is not None}))
    out = io.BytesIO()
    torch.save(rows, out)
    return torch.frombuffer(out.getbuffer(), dtype=torch.uint8)


def from_bytes(blob: Tensor) -> list[tuple[Any, Item]]:
    """The (key, item)s of `to_bytes`."""
    if not len(blob):
        return []
    rows = torch.load(io.BytesIO(blob.numpy()), weights_only=True)
    return [
        (key, Item(Sample(**tensors, warnings=warnings, thinned=thinned), *rest))
        for (key, *rest, warnings, thinned), tensors in rows
    ]
