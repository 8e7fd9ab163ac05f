"""What `generate` must know of Keye: 3-D positions, and visual features that are made once and follow their row.

The tower runs once, before the prompt is copied for beams or several answers, and only over the frames that the cache
does not hold yet: a conversation goes on from its cache by giving the whole of it again, ids and pixels.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

PIXELS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


class KeyeGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model with `encode_vision`, `positions` and the config's two placeholder ids."""

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Positions `[3, B, L]` of the whole prompt, also of what the cache holds."""
        input_ids = model_kwargs.get("input_ids", inputs_tensor)
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:  # a prompt of embeddings alone is text
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        cached = 0 if cache is None else int(cache.get_seq_length())
        if cached and max(input_ids.shape[1], 0 if mask is None else mask.shape[1]) != input_ids.shape[1]:
            raise ValueError("to go on from a cache, give input_ids and pixels of the whole conversation")
        return self.positions(input_ids, mask, model_kwargs.get("image_grid_thw"), model_kwargs.get("video_grid_thw"))

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Copy every row `expand_size` times; pixels become features here, so that the tower sees each frame once."""
        pixels = {name: model_kwargs.pop(name, None) for name in PIXELS}
        positions = model_kwargs.pop("position_ids", None)
        features = None
        if input_ids is not None and any(value is not None for value in pixels.values()):
            cache = model_kwargs.get("past_key_values")
            cached = 0 if cache is None else int(cache.get_seq_length())
            features = self._fresh_features(input_ids, cached, expand_size, **pixels)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if positions is not None:
            model_kwargs["position_ids"] = positions.repeat_interleave(expand_size, dim=positions.ndim - 2)
        return input_ids, model_kwargs | ({} if features is None else {"visual_features": features})

    def _fresh_features(
        self,
        input_ids: Tensor,
        cached: int,
        copies: int,
        pixel_values: Tensor | None,
        image_grid_thw: Tensor | None,
        pixel_values_videos: Tensor | None,
        video_grid_thw: Tensor | None,
    ) -> Tensor:
        """Features `[V, hidden]`, stills then frames, of the placeholders of `input_ids[:, cached:]`, rows copied."""
        config, device = self.config, self.device
        kinds = (
            (config.image_token_id, pixel_values, image_grid_thw),
            (config.video_token_id, pixel_values_videos, video_grid_thw),
        )
        wanted, pixels, grids, rows = [], [], [], []
        for token_id, patches, grid in kinds:
            if patches is None or grid is None:
                continue
            row, column = (x.to(device) for x in (input_ids == token_id).nonzero(as_tuple=True))
            grid = grid.to(device)
            block = torch.repeat_interleave(torch.arange(len(grid), device=device), grid.prod(dim=1) // 4)
            if len(block) != len(row):
                raise ValueError(f"{len(row)} placeholders of id {token_id}, but {len(block)} visual tokens")
            fresh = column >= cached
            encoded = torch.zeros(len(grid), dtype=torch.bool, device=device).index_fill_(0, block[fresh], True)
            pixels.append(patches.to(device)[encoded.repeat_interleave(grid.prod(dim=1))])
            grids.append(grid[encoded])
            wanted.append(fresh[encoded[block]])
            rows.append(row[fresh])
        if not sum(map(len, grids)):
            return torch.zeros(0, config.text_config.hidden_size, dtype=self.dtype, device=device)
        features = self.encode_vision(torch.cat(pixels), torch.cat(grids))[torch.cat(wanted)]
        parts = features.split([len(row) for row in rows])
        return torch.cat([_copy_rows(part, row, copies) for part, row in zip(parts, rows, strict=True)])

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The model's inputs of one step; what was seen goes in with the prompt, or with every step without a cache."""
        visual = {name: kwargs.pop(name) for name in (*PIXELS, "visual_features") if name in kwargs}
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        return inputs | (visual if is_first_iteration or not kwargs.get("use_cache", True) else {})

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, num_new_tokens: int = 1, **more: Any
    ) -> dict[str, Any]:
        """New tokens stand one past the largest position so far: a prompt may end with a frame."""
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
    """Features `[V, hidden]` of rows 0, 1, … (`row [V]`, ascending) → each row's features `copies` times in a row."""
    if copies == 1 or not len(features):
        return features
    sizes = torch.unique_consecutive(row, return_counts=True)[1].tolist()
    return torch.cat([part.repeat(copies, 1) for part in features.split(sizes)])
