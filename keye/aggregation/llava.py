"""SlowFast-LLaVA over LLaVA models of transformers, training-free or trained, in `forward` as in `generate`.

    reader = AggregatedLlava(model)                                     # a LLaVA-NeXT: as released, 10 slow frames
    pixels = reader.pixels(frames, processor.image_processor)           # frames uint8 [T, 3, H, W]
    reader.generate([input_ids], [pixels], max_new_tokens=128)          # one placeholder in the ids for each video

LLaVA 1.5, LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision are supported: a tower of square pictures, a projector and a
decoder. The tokens of a video are the projector's; the poolings and separators of the models' own video paths are not
used. The release doubles the context of its LLaVA-NeXT by dynamic RoPE scaling; set that in the model's config.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from keye.aggregation.pathways import SlowFastAggregation
from keye.errors import KeyeError
from keye.slowfast.resizing import resize

CHUNK = 16
"""Frames that are encoded together."""


class AggregatedLlava:
    """A LLaVA model that reads aggregated videos.

    Args:
        model: `LlavaNextForConditionalGeneration` or one of its kind; it is used, not changed.
        aggregation: `SlowFastAggregation.released()` if None.

    Raises:
        KeyeError: the model has no tower, projector or placeholder.
    """

    def __init__(self, model: nn.Module, aggregation: SlowFastAggregation | None = None) -> None:
        inner = getattr(model, "model", None)
        if not all(hasattr(inner, name) for name in ("vision_tower", "multi_modal_projector")):
            raise KeyeError(f"{type(model).__name__} has no vision_tower and multi_modal_projector; give a LLaVA model")
        self.model, self.tower, self.projector = model, inner.vision_tower, inner.multi_modal_projector
        self.aggregation = SlowFastAggregation.released() if aggregation is None else aggregation
        config = model.config
        token = getattr(config, "video_token_id", None)
        self.placeholder: int = config.image_token_id if token is None else token
        self.side: int = config.vision_config.image_size
        self.grid: int = self.side // config.vision_config.patch_size

    def pixels(self, frames: Tensor, image_processor: Any) -> Tensor:
        """Frames uint8 `[T, 3, H, W]` → `[T, 3, side, side]` normalised, with the aspect squeezed as in the release.

        Args:
            frames: of any size.
            image_processor: the model's; its `image_mean` and `image_std` are used.

        Raises:
            KeyeError: frames of another type or shape, or none.
        """
        if not isinstance(frames, Tensor) or frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
            found = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, Tensor) else type(frames).__name__
            raise KeyeError(f"frames are {found}; give a tensor torch.uint8 [T, 3, H, W] with values 0 to 255")
        if not len(frames):
            raise KeyeError("a video without frames has no tokens; give one frame or more")
        squared = torch.cat([resize(frame[None], (self.side, self.side), "bicubic") for frame in frames])
        mean, std = (torch.tensor(getattr(image_processor, name)) for name in ("image_mean", "image_std"))
        return (squared.float() / 255 - mean[:, None, None]) / std[:, None, None]

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels `[T, 3, side, side]` → the projector's tokens `[T, grid, grid, hidden]`; each frame is encoded once.

        Raises:
            KeyeError: the tower gives another number of tokens than its grid has.
        """
        config, found = self.model.config, []
        layers = config.vision_feature_layer
        for chunk in pixels.to(self.model.device, self.model.dtype).split(CHUNK):
            states = self.tower(chunk, output_hidden_states=True).hidden_states
            chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
            features = torch.cat(chosen, dim=-1)
            features = features[:, 1:] if config.vision_feature_select_strategy == "default" else features
            if features.shape[1] != self.grid**2:
                raise KeyeError(
                    f"the tower gives {features.shape[1]} tokens for a grid of {self.grid}x{self.grid}; set "
                    "vision_feature_select_strategy to 'default' for towers with a class token, else to 'full'"
                )
            found.append(self.projector(features).unflatten(1, (self.grid, self.grid)))
        return torch.cat(found)

    def inputs(
        self,
        input_ids: Sequence[Tensor],
        videos: Sequence[Tensor],
        labels: Sequence[Tensor] | None = None,
        padding_side: str = "right",
    ) -> dict[str, Tensor]:
        """Embeddings of a padded batch, with the tokens of each video in place of its placeholder.

        Args:
            input_ids: rows `[L]`, with one placeholder for each video.
            videos: pixels `[T, 3, side, side]` of all videos, in the order of the placeholders.
            labels: rows `[L]`, −100 where there is no loss.
            padding_side: "right" or "left".

        Returns:
            inputs_embeds `[B, L', hidden]`, attention_mask `[B, L']` and, if given, labels `[B, L']`; −100 at videos.

        Raises:
            KeyeError: more or fewer placeholders than videos, or labels of another shape than the ids.
        """
        if isinstance(input_ids, Tensor) and input_ids.ndim != 2:
            raise KeyeError(f"input_ids have the shape {list(input_ids.shape)}; give a list of rows, [ids]")
        if labels is not None and [len(row) for row in labels] != [len(row) for row in input_ids]:
            raise KeyeError("labels have other lengths than the ids; give a label for each id, -100 where no loss is")
        places = sum(int((row == self.placeholder).sum()) for row in input_ids)
        if places != len(videos):
            raise KeyeError(
                f"the ids have {places} placeholders ({self.placeholder}) for {len(videos)} videos; write one for each"
            )
        left, device = iter(videos), self.model.device
        rows, targets = [], []
        for row, ids in enumerate(input_ids):
            ids = ids.to(device)
            embeds = self.model.get_input_embeddings()(ids)
            wanted = torch.full_like(ids, -100) if labels is None else labels[row].to(device)
            parts, kept, start = [], [], 0
            for place in [*(ids == self.placeholder).nonzero()[:, 0].tolist(), len(ids)]:
                parts.append(embeds[start:place])
                kept.append(wanted[start:place])
                if place < len(ids):
                    tokens = self.aggregation(self.encode(next(left))).to(embeds)
                    parts.append(tokens)
                    kept.append(wanted.new_full((len(tokens),), -100))
                start = place + 1
            rows.append(torch.cat(parts))
            targets.append(torch.cat(kept))

        def padded(values: list[Tensor], fill: float) -> Tensor:
            return nn.utils.rnn.pad_sequence(values, True, fill, padding_side)

        mask = padded([torch.ones(len(row), dtype=torch.long, device=device) for row in rows], 0)
        batch = {"inputs_embeds": padded(rows, 0.0), "attention_mask": mask}
        return batch if labels is None else {**batch, "labels": padded(targets, -100)}

    def forward(
        self,
        input_ids: Sequence[Tensor],
        videos: Sequence[Tensor],
        labels: Sequence[Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """The model's output for `inputs`, with its loss if labels are given; differentiable."""
        return self.model(**self.inputs(input_ids, videos, labels), **options)

    __call__ = forward

    @torch.no_grad()
    def generate(self, input_ids: Sequence[Tensor], videos: Sequence[Tensor], **options: Any) -> Tensor:
        """New tokens `[B, n]`; the options are those of the model's `generate`."""
        return self.model.generate(**self.inputs(input_ids, videos, padding_side="left"), **options)
