"""Visual features in place of the placeholders of a token stream, and the aggregation of frames before that."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from keye.aggregation.blocks import aggregate
from keye.errors import KeyeError


def read_grids(grid_thw: Tensor | None, blocks: Tensor | None = None) -> Tensor | None:
    """Rows and columns `[K, 2]` of tokens of each image or block of a video; None without a grid.

    Args:
        grid_thw: `[F, 3]` in patches, of images or of encoded frames.
        blocks: `[K, 5]` of `keye.aggregation.blocks`; without them each encoded frame is read as it is.
    """
    if blocks is not None:
        return blocks[:, 2:4]
    return None if grid_thw is None else grid_thw[:, 1:] // 2


@torch.compiler.disable  # the blocks are read on the host: a graph breaks here
def read_tokens(features: Tensor, image_grid_thw: Tensor | None, video_grid_thw: Tensor, blocks: Tensor) -> Tensor:
    """Tokens `[N, hidden]` of all images and encoded frames → those that are read, `[V, hidden]`, images first.

    Args:
        features: the output of `encode_vision`, images first.
        image_grid_thw, video_grid_thw: `[F, 3]` in patches.
        blocks: `[K, 5]`, of all videos.
    """
    images = 0 if image_grid_thw is None else int(image_grid_thw.prod(1).sum()) // 4
    frames = aggregate(features[images:], video_grid_thw[:, 1:] // 2, blocks)
    return torch.cat((features[:images], frames)) if images else frames


def refuse_parts(frame_parts: Sequence[object], exchange: Callable[[Tensor], Tensor] | None) -> None:
    """Raise KeyeError where the frames of a video are divided among ranks, so that no rank can aggregate them."""
    if frame_parts or exchange is not None:
        raise KeyeError(
            "aggregation and a motion pathway need all frames of a video on one rank, and sequence parallelism divides "
            "them; set sequence_parallel = 1, or remove processor.encoder.aggregation and vision_config.motion"
        )


def fill_placeholders(
    input_ids: Tensor, embeds: Tensor, features: Tensor | None, placeholder_ids: tuple[int, int]
) -> Tensor:
    """Embeddings `[B, L, hidden]` with visual features in place of the placeholders, in stream order.

    Args:
        input_ids: `[B, L]`.
        embeds: `[B, L, hidden]`, of the words.
        features: `[V, hidden]`, those of images, then those of frames: each kind fills its own placeholders.
        placeholder_ids: of images and of frames.

    Raises:
        ValueError: the number of placeholders differs from the number of features.
    """
    if features is None and input_ids.shape[1] == 1:
        return embeds  # a step of generation: do not wait for the device to count placeholders
    stills, frames = (input_ids == token_id for token_id in placeholder_ids)
    places = stills | frames
    if torch.compiler.is_compiling():  # a graph cannot count placeholders: it fills all of them
        return embeds if features is None else _filled(embeds, stills, frames, features)
    count, total = torch.stack((stills.sum(), places.sum())).tolist()  # the device is waited for once
    given = 0 if features is None else len(features)
    if total != given:
        raise ValueError(
            f"{total} placeholders in the text, but {given} visual tokens: "
            "prepare text and pixels with one call of the processor"
        )
    if features is None:
        return embeds
    if 0 < count < total:
        is_still = stills[places]
        features = features[torch.where(is_still, is_still.cumsum(0) - 1, count + (~is_still).cumsum(0) - 1)]
    return embeds.masked_scatter(places[..., None], features.to(embeds.device, embeds.dtype))


def _filled(embeds: Tensor, stills: Tensor, frames: Tensor, features: Tensor) -> Tensor:
    """`fill_placeholders` in operations whose shapes do not depend on the ids."""
    order = torch.where(stills.flatten(), stills.flatten().cumsum(0), stills.sum() + frames.flatten().cumsum(0)) - 1
    rows = features.to(embeds.device, embeds.dtype)[order.clamp(0, features.shape[0] - 1)]
    return torch.where((stills | frames)[..., None], rows.view_as(embeds), embeds)
