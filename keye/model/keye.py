"""KeyeForConditionalGeneration: vision tower → projector → decoder, as a Hugging Face model.

The model knows nothing of parallelism. Two seams let a trainer add it: `varlen` replaces the packed attention of the
decoder (sequence parallelism), `exchange` hands visual features to the rank that holds their place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from keye.model.attention import Varlen
from keye.model.config import KeyeConfig
from keye.model.rope import MultimodalRotary, stream_positions
from keye.model.vision import KeyeVisionModel, Projector, VisionEmbeddings

LOSS_CHUNK = 4096  # rows of fp32 logits alive at once


@dataclass
class KeyeOutput(ModelOutput):
    """loss: scalar; logits `[B, L, vocab]`, absent when `shift_labels` were given; past_key_values: the cache."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: Tensor | None = None


class KeyeForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Keye-VL-1.5 (arXiv 2509.01563): a native-resolution SigLIP, a 2×2 merge projector and Qwen3 with M-RoPE."""

    config_class = KeyeConfig
    config: KeyeConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["VisionLayer", "Qwen3DecoderLayer"]
    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__(config)
        text = config.text_config
        text._attn_implementation = "keye"
        self.visual = KeyeVisionModel(config.vision_config)
        self.projector = Projector(config.vision_config.hidden_size, text.hidden_size)
        self.language_model = AutoModel.from_config(text)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.language_model.rotary_emb = MultimodalRotary(head_dim, text.rope_parameters["rope_theta"])
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisionEmbeddings):
            nn.init.normal_(module.position_embedding.weight, std=module.position_embedding.embedding_dim**-0.5)
        if isinstance(module, KeyeVisionModel | Projector):
            for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def set_rope_theta(self, theta: float) -> None:
        """Change the base of the decoder's rotary (annealing: 1e6 → 8e6, report §pre-training); kept in the config."""
        self.language_model.rotary_emb.theta = theta
        self.config.text_config.rope_parameters = {**self.config.text_config.rope_parameters, "rope_theta": theta}

    def encode_vision(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Patches `[N, 3, 14, 14]` of frames or images with grids `[F, 3]` → tokens `[N / 4, hidden]`."""
        return self.projector(self.visual(pixel_values, grid_thw), grid_thw)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        cu_seqlens: Tensor | None = None,
        varlen: Varlen | None = None,
        exchange: Callable[[Tensor], Tensor] | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> KeyeOutput:
        """One pass over a padded batch `[B, L]`, or over one packed row `[1, L]` with `cu_seqlens` `[D + 1]`.

        Args:
            position_ids: `[3, B, L]`; computed from the stream when left out.
            pixel_values, image_grid_thw: patches `[N, 3, 14, 14]` and grids `[n, 3]` of all stills, in stream order.
            pixel_values_videos, video_grid_thw: the same for all frames of all videos.
            labels: `[B, L]`, −100 where nothing is learnt; `shift_labels` the same, already moved one to the left, as
                packing and sequence parallelism need; with them no logits are returned.
            num_items_in_batch: what the summed loss is divided by; the number of labels when left out.
            varlen, exchange: the two seams named in the module's docstring.
        """
        if position_ids is None and past_key_values is None and input_ids is not None:
            position_ids = self._positions(input_ids, attention_mask, image_grid_thw, video_grid_thw)
        if inputs_embeds is None:
            inputs_embeds = self._embed(
                input_ids, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw, exchange
            )
        if cu_seqlens is not None:
            if self.config.text_config._attn_implementation != "keye":
                raise ValueError("packed rows need the attention 'keye': call model.set_attn_implementation('keye')")
            # The decoder builds no mask of its own when it is handed one for each kind of layer.
            attention_mask = dict.fromkeys(self.config.text_config.layer_types)
            kwargs |= {"cu_seqlens": cu_seqlens, "varlen_fn": varlen}
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache if cu_seqlens is None else False,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None or shift_labels is not None:
            shifted = shift_labels if shift_labels is not None else F.pad(labels[:, 1:], (0, 1), value=-100)
            loss = self._loss(hidden, shifted, num_items_in_batch)
        if shift_labels is None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        return KeyeOutput(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def _embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_grid_thw: Tensor | None,
        pixel_values_videos: Tensor | None,
        video_grid_thw: Tensor | None,
        exchange: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """Token embeddings `[B, L, hidden]` with visual features in the place of the placeholders."""
        embeds = self.get_input_embeddings()(input_ids)
        pixels = [p for p in (pixel_values, pixel_values_videos) if p is not None and len(p)]
        if not pixels and exchange is None and not self.training:
            return embeds
        if pixels:
            grids = [g for g in (image_grid_thw, video_grid_thw) if g is not None and len(g)]
            features = self.encode_vision(torch.cat(pixels), torch.cat(grids))
        else:
            features = self._no_features(embeds)
        if exchange is not None:
            features = exchange(features)
        # Stills come first in `features`, then frames: each kind fills its own placeholders in order.
        stills, frames = input_ids == self.config.image_token_id, input_ids == self.config.video_token_id
        count = int(stills.sum())
        if count + int(frames.sum()) != len(features):
            raise ValueError(
                f"{count + int(frames.sum())} placeholders in the text, but {len(features)} visual tokens: "
                "prepare text and pixels with one call of the processor"
            )
        features = features.to(embeds.dtype)
        embeds = embeds.masked_scatter(stills[..., None], features[:count])
        return embeds.masked_scatter(frames[..., None], features[count:])

    def _no_features(self, embeds: Tensor) -> Tensor:
        """No visual tokens `[0, hidden]`, but through the tower: every rank must touch every parameter in training."""
        grid = torch.tensor([[1, 2, 2]], device=embeds.device)
        size = self.config.vision_config.patch_size
        return self.encode_vision(embeds.new_zeros(4, 3, size, size), grid)[:0] + 0 * embeds.sum()

    def _positions(
        self, input_ids: Tensor, attention_mask: Tensor | None, images: Tensor | None, videos: Tensor | None
    ) -> Tensor:
        """Positions `[3, B, L]` of a padded batch; blocks are dealt to the rows in stream order."""
        merged = {}
        for token_id, grid in ((self.config.image_token_id, images), (self.config.video_token_id, videos)):
            merged[token_id] = input_ids.new_zeros(0, 2) if grid is None else grid[:, 1:] // 2
        rows = torch.zeros(3, *input_ids.shape, dtype=torch.long, device=input_ids.device)
        for b, row in enumerate(input_ids):
            real = slice(None) if attention_mask is None else attention_mask[b].bool()
            blocks = []
            for token_id, sizes in merged.items():
                # Cells are counted off until this row's placeholders are used up.
                used = int((sizes.prod(1).cumsum(0) <= int((row == token_id).sum())).sum())
                blocks.append((token_id, sizes[:used]))
                merged[token_id] = sizes[used:]
            rows[:, b, real] = stream_positions(row[real], blocks)
        return rows

    def _loss(self, hidden: Tensor, shifted: Tensor, num_items: Tensor | float | None) -> Tensor:
        """Summed cross-entropy over the labelled positions alone, in fp32 and in chunks, divided by `num_items`."""
        chosen = shifted != -100
        rows, targets = hidden[chosen], shifted[chosen]
        total = hidden.sum().float() * 0  # keeps the graph whole on a rank without labels
        if len(rows) == 0:
            total = total + self.lm_head(hidden[:, :1]).sum().float() * 0
        for part, target in zip(rows.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            total = total + checkpoint(self._chunk_loss, part, target, use_reentrant=False)
        return total / (max(len(targets), 1) if num_items is None else num_items)

    def _chunk_loss(self, rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(rows).float(), targets, reduction="sum")

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Pixels go in with the prompt only; each new token stands one past the largest position so far."""
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = kwargs.pop("position_ids", None)
        visual = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
        pixels = {name: kwargs.pop(name, None) for name in visual}
        if positions is None or positions.ndim == 2:
            grids = pixels["image_grid_thw"], pixels["video_grid_thw"]
            positions = self._positions(input_ids, kwargs.get("attention_mask"), *grids)
        inputs = {
            "input_ids": input_ids[:, cached:],
            "attention_mask": kwargs.get("attention_mask"),
            "position_ids": positions[..., cached : input_ids.shape[1]],
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": kwargs.get("logits_to_keep", 1),
        }
        return inputs | (pixels if cached == 0 else {})

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **more: Any
    ) -> dict[str, Any]:
        positions = model_kwargs.pop("position_ids", None)
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **more)
        if positions is not None and positions.ndim == 3:
            following = positions.amax(dim=(0, 2), keepdim=True).expand(3, -1, 1) + 1
            model_kwargs["position_ids"] = torch.cat((positions, following), dim=-1)
        return model_kwargs


AutoModelForImageTextToText.register(KeyeConfig, KeyeForConditionalGeneration)
