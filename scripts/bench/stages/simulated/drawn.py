"""Batches of drawn lengths: the real planner forms them, and their tensors have real ids, grids and labels."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from keye.model.rope import stream_positions
from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.stream import IMAGE_PAD, VIDEO_PAD
from keye.processor.tokenizer import train_tokenizer
from stages.data.collate import pack
from stages.data.packing.samples import Meta
from stages.distributed.parallel import ParallelDims, vision_shares

STAMP = 8  # tokens that say a frame's time
VOCABULARY = 151_936
WORD = 399  # an id that stands for any word
WORDS = ["user assistant how many flashes which colour came first red green blue day night 0123456789"] * 4


@cache
def processor() -> KeyeProcessor:
    """A processor with the real special tokens, and as many others as Qwen3 has: their text does not matter."""
    tokenizer = train_tokenizer(WORDS, 400)
    tokenizer.add_tokens([f"word{i}" for i in range(VOCABULARY - len(tokenizer))])
    return KeyeProcessor(tokenizer)


def sample(meta: Meta) -> Sample:
    """A sample of the lengths and sizes of `meta`, without pixels; its last tokens are the labelled ones."""
    made = processor()
    image, video = made.token_id(IMAGE_PAD), made.token_id(VIDEO_PAD)
    words = meta.tokens - sum(height * width // 4 for height, width in [*meta.stills, *meta.frames])
    stamp = min(STAMP, words // max(1, len(meta.frames)))
    parts = [torch.full((height * width // 4,), image) for height, width in meta.stills]
    for height, width in meta.frames:
        parts += [torch.full((stamp,), WORD), torch.full((height * width // 4,), video)]
    parts.append(torch.full((words - stamp * len(meta.frames),), WORD))
    ids = torch.cat(parts)
    labels = ids.clone()
    labels[: max(1, len(ids) - meta.labels)] = -100
    labels[(ids == image) | (ids == video)] = -100
    grids = [torch.tensor([(1, *size) for size in sizes]).reshape(-1, 3) for sizes in (meta.stills, meta.frames)]
    blocks = [(token, grid[:, 1:] // 2) for token, grid in zip((image, video), grids, strict=True) if len(grid)]
    return Sample(
        input_ids=ids,
        labels=labels,
        position_ids=stream_positions(ids, blocks),
        image_grid_thw=grids[0] if len(grids[0]) else None,
        video_grid_thw=grids[1] if len(grids[1]) else None,
    )


def language_batch(metas: list[Meta], grid: ParallelDims) -> dict[str, Any]:
    """A pack as the loader hands it to a rank: all tokens, and the pixels that this rank encodes, as bytes."""
    row: dict[str, Any] = pack([sample(meta) for meta in metas], grid.sequence, processor().tokenizer.pad_token_id)
    kinds: dict[str, int] = {}
    for meta in metas:
        kinds[meta.kind] = kinds.get(meta.kind, 0) + meta.tokens
    names = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}
    grids = {name: row[name] for name in names if name in row}
    if grid.sequence == 1:
        row |= {names[name]: pixels(int(sizes.prod(1).sum())) for name, sizes in grids.items()}
    elif grids:
        share = vision_shares(torch.cat(list(grids.values())), grid.sequence)[grid.sequence_rank]
        row |= {"pixel_values_mine": pixels(4 * sum(piece.tokens for piece in share))} if share else {}
    return row | {"kinds": kinds}


def pair_batch(metas: list[Meta], text_length: int) -> dict[str, Any]:
    """Pairs of stage 0: stills without a limit but the processor's, and captions."""
    sizes = [[*meta.stills, *meta.frames] for meta in metas]
    grids = torch.tensor([(1, *size) for of_one in sizes for size in of_one])
    owners = torch.tensor([i for i, of_one in enumerate(sizes) for _ in of_one])
    captions = torch.full((len(metas), text_length), WORD)
    kinds = {"image": sum(meta.tokens for meta in metas)}
    values = pixels(int(grids.prod(1).sum()))
    return {
        "pixels": values, "grids": grids, "owners": owners, "captions": captions, "kinds": kinds,
    }  # fmt: skip


def pixels(patches: int) -> Tensor:
    return torch.empty(patches, 3, 14, 14, dtype=torch.uint8, device="meta")
