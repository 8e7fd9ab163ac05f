"""Our model and transformers' Qwen2.5-VL of the same widths, depth, heads and vocabulary, and one stream for both.

Qwen2.5-VL's vision MLPs are gated: theirs are two thirds as wide inside, so that both towers take the same number of
operations. Its frames are not merged in time (temporal_patch_size 1) and every vision layer sees the whole frame, so
that both have the same patches, the same visual tokens and the same attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.model.projector import merge_order
from scripts.bench.model.layers import gated_width

VISION_START, VIDEO, ANSWER, TIMESTAMP = 1, 2, 32, 4
SIZES = {
    "tiny": ((96, 384, 3, 4), (128, 384, 4, 4, 2, 2048)),
    "middle": ((384, 1536, 6, 6), (512, 1536, 8, 8, 4, 8192)),
}
"""(vision width, MLP, layers, heads), (text width, MLP, layers, heads, key heads, vocabulary)."""


def our_config(name: str) -> KeyeConfig:
    """A Keye of one of `SIZES`."""
    (width, mlp, depth, heads), (hidden, inner, layers, queries, keys, vocab) = SIZES[name]
    return KeyeConfig(
        vision_config={
            "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": depth, "num_attention_heads": heads,
        },
        text_config={
            "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": hidden // queries,
            "vocab_size": vocab, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "use_sliding_window": False, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
        },
        video_token_id=VIDEO,
        image_token_id=VIDEO + 1,
    )  # fmt: skip


def their_config(name: str) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL of the same shapes."""
    (width, mlp, depth, heads), (hidden, inner, layers, queries, keys, vocab) = SIZES[name]
    half = hidden // queries // 2
    sections = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
    return Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": width, "intermediate_size": gated_width(mlp), "depth": depth, "num_heads": heads,
            "out_hidden_size": hidden, "temporal_patch_size": 1, "fullatt_block_indexes": list(range(depth)),
        },
        text_config={
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": queries, "num_key_value_heads": keys, "vocab_size": vocab,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        },
        video_token_id=VIDEO,
        image_token_id=VIDEO + 1,
        vision_start_token_id=VISION_START,
        tie_word_embeddings=False,
    )  # fmt: skip


def models(name: str) -> dict[str, nn.Module]:
    """Both with random weights in float32; attention as each sets it itself on this machine, sdpa on a CPU."""
    torch.manual_seed(0)
    theirs = Qwen2_5_VLForConditionalGeneration._from_config(their_config(name), attn_implementation="sdpa")
    return {"ours": KeyeForConditionalGeneration(our_config(name)), "Qwen2.5-VL": theirs}


@dataclass(frozen=True)
class Batch:
    """One stream of a video for both models: inputs of each, and how many tokens it has."""

    inputs: dict[str, dict[str, Tensor]]
    tokens: int
    visual: int


def batch(pixel_values: Tensor, grid_thw: Tensor, vocab: int) -> Batch:
    """Text, then a timestamp and the placeholders of every frame, then a question and an answer with labels.

    pixel_values: `[N, 3, 14, 14]` in raster order, grid_thw `[F, 3]`. Theirs come in the order of their 2×2 squares.
    """
    draw = torch.Generator().manual_seed(0)
    counts = (grid_thw[:, 1] * grid_thw[:, 2] // 4).tolist()
    text = lambda n: torch.randint(8, vocab, (n,), generator=draw)  # noqa: E731
    frames = [part for n in counts for part in (text(TIMESTAMP), torch.full((n,), VIDEO))]
    ids = torch.cat([text(12), *frames, text(20), text(ANSWER)])[None]
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    shared = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "video_grid_thw": grid_thw, "labels": labels}
    squares = merge_order(grid_thw, len(pixel_values)).flatten()
    theirs = {"pixel_values_videos": pixel_values[squares].flatten(1), "mm_token_type_ids": 2 * (ids == VIDEO).int()}
    ours = {"pixel_values_videos": pixel_values}
    return Batch({"ours": shared | ours, "Qwen2.5-VL": shared | theirs}, ids.shape[1], sum(counts))
