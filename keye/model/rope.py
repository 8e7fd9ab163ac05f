"""Rotary positions: 2-D for the vision tower, 3-D (time, height, width) for the language model.

Tables are built in float32 from a plain float base, so that moving a model to bfloat16, or loading it through the meta
device, cannot spoil them.
"""

from typing import Any

import torch
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[..., D]` by half-split tables of the same last size; computed in float32, returned in x's dtype.

    The tables are constants: nothing flows back into them.
    """
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """Its own backward: the rotation by the opposite angle, so that neither direction keeps x or makes a turned copy.

    Written out as products and a concatenation it takes three times as long, forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    x32 = x.float()
    turned = x32 * cos
    turned[..., :half].addcmul_(x32[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x32[..., :half], sin[..., half:])
    return turned.to(x.dtype)


def vision_tables(row: Tensor, column: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[N, 1, head_dim]` float32 of patches at `row`, `column` `[N]` of their frames.

    A quarter of the head turns with the row, a quarter with the column, and the half is repeated, as in
    the release (36 + 36 of 72).
    """
    frequency = theta ** -(torch.arange(0, head_dim // 2, 2, device=row.device).float() / (head_dim // 2))
    angle = torch.cat((row[:, None] * frequency, column[:, None] * frequency), dim=-1)
    return tuple(torch.cat((half, half), dim=-1)[:, None] for half in (angle.cos(), angle.sin()))


def block_coordinates(heights: Tensor, widths: Tensor, total: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and block number of every cell of blocks laid one after another in raster order.

    heights, widths: `[F]`. total: sum(heights * widths) where it is known, which spares a GPU the wait for it.
    Returns three LongTensors `[total]`.
    """
    sizes = heights * widths
    block = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes, output_size=total)
    offset = torch.arange(len(block), device=sizes.device) - (sizes.cumsum(0) - sizes)[block]
    width = widths[block]
    return offset // width, offset % width, block


def stream_positions(input_ids: Tensor, blocks: list[tuple[int, Tensor]]) -> Tensor:
    """3-D positions `[3, L]` of one token stream: text counts on, each image or frame is one block in time.

    A block that starts at s has T = s, H = s + row, W = s + column, and the next text token stands at the block's
    largest position + 1 (Qwen2-VL's rule with t = 1, as in vLLM's Keye).

    Args:
        input_ids: `[L]`.
        blocks: for each kind of placeholder, its token id and the merged sizes `[F, 2]` (rows, columns) of its blocks
            in the order of the stream.

    Raises:
        ValueError: the placeholders of a kind are not as many as its blocks' cells.
    """
    device = input_ids.device
    advance = torch.ones_like(input_ids)
    inside = torch.zeros(2, len(input_ids), dtype=torch.long, device=device)
    for token_id, sizes in blocks:
        places = (input_ids == token_id).nonzero(as_tuple=True)[0]
        cells = sizes[:, 0] * sizes[:, 1]
        if len(places) != int(cells.sum()):
            raise ValueError(f"{len(places)} placeholders of id {token_id}, but {int(cells.sum())} visual tokens")
        row, column, _ = block_coordinates(sizes[:, 0], sizes[:, 1])
        inside[0, places], inside[1, places] = row, column
        advance[places] = 0
        advance[places[cells.cumsum(0) - 1]] = sizes.amax(dim=1)
    start = advance.cumsum(0) - advance
    return torch.stack((start, start + inside[0], start + inside[1]))


class MultimodalRotary(nn.Module):
    """M-RoPE in the place of a transformers decoder's `rotary_emb`; text (T = H = W) equals the 1-D rotary exactly.

    Frequencies are dealt to (T, H, W) in contiguous sections of 16/24/24 of 64, scaled to the head (released config).
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        half = head_dim // 2
        time, height = round(half * 16 / 64), round(half * 24 / 64)
        self.sections = (time, height, half - time - height)
        self.head_dim, self.theta = head_dim, theta

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x gives dtype and device; position_ids `[3, B, L]` or `[B, L]`. Returns cos, sin `[B, L, head_dim]`."""
        if position_ids.ndim == 2:
            position_ids = position_ids.expand(3, *position_ids.shape)
        exponent = torch.arange(0, self.head_dim, 2, device=x.device).float() / self.head_dim
        frequencies = (1.0 / self.theta**exponent).split(self.sections)
        parts = [p.to(x.device)[..., None].float() * f for p, f in zip(position_ids, frequencies, strict=True)]
        angle = torch.cat(parts, dim=-1)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)
