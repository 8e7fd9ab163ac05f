"""The projector: 2×2 neighbouring patches of a frame become one token of the language model."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keye.model import vision
from keye.model.rope import block_coordinates


class Projector(nn.Module):
    """2×2 neighbouring patches → one token of the language model (released name: mlp_AR)."""

    def __init__(self, vision_width: int, hidden_size: int) -> None:
        super().__init__()
        merged = 4 * vision_width
        self.pre_norm = nn.LayerNorm(merged, eps=1e-5)
        self.linear_1 = nn.Linear(merged, merged)
        self.linear_2 = nn.Linear(merged, hidden_size)
        self.gradient_checkpointing = False

    def forward(self, features: Tensor, grid_thw: Tensor | None, ordered: int = 0) -> Tensor:
        """features `[N, width]` → `[N / 4, hidden]`, in raster order of the merged grid; in chunks like the tower.

        Args:
            features: of patches in raster order, after the `ordered` ones.
            grid_thw: `[F, 3]`, without the `ordered` patches; None if there are no others.
            ordered: number of first features that are in `merge_order` already.
        """
        if torch.compiler.is_compiling() and not ordered:
            return self._project(features, grid_thw)
        recomputed = torch.is_grad_enabled() and self.gradient_checkpointing and self.training
        project = partial(checkpoint, self._project, use_reentrant=False) if recomputed else self._project
        found = [project(part, None) for part in features[:ordered].split(vision.FRAME_PATCHES)] if ordered else []
        if grid_thw is not None:
            chunked = recomputed or not torch.is_grad_enabled()
            run = partial(vision.in_chunks, self._project, recomputed=recomputed) if chunked else self._project
            found.append(run(features[ordered:], grid_thw))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _project(self, features: Tensor, grid_thw: Tensor | None) -> Tensor:
        if grid_thw is None:
            squares = features.unflatten(0, (-1, 4))
        else:
            squares = features[merge_order(grid_thw.to(features.device), len(features))]
        merged = squares.flatten(1)
        return self.linear_2(F.gelu(self.linear_1(self.pre_norm(merged))))


def merge_order(grid_thw: Tensor, total: int | None = None) -> Tensor:
    """Indices `[N / 4, 4]` of the patches of every 2×2 square: top-left, top-right, bottom-left, bottom-right.

    total: N if it is known, which avoids a synchronisation with the GPU.
    """
    heights, widths = grid_thw[:, 0] * grid_thw[:, 1], grid_thw[:, 2]
    row, column, block = block_coordinates(heights // 2, widths // 2, None if total is None else total // 4)
    first = ((heights * widths).cumsum(0) - heights * widths)[block]
    corner = first + 2 * row * widths[block] + 2 * column
    return torch.stack((corner, corner + 1, corner + widths[block], corner + widths[block] + 1), dim=1)
