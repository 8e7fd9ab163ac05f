"""Rotary positions: 2-D for the vision tower, 3-D (time, height, width) for the language model.

Tables are built in float32 from a Python float, so that moving a model to bfloat16, or loading it through the meta
device, does not change them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from keye.checkpoint.released_layout import mrope_section


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x `[..., D]` by half-split tables `[..., D]`; computed in float32, returned in x's dtype.

    The tables are constants: they get no gradients.
    """
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """Its backward pass is the rotation by the opposite angle, so that x is neither saved nor copied.

    As products and a concatenation it takes three times as long, forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    x32 = x.float()
    out = x32 * cos
    out[..., :half].addcmul_(x32[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x32[..., :half], sin[..., half:])
    # torch 2.11 compiles an autograd function that ends with a cast to the same dtype without its gradient.
    return out if out.dtype == x.dtype else out.to(x.dtype)


def vision_tables(row: Tensor, column: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[N, 1, head_dim]` float32 of patches at `row`, `column` `[N]` of their frames.

    The first quarter of the head rotates with the row, the second with the column, and this half is repeated, as in
    the release (36 + 36 of 72).
    """
    frequency = theta ** -(torch.arange(0, head_dim // 2, 2, device=row.device).float() / (head_dim // 2))
    angle = torch.cat((row[:, None] * frequency, column[:, None] * frequency), dim=-1)
    return tuple(torch.cat((half, half), dim=-1)[:, None] for half in (angle.cos(), angle.sin()))


def block_coordinates(heights: Tensor, widths: Tensor, total: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and block number of every cell of consecutive blocks in raster order.

    Args:
        heights, widths: `[F]`.
        total: sum(heights * widths) if it is known, which avoids a synchronisation with the GPU.

    Returns:
        Three LongTensors `[total]`.
    """
    sizes = heights * widths
    block = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes, output_size=total)
    offset = torch.arange(len(block), device=sizes.device) - (sizes.cumsum(0) - sizes)[block]
    width = widths[block]
    return offset // width, offset % width, block


def stream_positions(input_ids: Tensor, blocks: list[tuple[int, Tensor]]) -> Tensor:
    """3-D positions `[3, L]` of one token stream: text counts on, each image or frame is one block in time.

    A block that starts at s has T = s, H = s + row, W = s + column, and the next text token has the block's largest
    position + 1 (Qwen2-VL's rule with t = 1, as in vLLM's Keye).

    Args:
        input_ids: `[L]`.
        blocks: for each kind of placeholder, its token id and the merged sizes `[F, 2]` (rows, columns) of its blocks
            in the order of the stream.

    Raises:
        ValueError: the number of placeholders of a kind differs from the cells of its blocks, or text is inside a
            block.
    """
    device = input_ids.device
    advance = torch.ones_like(input_ids, dtype=torch.long)
    inside = torch.zeros(2, len(input_ids), dtype=torch.long, device=device)
    for token_id, sizes in blocks:
        places = (input_ids == token_id).nonzero(as_tuple=True)[0]
        cells = sizes[:, 0] * sizes[:, 1]
        if len(places) != int(cells.sum()):
            raise ValueError(f"{len(places)} placeholders of id {token_id}, but {int(cells.sum())} visual tokens")
        last = cells.cumsum(0) - 1
        if bool((places[last] - places[last - cells + 1] != cells - 1).any()):
            raise ValueError(f"the placeholders of id {token_id} are not in blocks of the given sizes")
        row, column, _ = block_coordinates(sizes[:, 0], sizes[:, 1])
        inside[0, places], inside[1, places] = row, column
        advance[places] = 0
        advance[places[last]] = sizes.amax(dim=1)
    start = advance.cumsum(0) - advance
    return torch.stack((start, start + inside[0], start + inside[1]))


def batch_positions(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    blocks: list[tuple[int, Tensor]],
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Positions `[3, B, L]`, each row or packed document counted from its own first token; 0 at padding.

    Args:
        input_ids: `[B, L]`.
        attention_mask: `[B, L]`, 0 on the padding of either side.
        blocks: as in `stream_positions`, over all rows in order.
        cu_seqlens: `[D + 1]` bounds of the documents of one packed row (B = 1, no mask).
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    positions = input_ids.new_zeros(3, *input_ids.shape, dtype=torch.long)
    counts = real.sum(dim=1) if cu_seqlens is None else cu_seqlens.to(input_ids.device).diff()
    if len(stream := input_ids[real]):
        # All rows as one stream; the position at the start of each row or document is then subtracted.
        together = stream_positions(stream, blocks)
        first = (counts.cumsum(0) - counts).clamp(max=len(stream) - 1)
        positions[:, real] = together - together[0, first].repeat_interleave(counts)
    return positions


class MultimodalRotary(nn.Module):
    """M-RoPE in place of a transformers decoder's `rotary_emb`; text (T = H = W) equals the 1-D rotary exactly.

    Args:
        own: the class that it replaces, which computes frequencies from a config.
        frequencies: float32 `[head_dim / 2]`, the decoder's own, of any base and scaling.
        scale: factor of cosines and sines (YaRN's attention factor; otherwise 1).
        sections: how many frequencies rotate with (T, H, W), in this order; by default 16/24/24 of 64, scaled to the
            head (released config).
    """

    def __init__(
        self, own: type[nn.Module], frequencies: Tensor, scale: float = 1.0, sections: list[int] | None = None
    ) -> None:
        super().__init__()
        self.own = own
        self.sections = list(sections or mrope_section(2 * len(frequencies)))
        # A plain attribute: neither `model.to(torch.bfloat16)` nor loading through the meta device changes it.
        self.frequencies, self.scale = frequencies, scale

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids `[3, B, L]` or `[B, L]` → cos, sin `[B, L, head_dim]`, in the dtype and on the device of x."""
        if position_ids.ndim == 2:
            position_ids = position_ids.expand(3, *position_ids.shape)
        frequencies = self.frequencies.to(x.device, non_blocking=True).split(self.sections)
        parts = [p.to(x.device)[..., None].float() * f for p, f in zip(position_ids, frequencies, strict=True)]
        angle = torch.cat(parts, dim=-1)
        angle = torch.cat((angle, angle), dim=-1)
        return (angle.cos() * self.scale).to(x.dtype), (angle.sin() * self.scale).to(x.dtype)
