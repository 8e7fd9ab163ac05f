"""Packing: samples → one row with explicit document boundaries."""

import torch
import torch.nn.functional as F
from torch import Tensor

from keye.processor.processor import Sample
from keye.slowfast.pixels import join
from stages.data.items import PIXELS

IGNORED = -100
GRIDS = ("image_grid_thw", "video_grid_thw")


def pack(samples: list[Sample], multiple: int = 1, pad: int = 0) -> dict[str, Tensor]:
    """Samples end to end as one row.

    Returns:
        input_ids `[1, L]`, position_ids `[3, 1, L]`, shift_labels `[1, L]` (the label at i is token i + 1; the last of
        each document is masked, so that none predicts its neighbour's first token), cu_seqlens int32 `[D + 1]`, and
        the pixels and grids of all stills and frames in stream order. L is a multiple of `multiple`: what is missing
        is a document of its own made of `pad` without labels.
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
    return row
