"""Keye's part of `generate`: 3-D positions, and visual features that are computed once and follow their row.

The tower runs once, before the prompt is copied for beams or several answers, and only over the frames that are not in
the cache yet: to continue a conversation from its cache, give all its ids and pixels again.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from keye.aggregation.blocks import aggregate, block_tokens, needed_blocks, whole_frames

PIXELS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "video_blocks")
# Pixels kept for an assistant model, under names that `generate` does not copy for beams and can split in chunks.
_KEPT = {f"_{name}": name for name in PIXELS}

CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""The name of a decoder's cache in arguments and outputs of transformers: `cache` from 5.24 on."""


class KeyeGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model with `encode_vision`, `positions` and the config's two placeholder ids."""

    def _ids(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor | None:
        """Ids `[B, L]` of the prompt; only those of the placeholders if it is given as embeddings."""
        if inputs_embeds is not None and (input_ids is None or input_ids.shape[1] == 0):
            return self.model.placeholders(inputs_embeds)
        return input_ids

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Positions `[3, B, L]` of the complete prompt, including the cached part."""
        given = inputs_tensor if inputs_tensor.ndim == 2 else model_kwargs.get("input_ids")
        input_ids = self._ids(model_kwargs.get("input_ids", given), model_kwargs.get("inputs_embeds"))
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE)
        cached = 0 if cache is None else int(cache.get_seq_length())
        if cached and max(input_ids.shape[1], 0 if mask is None else mask.shape[1]) != input_ids.shape[1]:
            raise ValueError("to continue from a cache, give input_ids and pixels of the complete conversation")
        grids = (model_kwargs.get("image_grid_thw"), model_kwargs.get("video_grid_thw"))
        return self.positions(input_ids, mask, *grids, video_blocks=model_kwargs.get("video_blocks"))

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Copy every row `expand_size` times; pixels become features first, so that a frame is encoded once."""
        pixels = {name: value for name in PIXELS if (value := model_kwargs.pop(name, None)) is not None}
        positions = model_kwargs.pop("position_ids", None)
        features = {}
        if pixels:
            ids = self._ids(input_ids, model_kwargs.get("inputs_embeds"))
            cache = model_kwargs.get(CACHE)
            cached = 0 if cache is None else int(cache.get_seq_length())
            features = {"visual_features": self._uncached_features(ids, cached, expand_size, **pixels)}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if positions is not None:
            model_kwargs["position_ids"] = positions.repeat_interleave(expand_size, dim=positions.ndim - 2)
        kept = {f"_{name}": value for name, value in pixels.items()} if expand_size == 1 else {}
        return input_ids, model_kwargs | features | kept

    def _uncached_features(
        self,
        input_ids: Tensor,
        cached: int,
        copies: int,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        video_blocks: Tensor | None = None,
    ) -> Tensor:
        """Features `[V, hidden]`, stills then frames, of the placeholders of `input_ids[:, cached:]`, rows copied."""
        config, device = self.config, self.device
        kinds = (
            (config.image_token_id, pixel_values, image_grid_thw, None),
            (config.video_token_id, pixel_values_videos, video_grid_thw, video_blocks),
        )
        kinds = [kind for kind in kinds if kind[1] is not None and kind[2] is not None]
        pixels, grids, rows, read, of_kind = [], [], [], [], {}
        for token_id, patches, grid, blocks in kinds:
            row, column = (x.to(device) for x in (input_ids == token_id).nonzero(as_tuple=True))
            grid = grid.to(device, torch.long)
            parts = whole_frames(grid[:, 1:] // 2) if blocks is None else blocks.to(device)
            part = torch.repeat_interleave(torch.arange(len(parts), device=device), block_tokens(parts))
            if len(part) != len(row):
                raise ValueError(f"{len(row)} placeholders of id {token_id}, but {len(part)} visual tokens")
            uncached = column >= cached
            needed = torch.zeros(len(parts), dtype=torch.bool, device=device).index_fill_(0, part[uncached], True)
            if blocks is not None and config.vision_config.motion is not None and needed.any():
                needed[:] = True  # a motion pathway reads complete clips
            encoded, kept = needed_blocks(parts, needed, len(grid))
            pixels.append(patches.to(device)[encoded.repeat_interleave(grid.prod(dim=1))])
            grids.append(grid[encoded])
            rows.append(row[uncached])
            read.append((blocks is not None and len(kept) > 0, kept, uncached[needed[part]]))
            of_kind[token_id] = grids[-1], None if blocks is None else parts
        if not sum(map(len, grids)):
            return torch.zeros(0, config.text_config.hidden_size, dtype=self.dtype, device=device)
        stills, _ = of_kind.get(config.image_token_id, (None, None))
        frames, all_blocks = of_kind.get(config.video_token_id, (None, None))
        clips = self.clips(stills, frames, all_blocks)  # a motion pathway encodes all frames or none
        extra = {} if clips is None else {"clips": clips}
        encoded_parts = self.encode_vision(torch.cat(pixels), torch.cat(grids), **extra)
        found = []
        sizes = [int(grid.prod(dim=1).sum()) // 4 for grid in grids]
        for part, grid, row, (pooled, kept, wanted) in zip(encoded_parts.split(sizes), grids, rows, read, strict=True):
            tokens = aggregate(part, grid[:, 1:] // 2, kept) if pooled else part
            found.append(_copy_rows(tokens[wanted], row, copies))
        return torch.cat(found)

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Like transformers'; in chunks (`prefill_chunk_size`), each gets the features of its own placeholders.

        The loop is our own: that of 5.17 splits 3-D positions along the wrong axis, and none splits embeddings.
        """
        size = generation_config.prefill_chunk_size
        if size is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        cache, embeds = model_kwargs.get(CACHE), model_kwargs.get("inputs_embeds")
        if cache is None:
            raise ValueError("prefill_chunk_size needs a cache: leave use_cache at True")
        embeds = embeds if is_first_iteration else None
        prompt = self._ids(input_ids, embeds)
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        features = model_kwargs.get("visual_features")
        outputs = None
        for start in range(int(cache.get_seq_length()), prompt.shape[1], size):
            stop = min(start + size, prompt.shape[1])
            part = {
                "attention_mask": None if mask is None else mask[:, :stop],
                "position_ids": None if positions is None else positions[..., start:stop],
                "inputs_embeds": None if embeds is None else embeds[:, start:stop],
            }
            if features is not None:
                part["visual_features"] = self._features_of_chunk(prompt, features, start, stop)
            inputs = self.prepare_inputs_for_generation(
                prompt[:, start:stop], is_first_iteration=True, **{**model_kwargs, CACHE: cache, **part}
            )
            outputs = self(**inputs, return_dict=True)
            cache = outputs[CACHE]
        model_kwargs[CACHE] = cache
        return outputs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The model's inputs of one step; pixels and features go with the prompt, without a cache with every step."""
        visual = {name: kwargs.pop(name) for name in (*PIXELS, "visual_features") if name in kwargs}
        for name in _KEPT:
            kwargs.pop(name, None)
        cache = kwargs.get(CACHE)
        # `generate` does not mark an assistant model's prompt as a first iteration, but its cache is empty.
        first = is_first_iteration or not kwargs.get("use_cache", True)
        if not first and visual and next_sequence_length != 1:
            first = cache is None or int(cache.get_seq_length()) == 0
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        return inputs | (visual if first else {})

    def _features_of_chunk(self, prompt: Tensor, features: Tensor, start: int, stop: int) -> Tensor:
        """The features of the placeholders in `prompt[:, start:stop]`, in their order.

        `features` are those of the prompt's last placeholders of each kind; the others are in the cache.
        """
        places = [prompt == self.config.image_token_id, prompt == self.config.video_token_id]
        column = torch.arange(prompt.shape[1], device=prompt.device).expand_as(prompt)
        cached = torch.zeros_like(column, dtype=torch.bool)
        total = sum(int(place.sum()) for place in places)
        if total != len(features):  # cached placeholders have no features here: find where the cache ends
            counts = torch.stack(places).any(dim=0).sum(dim=0).flip(0).cumsum(0).flip(0)
            cached = column < int((counts > len(features)).sum())
        chosen = [((column >= start) & (column < stop))[place & ~cached] for place in places]
        return features[torch.cat(chosen).to(features.device)]

    def _get_candidate_generator(
        self, *args: Any, assistant_model: Any = None, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """An assistant model of the same kind gets the pixels; a text-only one gets ids."""
        own = {"visual_features", *_KEPT, *PIXELS}
        kept = {name: value for name, value in model_kwargs.items() if name not in own}
        if isinstance(assistant_model, KeyeGenerationMixin):
            kept |= {name: model_kwargs[key] for key, name in _KEPT.items() if key in model_kwargs}
        elif assistant_model is not None:
            kept.pop("position_ids", None)
        return super()._get_candidate_generator(*args, assistant_model=assistant_model, model_kwargs=kept, **kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, num_new_tokens: int = 1, **more: Any
    ) -> dict[str, Any]:
        """A new token has the largest position so far plus one: a prompt may end with a frame."""
        positions = model_kwargs.pop("position_ids", None)
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, num_new_tokens=num_new_tokens, **more
        )
        if positions is not None:
            axes = (0, 2) if positions.ndim == 3 else (1,)
            steps = torch.arange(1, num_new_tokens + 1, device=positions.device)
            following = positions.amax(dim=axes, keepdim=True) + steps
            following = following.expand(*positions.shape[:-1], num_new_tokens)
            model_kwargs["position_ids"] = torch.cat((positions, following), dim=-1)
        return model_kwargs


def _copy_rows(features: Tensor, row: Tensor, copies: int) -> Tensor:
    """Features `[V, hidden]` of rows 0, 1, … (`row [V]`, ascending) → each row's features repeated `copies` times."""
    if copies == 1 or not len(features):
        return features
    sizes = torch.unique_consecutive(row, return_counts=True)[1].tolist()
    return torch.cat([part.repeat(copies, 1) for part in features.split(sizes)])
