"""KeyeForConditionalGeneration: vision tower → projector → decoder, as a Hugging Face model.

The model knows nothing of parallelism. Three seams let a trainer add it: `varlen` replaces the packed attention of the
decoder (sequence parallelism), `frame_parts` are parts of frames that several ranks encode together, `exchange` hands
visual features to the rank that holds their place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from keye.model import names
from keye.model.attention import Varlen, check_name
from keye.model.config import KeyeConfig
from keye.model.decoder import build_decoder, multimodal_rotary
from keye.model.generation import KeyeGenerationMixin
from keye.model.rope import batch_positions
from keye.model.vision import FramePart, KeyeVisionModel, Projector, chunks_of, normalised

LOSS_CHUNK = 4096  # rows of fp32 logits alive at once


@dataclass
class KeyeOutput(ModelOutput):
    """loss: scalar; logits `[B, L, vocab]`, absent when `shift_labels` were given; past_key_values: the cache.

    hidden_states, attentions: the decoder's, where asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class KeyeForConditionalGeneration(PreTrainedModel, KeyeGenerationMixin):
    """Keye-VL-1.5 (arXiv 2509.01563): a native-resolution SigLIP, a 2×2 merge projector and a decoder with M-RoPE."""

    config_class = KeyeConfig
    config: KeyeConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["VisionLayer"]  # the decoder adds its own
    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}
    _keys_to_ignore_on_load_unexpected = names.UNUSED_PATTERNS

    def __init__(self, config: KeyeConfig) -> None:
        if config._attn_implementation is None:
            config._attn_implementation = "keye"
        super().__init__(config)
        text = config.text_config
        self.visual = KeyeVisionModel(config.vision_config, check_name(config.attention))
        self.projector = Projector(config.vision_config.hidden_size, text.hidden_size)
        self.language_model = build_decoder(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; directories with the released names load, too, and are saved again with ours."""
        loaded = super().from_pretrained(*args, **{"key_mapping": names.KEY_MAPPING, **kwargs})
        (loaded[0] if isinstance(loaded, tuple) else loaded)._weight_conversions = []
        return loaded

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], **kwargs: Any) -> None:
        """Choose the decoder's attention of transformers; "keye", the default, is the one that can be packed.

        The tower always uses `keye.model.attention` (`config.attention`).
        """
        if isinstance(attn_implementation, str):
            attn_implementation = {"": attn_implementation, "text_config": attn_implementation}
        super().set_attn_implementation(attn_implementation, **kwargs)

    def set_rope_theta(self, theta: float) -> None:
        """Change the base of the decoder's rotary (annealing: 1e6 → 8e6, report §pre-training); kept in the config."""
        text = self.config.text_config
        text.rope_parameters = {**text.rope_parameters, "rope_theta": theta}
        self.language_model.rotary_emb = multimodal_rotary(self.language_model.rotary_emb.own, text)

    def encode_vision(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Patches `[N, 3, 14, 14]` of frames or images with grids `[F, 3]` → tokens `[N / 4, hidden]`.

        Pixels are bytes (uint8), which become floats here, or floats in [−1, 1]. Without a gradient, and with gradient
        checkpointing, frames pass through in chunks, so that beyond pixels and tokens no more than a chunk's
        activations are in memory; a chunk is computed again in the backward pass.
        """
        recomputed = self.visual.gradient_checkpointing and self.training
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and not recomputed):
            return self._encode_frames(pixel_values, grid_thw)
        chunks = chunks_of(grid_thw)
        if sum(patches for _, patches in chunks) != len(pixel_values):
            return self._encode_frames(pixel_values, grid_thw)  # the tower says what does not fit
        parts = zip(
            pixel_values.split([patches for _, patches in chunks]),
            grid_thw.split([rows for rows, _ in chunks]),
            strict=True,
        )
        if not torch.is_grad_enabled():
            return _joined([self._encode_frames(*part) for part in parts])
        if any(p.requires_grad for p in self.visual.parameters()):
            return _joined([checkpoint(self._encode_frames, *part, use_reentrant=False) for part in parts])
        # A tower that stays as it is has nothing to compute again: its features are what the projector keeps.
        with torch.no_grad():
            features = [(self.visual(*part), part[1]) for part in parts]
        return _joined([checkpoint(self.projector, *part, use_reentrant=False) for part in features])

    def _encode_part(self, part: FramePart) -> Tensor:
        """Tokens `[n, hidden]` of a part of a frame; recomputed in the backward pass as a chunk of frames is."""
        if not (self.visual.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return self._part_tokens(part)
        if any(p.requires_grad for p in self.visual.parameters()):
            return checkpoint(self._part_tokens, part, use_reentrant=False)
        with torch.no_grad():
            features = self.visual(None, None, part)
        return checkpoint(self.projector, features, None, use_reentrant=False)

    def _part_tokens(self, part: FramePart) -> Tensor:
        return self.projector(self.visual(None, None, part), None)

    def _encode_frames(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        return self.projector(self.visual(pixel_values, grid_thw), grid_thw)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        visual_features: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        cu_seqlens: Tensor | None = None,
        varlen: Varlen | None = None,
        frame_parts: Sequence[FramePart] = (),
        exchange: Callable[[Tensor], Tensor] | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> KeyeOutput:
        """One pass over a padded batch `[B, L]`, or over one packed row `[1, L]` with `cu_seqlens` `[D + 1]`.

        Args:
            position_ids: `[3, B, L]`; computed from the stream when left out, which a cache that is not empty forbids.
            pixel_values, image_grid_thw: patches `[N, 3, 14, 14]`, bytes (uint8) or floats in [−1, 1], and grids
                `[n, 3]` of all stills, in stream order.
            pixel_values_videos, video_grid_thw: the same for all frames of all videos.
            visual_features: `[V, hidden]` of pixels that went through `encode_vision` before, stills first.
            labels: `[B, L]`, −100 where nothing is learnt; `shift_labels` the same, already moved one to the left, as
                packing and sequence parallelism need; with them no logits are returned.
            num_items_in_batch: what the summed loss is divided by; the number of labels when left out.
            varlen, frame_parts, exchange: the seams named in the module's docstring; the tokens of `frame_parts` come
                before those of `pixel_values` in what `exchange` is given.
        """
        if position_ids is None and input_ids is not None:
            if past_key_values is not None and past_key_values.get_seq_length():
                raise ValueError("what stands after a cache has no positions of its own: give position_ids [3, B, L]")
            position_ids = self.positions(input_ids, attention_mask, image_grid_thw, video_grid_thw, cu_seqlens)
        if inputs_embeds is None:
            pixels = pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw
            inputs_embeds = self._embed(input_ids, self._features(*pixels, visual_features, frame_parts, exchange))
        if cu_seqlens is not None:
            kwargs |= {"cu_seqlens": cu_seqlens, "varlen_fn": varlen, "attention": self.config.attention}
            attention_mask, use_cache = self._packed_mask(inputs_embeds), False
        elif attention_mask is None and past_key_values is None:
            # Without a mask a decoder looks for packed documents in the positions, and would find one in each frame.
            attention_mask = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.long)
        if use_cache is None and self.training:
            use_cache = False
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
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
        return KeyeOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def positions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Positions `[3, B, L]` of a padded batch, or of one packed row with `cu_seqlens`; grids over all its rows."""
        blocks = []
        for token_id, grid in (
            (self.config.image_token_id, image_grid_thw),
            (self.config.video_token_id, video_grid_thw),
        ):
            sizes = input_ids.new_zeros(0, 2) if grid is None else grid[:, 1:].to(input_ids.device) // 2
            blocks.append((token_id, sizes))
        return batch_positions(input_ids, attention_mask, blocks, cu_seqlens)

    def _packed_mask(self, embeds: Tensor) -> Tensor:
        """What a decoder is handed in the place of a mask when rows are packed.

        Every decoder takes a mask of four dimensions as it is and builds none; this one is empty, because packed
        attention goes by `cu_seqlens` alone, and any other attention would fail on it rather than mix documents.
        """
        if self.config.text_config._attn_implementation != "keye":
            raise ValueError("packed rows need the attention 'keye': call model.set_attn_implementation('keye')")
        return embeds.new_empty(0, 0, 0, 0)

    def _features(
        self,
        pixel_values: Tensor | None,
        image_grid_thw: Tensor | None,
        pixel_values_videos: Tensor | None,
        video_grid_thw: Tensor | None,
        visual_features: Tensor | None,
        frame_parts: Sequence[FramePart],
        exchange: Callable[[Tensor], Tensor] | None,
    ) -> Tensor | None:
        """Visual tokens `[V, hidden]`, stills first; None where there are none and no parameter needs one."""
        pixels = [p for p in (pixel_values, pixel_values_videos) if p is not None and len(p)]
        # The parts come first: there the ranks wait for one another, before each goes on with frames of its own.
        shared = [self._encode_part(part) for part in frame_parts]
        if visual_features is not None:
            features = visual_features
        elif pixels:
            grids = [g for g in (image_grid_thw, video_grid_thw) if g is not None and len(g)]
            if len({part.dtype for part in pixels}) > 1:
                pixels = [normalised(part) for part in pixels]
            features = _joined([*shared, self.encode_vision(_joined(pixels), _joined(grids))])
        elif shared:
            features = _joined(shared)
        elif exchange is None and not self.training:
            return None
        else:
            features = self._no_features()
        return features if exchange is None else exchange(features)

    def _no_features(self) -> Tensor:
        """No visual tokens `[0, hidden]`, but through the tower: every rank must touch every parameter in training."""
        grid = torch.tensor([[1, 2, 2]], device=self.device)
        size = self.config.vision_config.patch_size
        return self.encode_vision(torch.zeros(4, 3, size, size, device=self.device), grid)[:0]

    def _embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Token embeddings `[B, L, hidden]` with visual features in the place of the placeholders, in stream order.

        Stills come first in `features`, then frames: each kind fills its own placeholders.
        """
        embeds = self.get_input_embeddings()(input_ids)
        if features is None and input_ids.shape[1] == 1:
            return embeds  # one step of generation, which need not wait for the device to count placeholders
        stills, frames = input_ids == self.config.image_token_id, input_ids == self.config.video_token_id
        places = stills | frames
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

    def _loss(self, hidden: Tensor, shifted: Tensor, num_items: Tensor | float | None) -> Tensor:
        """Summed cross-entropy over the labelled positions alone, in fp32 and in chunks, divided by `num_items`.

        Without any label it is 0, and still a function of every parameter.
        """
        chosen = shifted != -100
        rows, targets = hidden[chosen], shifted[chosen]
        total = torch.zeros((), device=hidden.device)
        for part, target in zip(rows.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            total = total + checkpoint(self._chunk_loss, part, target, use_reentrant=False)
        return total / (max(len(targets), 1) if num_items is None else num_items)

    def _chunk_loss(self, rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(rows).float(), targets, reduction="sum")


def _joined(parts: list[Tensor]) -> Tensor:
    """Pixels are large: a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


AutoModelForImageTextToText.register(KeyeConfig, KeyeForConditionalGeneration)
