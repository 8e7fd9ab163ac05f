"""Packing: samples → packs of one context length with explicit document boundaries (NaViT / best-fit packing)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keye.prompt.processor import Sample
from stages.data.mixture import Mixture
from stages.data.sources import Item

IGNORED = -100
VISUAL = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


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
    for name in VISUAL:
        parts = [getattr(s, name) for s in samples if getattr(s, name) is not None]
        if parts:
            row[name] = torch.cat(parts)
    return row


class Packer:
    """Draws samples into a pool and fills packs from it: the oldest first, then always the largest that still fits.

    Args:
        mixture: where samples come from; each is at most `context` tokens long.
        context: tokens a pack holds at most.
        pool: samples looked over at least; more = fuller packs.
    """

    def __init__(self, mixture: Mixture, context: int, pool: int = 32) -> None:
        self.mixture, self.context, self.size = mixture, context, pool
        self.pool: list[Item] = []

    def next(self) -> list[Item]:
        """The samples of the next pack."""
        # Two contexts' worth, however short the samples: a long pack of short samples needs many of them.
        while len(self.pool) < self.size or sum(item.tokens for item in self.pool) < 2 * self.context:
            self.pool.append(self.mixture.next())
        chosen, room = [self.pool.pop(0)], self.context
        room -= chosen[0].tokens
        while True:
            fitting = [i for i, item in enumerate(self.pool) if item.tokens <= room]
            if not fitting:
                return chosen
            best = max(fitting, key=lambda i: (self.pool[i].tokens, -i))
            chosen.append(self.pool.pop(best))
            room -= chosen[-1].tokens

    def state_dict(self) -> dict[str, Any]:
        """The pool is kept as references; its samples are encoded again on resume."""
        return {"mixture": self.mixture.state_dict(), "pool": [item.ref for item in self.pool]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mixture.load_state_dict(state["mixture"])
        items = [self.mixture.sources[name].item(index) for name, index in state["pool"]]
        self.pool = [item for item in items if item is not None]
