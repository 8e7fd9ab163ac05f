"""KeyeModel and KeyeForConditionalGeneration: vision tower → projector → decoder (→ head), as Hugging Face models.

The model has no code for parallelism. Three arguments of `KeyeModel.forward` let a trainer add it: `varlen` replaces
the packed attention of the decoder (sequence parallelism), `frame_parts` are parts of frames that several ranks encode
together, `exchange` sends visual features to the rank that has their placeholders.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from keye.model.attention import Varlen, check_name
from keye.model.config import KeyeConfig
from keye.model.decoder import build_decoder, multimodal_rotary
from keye.model.generation import CACHE, KeyeGenerationMixin
from keye.model.heads import Readout
from keye.model.placeholders import fill_placeholders, read_grids, read_tokens, refuse_parts
from keye.model.pretrained import KeyePreTrainedModel
from keye.model.projector import Projector
from keye.model.rope import batch_positions
from keye.model.vision import FramePart, KeyeVisionModel, Trace
from keye.motion.timing import clips_of
from keye.slowfast.pixels import join


@dataclass
class KeyeOutput(CausalLMOutputWithPast):
    """The output of `KeyeForConditionalGeneration`.

    loss: scalar. logits: `[B, L, vocab]`, None if `shift_labels` were given. past_key_values: the decoder's cache,
    named `cache` from transformers 5.24 on. hidden_states, attentions: the decoder's, if requested. scores: the results
    of `row_scores`, each `[N, …]`.
    """

    scores: tuple[Tensor, ...] | None = None


class KeyeModel(KeyePreTrainedModel):
    """Keye-VL-1.5 (arXiv 2509.01563) without its head: a native-resolution SigLIP, a 2×2 merge projector, a decoder."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.visual = KeyeVisionModel(config.vision_config, check_name(config.attention))
        self.projector = Projector(config.vision_config.hidden_size, text.hidden_size)
        self.language_model = build_decoder(text)
        self.post_init()

    def set_rope_theta(self, theta: float) -> None:
        """Change the base of the decoder's rotary, also in the config (annealing: 1e6 → 8e6, report §pre-training)."""
        text = self.config.text_config
        text.rope_parameters = {**text.rope_parameters, "rope_theta": theta}
        self.language_model.rotary_emb = multimodal_rotary(self.language_model.rotary_emb.own, text)

    def encode_vision(
        self, pixel_values: Tensor | None, grid_thw: Tensor | None,
        frame_parts: Sequence[FramePart] = (), clips: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Patches `[N, 3, 14, 14]` of frames or images with grids `[F, 3]` → tokens `[N / 4, hidden]`.

        Pixels are bytes (uint8) or floats in [−1, 1]. Without a gradient, and with gradient checkpointing, frames pass
        through tower and projector in chunks, so that only the activations of a chunk are in memory. The tokens of
        `frame_parts` come first. `clips` `[F, 3]` are for a motion pathway (`keye.motion.timing`).
        """
        if grid_thw is not None and not torch.compiler.is_compiling():
            grid_thw = grid_thw.to("cpu", torch.long)  # read once for tower and projector
        features = self.visual(pixel_values, grid_thw, frame_parts, clips=clips)
        return self.projector(features, grid_thw, sum(len(part.pixels) for part in frame_parts))

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        clips: Tensor | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Patches and grids of images, as for `forward` → the tower's features and the decoder's tokens.

        Returns:
            last_hidden_state `[N, vision width]`, a row per patch; pooler_output, the tokens `[patches / 4, hidden]` of
            each image; if requested, hidden_states (of the embeddings and of every layer) and attentions
            (`[heads, N, N]` per layer, 0 between images).
        """
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        weights = self.config.output_attentions if output_attentions is None else output_attentions
        trace = Trace([] if hidden else None, [] if weights else None)
        grid = image_grid_thw.to(pixel_values.device, torch.long)
        features = self.visual(pixel_values, grid, trace=trace, clips=clips)
        tokens = self.projector(features, grid).split((grid.prod(dim=1) // 4).tolist())
        output = BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=tokens,
            hidden_states=trace.hidden_states and tuple(trace.hidden_states),
            attentions=trace.attentions and tuple(trace.attentions),
        )
        as_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """The same for the frames of videos: an entry per frame. A motion pathway needs `video_blocks`."""
        clips = self.clips(None, video_grid_thw, kwargs.pop("video_blocks", None))
        return self.get_image_features(pixel_values_videos, video_grid_thw, **kwargs, clips=clips)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        video_blocks: Tensor | None = None,
        visual_features: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        cu_seqlens: Tensor | None = None,
        varlen: Varlen | None = None,
        frame_parts: Sequence[FramePart] = (),
        exchange: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """One pass over a padded batch `[B, L]`, or over one packed row `[1, L]` with `cu_seqlens` `[D + 1]`.

        Args:
            input_ids, inputs_embeds: `[B, L]`, or `[B, L, hidden]` instead, where placeholders are found by their
                embedding. With both, ids give the placeholders and embeddings the words.
            position_ids: `[3, B, L]`; computed from the ids by default, which needs an empty cache. `[B, L]` are
                positions of text, which may start at 0 again with each document of a row.
            past_key_values, cache: the older and the newer name of transformers for one argument.
            pixel_values, image_grid_thw: patches `[N, 3, 14, 14]` or `[N, 588]`, bytes (uint8) or floats in [−1, 1],
                and grids `[n, 3]` of all images, in stream order.
            pixel_values_videos, video_grid_thw: the same for all frames of all videos.
            video_blocks: `[K, 5]`, which tokens are read of the frames (`keye.aggregation.blocks`); by default all.
            visual_features: `[V, hidden]`, the tokens that are read, instead of pixels, images first.
            varlen, frame_parts, exchange: see the module's docstring; `exchange` gets the tokens of `frame_parts`
                before those of `pixel_values`.

        Returns:
            last_hidden_state `[B, L, hidden]` after the decoder's norm, the cache, and the requested extras.
        """
        past = past_key_values if cache is None else cache
        pixels = pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw, video_blocks
        features = self.visual_tokens(*pixels, visual_features, frame_parts, exchange)
        if input_ids is None and (position_ids is None or features is not None):
            input_ids = self.placeholders(inputs_embeds)
        if position_ids is None:
            if past is not None and past.get_seq_length():
                raise ValueError("positions after a cache cannot be computed from the ids: give position_ids [3, B, L]")
            position_ids = self.positions(
                input_ids, attention_mask, image_grid_thw, video_grid_thw, cu_seqlens, video_blocks
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if input_ids is not None:
            kinds = self.config.image_token_id, self.config.video_token_id
            inputs_embeds = fill_placeholders(input_ids, inputs_embeds, features, kinds)
        if cu_seqlens is not None:
            kwargs |= {"cu_seqlens": cu_seqlens, "varlen_fn": varlen, "attention": self.config.attention}
            attention_mask, use_cache = self._packed_mask(inputs_embeds), False
        elif attention_mask is None and past is None and position_ids.ndim == 3:
            # Without a mask a decoder looks for packed documents in the positions, and finds one in each frame.
            attention_mask = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.long)
        if use_cache is None and self.training:
            use_cache = False
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: past},
            **kwargs,
        )

    def positions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        video_blocks: Tensor | None = None,
    ) -> Tensor:
        """Positions `[3, B, L]` of a padded batch, or of one packed row with `cu_seqlens`; grids over all its rows."""
        empty, blocks = torch.zeros(0, 2, dtype=torch.long, device=input_ids.device), []
        for token_id, sizes in (
            (self.config.image_token_id, read_grids(image_grid_thw)),
            (self.config.video_token_id, read_grids(video_grid_thw, video_blocks)),
        ):
            blocks.append((token_id, empty if sizes is None else sizes.to(empty)))
        return batch_positions(input_ids, attention_mask, blocks, cu_seqlens)

    def placeholders(self, inputs_embeds: Tensor) -> Tensor:
        """Ids `[B, L]` of embeddings `[B, L, hidden]`: the placeholder's id at its embedding, otherwise −1."""
        ids = inputs_embeds.new_full(inputs_embeds.shape[:2], -1, dtype=torch.long)
        for token_id in (self.config.image_token_id, self.config.video_token_id):
            own = self.get_input_embeddings()(ids.new_tensor([[token_id]])).to(inputs_embeds)
            ids = ids.masked_fill((inputs_embeds == own).all(dim=-1), token_id)
        return ids

    def _packed_mask(self, embeds: Tensor) -> Tensor:
        """The attention mask that a decoder gets for packed rows.

        A decoder uses a mask of four dimensions as it is. This one is empty, because packed attention uses `cu_seqlens`
        only, and any other attention fails on it instead of mixing documents.
        """
        if self.config.text_config._attn_implementation != "keye":
            raise ValueError("packed rows need the attention 'keye': call model.set_attn_implementation('keye')")
        return embeds.new_empty(0, 0, 0, 0)

    def visual_tokens(
        self,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        video_blocks: Tensor | None = None,
        visual_features: Tensor | None = None,
        frame_parts: Sequence[FramePart] = (),
        exchange: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """The visual tokens `[V, hidden]`, images first; None if there are none and no parameter needs a gradient."""
        pixels = [p for p in (pixel_values, pixel_values_videos) if p is not None and len(p)]
        if visual_features is not None:
            features = visual_features
        elif pixels or frame_parts:
            grids = [g for g in (image_grid_thw, video_grid_thw) if g is not None and len(g)]
            joined = (join(pixels), join(grids)) if pixels else (None, None)
            if video_blocks is not None or self.config.vision_config.motion is not None:
                refuse_parts(frame_parts, exchange)
            features = self.encode_vision(
                *joined, frame_parts, self.clips(image_grid_thw, video_grid_thw, video_blocks)
            )
            if video_blocks is not None:
                features = read_tokens(features, image_grid_thw, video_grid_thw, video_blocks)
        elif exchange is None and not self.training:
            return None
        else:
            features = self._no_features()
        return features if exchange is None else exchange(features)

    def clips(self, image_grid: Tensor | None, video_grid: Tensor | None, blocks: Tensor | None) -> Tensor | None:
        """`clips` of `encode_vision`; None without a motion pathway. KeyeError: the blocks have no times."""
        if self.config.vision_config.motion is None:
            return None
        return clips_of(*(0 if grid is None else len(grid) for grid in (image_grid, video_grid)), blocks)

    def _no_features(self) -> Tensor:
        """No visual tokens `[0, hidden]`, but through the tower: in training every rank must use every parameter."""
        grid = torch.tensor([[1, 2, 2]], device=self.device)
        size = self.config.vision_config.patch_size
        return self.encode_vision(torch.zeros(4, 3, size, size, device=self.device), grid)[:0]


class KeyeForConditionalGeneration(KeyePreTrainedModel, KeyeGenerationMixin):
    """`KeyeModel` as `model`, and the language head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__(config)
        self.model = KeyeModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.readout = Readout()
        self.post_init()

    @property
    def visual(self) -> KeyeVisionModel:
        return self.model.visual

    @property
    def projector(self) -> Projector:
        return self.model.projector

    @property
    def language_model(self) -> nn.Module:
        return self.model.language_model

    def set_rope_theta(self, theta: float) -> None:
        """See `KeyeModel.set_rope_theta`."""
        self.model.set_rope_theta(theta)

    def encode_vision(self, *args: Tensor | None, **kwargs: Tensor | None) -> Tensor:
        """See `KeyeModel.encode_vision`."""
        return self.model.encode_vision(*args, **kwargs)

    def clips(self, *args: Tensor | None) -> Tensor | None:
        """See `KeyeModel.clips`."""
        return self.model.clips(*args)

    def positions(self, *args: Tensor | None, **kwargs: Tensor | None) -> Tensor:
        """See `KeyeModel.positions`."""
        return self.model.positions(*args, **kwargs)

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """See `KeyeModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def get_video_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """See `KeyeModel.get_video_features`."""
        return self.model.get_video_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        video_blocks: Tensor | None = None,
        visual_features: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> KeyeOutput:
        """`KeyeModel.forward`, which takes the same arguments, and the head.

        Args:
            labels: `[B, L]`, −100 at tokens without a loss.
            num_items_in_batch: divisor of the summed loss; by default the number of labels.
            logits_to_keep: number of last tokens that get logits, 0 for all; or the indices of tokens.
            mm_token_type_ids: accepted because tools pass it; not used, the ids contain the same information.
            kwargs: `shift_labels` `[B, L]`, labels already shifted one to the left, as packing and sequence parallelism
                need; no logits are returned with them. A Trainer would require each parameter whose name contains
                "label" in every batch. `row_scores` (`heads.RowScores`) with `row_targets` `[N]`: applied in chunks to
                the logits of the N tokens `logits_to_keep` of one row; `scores` are returned instead of logits.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        row_scores, row_targets = kwargs.pop("row_scores", None), kwargs.pop("row_targets", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            video_blocks=video_blocks,
            visual_features=visual_features,
            past_key_values=past_key_values if cache is None else cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = scores = None
        if labels is not None or shift_labels is not None:
            shifted = shift_labels if shift_labels is not None else F.pad(labels[:, 1:], (0, 1), value=-100)
            loss = self._loss(hidden, shifted, num_items_in_batch)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if row_scores is not None:
            scores = self.readout(hidden[0, keep], row_targets, head=self.lm_head, scores=row_scores)
        elif shift_labels is None:
            logits = self.readout(hidden[:, keep], head=self.lm_head)
        return KeyeOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            scores=scores,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _loss(self, hidden: Tensor, shifted: Tensor, num_items: Tensor | float | None) -> Tensor:
        """Summed cross-entropy over the labelled positions, in fp32 and in chunks, divided by `num_items`.

        Without labels it is 0, and still a function of every parameter.
        """
        places = (shifted != -100).flatten().nonzero()[:, 0]  # their number is read from the device once
        rows, targets = hidden.flatten(0, 1)[places], shifted.flatten()[places].long()
        total = self.readout(rows, targets, head=self.lm_head)
        return total / (max(len(targets), 1) if num_items is None else num_items)


AutoModel.register(KeyeConfig, KeyeModel)
AutoModelForImageTextToText.register(KeyeConfig, KeyeForConditionalGeneration)
AutoModelForMultimodalLM.register(KeyeConfig, KeyeForConditionalGeneration)
