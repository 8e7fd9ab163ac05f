"""The native-resolution vision tower: SigLIP's layers over any frame sizes, with interpolated positions and 2-D RoPE.

Parameter names are SigLIP's, so that its weights load as they are. Frames of all sizes run in one packed call; each
frame is a segment of its own (as in the release).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keye.model.attention import varlen
from keye.model.config import KeyeVisionConfig
from keye.model.rope import block_coordinates, rotate, vision_tables


class VisionEmbeddings(nn.Module):
    """Patches → vectors, plus the learned position table read bilinearly at the frame's own size."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.grid = config.position_grid
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding(self.grid**2, config.hidden_size)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """pixel_values `[N, 3, P, P]`, grid_thw `[F, 3]` → `[N, width]`."""
        weight = self.patch_embedding.weight
        patches = F.linear(pixel_values.flatten(1).to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)
        table = self.position_embedding.weight.T.unflatten(1, (self.grid, self.grid))[None].float()
        sizes = [tuple(row) for row in grid_thw.tolist()]
        positions = {size: self._interpolate(table, size) for size in set(sizes)}
        return patches + torch.cat([positions[size] for size in sizes]).to(patches.dtype)

    @staticmethod
    def _interpolate(table: Tensor, size: tuple[int, int, int]) -> Tensor:
        frames, height, width = size
        resized = F.interpolate(table, (height, width), mode="bilinear", align_corners=False)
        return resized[0].flatten(1).T.repeat(frames, 1)


class VisionAttention(nn.Module):
    """Bidirectional attention inside each frame."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, cu_seqlens: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if tables is not None:
            q, k = rotate(q, *tables), rotate(k, *tables)
        return self.out_proj(varlen(q, k, v, cu_seqlens, False).flatten(1))


class VisionMLP(nn.Module):
    """Two linear layers with the tanh GELU."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm1, self.layer_norm2 = norm(), norm()
        self.self_attn, self.mlp = VisionAttention(config), VisionMLP(config)

    def forward(self, x: Tensor, cu_seqlens: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), cu_seqlens, tables)
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    """The stack of layers (a module of its own so that names are SigLIP's)."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class KeyeVisionModel(nn.Module):
    """Patches of any number of frames or images → one feature a patch."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """pixel_values `[N, 3, 14, 14]` in raster order, grid_thw `[F, 3]` rows (1, h, w) in patches → `[N, width]`."""
        x = self.embeddings(pixel_values, grid_thw)
        sizes = (grid_thw[:, 1] * grid_thw[:, 2]).repeat_interleave(grid_thw[:, 0])
        cu_seqlens = F.pad(sizes.cumsum(0), (1, 0))
        heads = self.config.num_attention_heads
        tables = None
        if self.config.rotary:
            tables = vision_tables(grid_thw, self.config.hidden_size // heads, self.config.rope_theta)
        for layer in self.encoder.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, cu_seqlens, tables, use_reentrant=False)
            else:
                x = layer(x, cu_seqlens, tables)
        return self.post_layernorm(x)


class Projector(nn.Module):
    """2×2 neighbouring patches → one token of the language model (released name: mlp_AR)."""

    def __init__(self, vision_width: int, hidden_size: int) -> None:
        super().__init__()
        merged = 4 * vision_width
        self.pre_norm = nn.LayerNorm(merged, eps=1e-5)
        self.linear_1 = nn.Linear(merged, merged)
        self.linear_2 = nn.Linear(merged, hidden_size)

    def forward(self, features: Tensor, grid_thw: Tensor) -> Tensor:
        """features `[N, width]` → `[N / 4, hidden]`, in raster order of the merged grid."""
        merged = features[merge_order(grid_thw)].flatten(1)
        return self.linear_2(F.gelu(self.linear_1(self.pre_norm(merged))))


def merge_order(grid_thw: Tensor) -> Tensor:
    """Indices `[N / 4, 4]` of the patches of every 2×2 square: top-left, top-right, bottom-left, bottom-right."""
    heights, widths = grid_thw[:, 0] * grid_thw[:, 1], grid_thw[:, 2]
    row, column, block = block_coordinates(heights // 2, widths // 2)
    first = ((heights * widths).cumsum(0) - heights * widths)[block]
    corner = first + 2 * row * widths[block] + 2 * column
    return torch.stack((corner, corner + 1, corner + widths[block], corner + widths[block] + 1), dim=1)
