"""Tiny models and random token streams for the parity bench and the tests of the model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keye import KeyeConfig, KeyeForConditionalGeneration
from keye.model.rope import stream_positions

VOCAB, IMAGE, VIDEO, WORDS = 300, 290, 291, 280

# A decoder of each family at the same small size; the scaled ones as their checkpoints have it.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3-yarn": {"model_type": "qwen3", "head_dim": 32, "rope_parameters": YARN},
    "qwen2": {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "llama": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    },
}
VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def family_config(name: str = "qwen3", **text: Any) -> KeyeConfig:
    """A Keye of two layers around a decoder of one of `FAMILIES`."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
    }
    config = {**sizes, **FAMILIES[name], **text}
    return KeyeConfig(vision_config=VISION, text_config=config, image_token_id=IMAGE, video_token_id=VIDEO)


def family_model(name: str = "qwen3", seed: int = 0, **text: Any) -> KeyeForConditionalGeneration:
    """The same with random weights, for evaluation."""
    torch.manual_seed(seed)
    return KeyeForConditionalGeneration(family_config(name, **text)).eval()


def words(count: int, generator: torch.Generator) -> Tensor:
    """Random text `[count]` without placeholders and without 0, the padding."""
    return torch.randint(1, WORDS, (count,), generator=generator)


def stream(parts: list[tuple[int, int, int]], seed: int, tail: int = 6) -> dict[str, Tensor]:
    """A stream of text, blocks (placeholder, rows, columns) with a word before each, and `tail` words."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [torch.cat((words(1, generator), torch.full((h * w,), pad))) for pad, h, w in parts]
    inputs = {"input_ids": torch.cat([words(4, generator), *blocks, words(tail, generator)])[None]}
    kinds = ((IMAGE, "pixel_values", "image_grid_thw"), (VIDEO, "pixel_values_videos", "video_grid_thw"))
    for pad, pixels, grids in kinds:
        grid = torch.tensor([[1, 2 * h, 2 * w] for kind, h, w in parts if kind == pad])
        if len(grid):
            inputs[grids] = grid
            inputs[pixels] = torch.randn(int(grid.prod(1).sum()), 3, 14, 14, generator=generator)
    return inputs


def frames(*sizes: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Blocks of video frames of these merged sizes."""
    return [(VIDEO, *size) for size in sizes]


def visual(streams: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The pixels and grids of several streams, one after another."""
    names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    return {n: torch.cat([s[n] for s in streams if n in s]) for n in names if any(n in s for s in streams)}


def padded(streams: list[dict[str, Tensor]], side: str) -> dict[str, Tensor]:
    """Streams as one batch with an attention mask, padded on `side`."""
    length = max(s["input_ids"].shape[1] for s in streams)
    ids, mask = (torch.zeros(len(streams), length, dtype=torch.long) for _ in range(2))
    for row, s in enumerate(streams):
        n = s["input_ids"].shape[1]
        at = slice(length - n, length) if side == "left" else slice(0, n)
        ids[row, at], mask[row, at] = s["input_ids"][0], 1
    return {"input_ids": ids, "attention_mask": mask, **visual(streams)}


def labels(ids: Tensor) -> Tensor:
    """Every word but no placeholder."""
    return ids.masked_fill((ids == VIDEO) | (ids == IMAGE), -100)


def packed(streams: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Streams as one packed row, without a label across documents."""
    rows = [s["input_ids"][0] for s in streams]
    kinds = ((IMAGE, "image_grid_thw"), (VIDEO, "video_grid_thw"))
    sizes = [[(pad, s[name][:, 1:] // 2) for pad, name in kinds if name in s] for s in streams]
    positions = [stream_positions(ids, blocks) for ids, blocks in zip(rows, sizes, strict=True)]
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat(positions, dim=1)[:, None],
        "shift_labels": torch.cat([F.pad(labels(ids)[1:], (0, 1), value=-100) for ids in rows])[None],
        "cu_seqlens": F.pad(torch.tensor([len(ids) for ids in rows]).cumsum(0), (1, 0)).int(),
        **visual(streams),
    }
