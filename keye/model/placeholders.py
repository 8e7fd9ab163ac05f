"""Visual features in place of the placeholders of a token stream."""

import torch
from torch import Tensor


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
    count, total = int(stills.sum()), int(places.sum())
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
