"""KeyeProcessor: chat messages with images and videos → model inputs, for training and for generation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import PROCESSOR_NAME

from keye.aggregation.plans import joined_blocks
from keye.encoder_config import EncoderConfig
from keye.errors import ArgumentError, CheckpointError, KeyeError, ManifestError
from keye.model.config import KeyeConfig
from keye.model.rope import stream_positions
from keye.processor.fit import encode_media, plan_ids
from keye.processor.messages import Message, Visual, located, media_of_texts, read_chat
from keye.processor.options import image_limits, make_encoder
from keye.processor.reply import Thinking
from keye.processor.sample import PIXELS, KeyeInputs, Sample, collate
from keye.processor.settings import CallSettings, call_settings
from keye.processor.spelling import Spelling
from keye.processor.stream import (
    CHAT_TEMPLATE,
    IGNORED,
    IMAGE_PAD,
    SPECIAL_TOKENS,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Stream,
)
from keye.processor.template import Spans, has_generation, render_jinja_template, variables_of
from keye.slowfast.pixels import join
from keye.video.fetch import UrlRules


class KeyeProcessor(ProcessorMixin):
    """Tokenizer + slow-fast encoder.

    Args:
        tokenizer: any fast tokenizer with the stream's special tokens (`keye.processor.tokenizer`).
        encoder: the arguments of `SlowFastEncoder`; its defaults if None.
        image: the arguments of `SlowFastEncoder.image` (`min_tokens`, `max_tokens`).
        chat_template: the tokenizer's, or Keye's, if None.
        urls: what this process may download; it is never saved. Without it an http(s) URL is an error.

    Raises:
        KeyeError: a setting in `encoder` or `image` is unknown or impossible.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        encoder: dict[str, Any] | None = None,
        image: dict[str, Any] | None = None,
        chat_template: str | None = None,
        urls: UrlRules | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template or CHAT_TEMPLATE)
        self._encoder = make_encoder({} if encoder is None else encoder, urls)
        # All settings, also the defaults: a saved model must not change with a later default.
        self.encoder, self.image = self._encoder.settings, image_limits({} if image is None else image)
        ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
        self._spelling = Spelling(tokenizer)
        self._stream = Stream(self._spelling.ids, ids)
        self.image_token, self.video_token = IMAGE_PAD, VIDEO_PAD
        self.image_token_id, self.video_token_id = ids[IMAGE_PAD], ids[VIDEO_PAD]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Self:
        """The processor of a directory or hub id, as in transformers; `kwargs` replace saved settings.

        Raises:
            CheckpointError: a saved setting of the encoder or of images is unknown or impossible.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except KeyeError as error:
            if isinstance(error, CheckpointError) or kwargs.keys() & {"encoder", "image"}:
                raise
            raise CheckpointError(f"{Path(pretrained_model_name_or_path) / PROCESSOR_NAME}: {error}") from error

    def with_encoder(self, **changes: Any) -> Self:
        """The same processor with some settings of its encoder changed; KeyeError for an unknown or impossible one."""
        settings = self._encoder.with_settings(**changes).settings
        return type(self)(self.tokenizer, settings, self.image, self.chat_template, self._encoder.urls)

    @classmethod
    def from_args_and_dict(cls, args: Sequence[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The processor of a saved directory; kwargs replace what was saved."""
        if "encoder" in processor_dict:
            processor_dict = {**processor_dict, "encoder": EncoderConfig.saved(processor_dict["encoder"])}
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["tokenizer"]

    @property
    def model_input_names(self) -> list[str]:
        """The entries that a call returns; those of images and videos only if there are any."""
        return ["input_ids", "attention_mask", *PIXELS]

    def to_dict(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "image": self.image, "processor_class": type(self).__name__}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:
        """Write tokenizer, template and settings; the encoder alone loads from `preprocessor_config.json`."""
        files = super().save_pretrained(str(save_directory), **kwargs)
        path = Path(save_directory) / "preprocessor_config.json"
        settings = {"encoder": self.encoder, "image": self.image}
        path.write_text(json.dumps({"processor_class": "KeyeProcessor", **settings}, indent=2) + "\n")
        return [*(files or []), str(path)]

    def token_id(self, token: str) -> int:
        """Id of a special token."""
        return self._stream.id[token]

    def configure(self, config: KeyeConfig) -> KeyeConfig:
        """Write this tokenizer's placeholder ids into a model's config."""
        config.image_token_id, config.video_token_id = self.token_id(IMAGE_PAD), self.token_id(VIDEO_PAD)
        config.vision_start_token_id = self.token_id(VISION_START)
        config.vision_end_token_id = self.token_id(VISION_END)
        config.text_config.eos_token_id = self.tokenizer.eos_token_id
        config.text_config.pad_token_id = self.tokenizer.pad_token_id
        return config

    def sample(
        self,
        messages: Sequence[Message],
        base_dir: str | Path = ".",
        add_generation_prompt: bool = False,
        max_length: int | None = None,
        thinking: Thinking = None,
        continue_final_message: bool = False,
        last_turn_only: bool = False,
    ) -> Sample:
        """One conversation → `Sample`; `keye.processor.messages` describes the format of messages.

        Args:
            messages: the conversation.
            base_dir: the folder of relative paths.
            add_generation_prompt: start the assistant's turn after the last message.
            max_length: the most tokens: videos and then images are made smaller until the chat fits.
            thinking: True, False: append `/think`, `/no_think` to the last question if an answer follows, otherwise to
                each answered question (unless its message sets it); "as_answered": as each answer does.
            continue_final_message: leave the last message, the assistant's, open for continuation.
            last_turn_only: labels only for the last of the assistant's turns.

        Raises:
            ManifestError: a message that is not in the chat format.
            VideoError: a clip or image that cannot be read.
            KeyeError: invalid settings, or a chat that cannot be made to fit.
        """
        text, visuals, _ = self._chat(messages, base_dir, add_generation_prompt, thinking, continue_final_message)
        return self._build(text, visuals, max_length, last_turn_only)

    def reworded(self, sample: Sample, messages: Sequence[Message], base_dir: str | Path = ".") -> Sample:
        """A prompt with the media of `sample`, in the same order and not read again, and the text of `messages`.

        Raises:
            ManifestError: `messages` are not a chat, or have another number of images or videos.
        """
        ids, _ = self._spelling.located(self._chat(messages, base_dir, True, None, False)[0])
        stills = [] if sample.image_grid_thw is None else sample.read_grids[0].prod(1).tolist()
        videos = [plan_ids(self._stream, plan) for plan in sample.plans]
        try:
            input_ids = torch.tensor(self._stream.expand(ids, stills, videos))
        except ValueError as error:
            raise ManifestError(f"{error}; keep the images and videos of the prompt") from None
        sample = replace(sample, input_ids=input_ids, labels=self._stream.labels(input_ids))
        return replace(sample, position_ids=self._positions(sample))

    def build(
        self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), max_length: int | None = None
    ) -> Sample:
        """Rendered text with one placeholder per image and video, and the media in order → `Sample`."""
        stills = [Visual("image", located("image", image, Path())) for image in images]
        clips = [Visual("video", located("video", video, Path())) for video in videos]
        return self._build(text, [*stills, *clips], max_length)

    def _chat(
        self,
        messages: Sequence[Message],
        base_dir: str | Path,
        add_generation_prompt: bool,
        thinking: Thinking,
        continue_final_message: bool,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        marked: bool = False,
    ) -> tuple[str, list[Visual], Spans | None]:
        """A conversation as rendered text, its media, and the spans of the assistant's words.

        The spans are None unless `marked` is set and the template has `{% generation %}`.
        """
        generating = add_generation_prompt or continue_final_message
        chat = read_chat(messages, base_dir, self._spelling.guard, thinking, generating)
        if continue_final_message and (add_generation_prompt or chat.messages[-1]["role"] != "assistant"):
            raise ManifestError(
                "continue_final_message needs a chat that ends with an assistant message; add one and omit"
                " add_generation_prompt"
            )
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **(variables or {}),
        }
        template = chat_template or self.chat_template
        if marked and has_generation(template):
            rendered, spans = render_jinja_template(
                conversations=[chat.messages],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **options},
            )
            return rendered[0], chat.visuals, [(int(begin), int(end)) for begin, end in spans[0]]
        text = self.tokenizer.apply_chat_template(chat.messages, tokenize=False, chat_template=template, **options)
        return text, chat.visuals, None

    def _build(
        self,
        text: str,
        visuals: Sequence[Visual],
        max_length: int | None = None,
        last_turn_only: bool = False,
        spans: Spans | None = None,
    ) -> Sample:
        ids, places = self._spelling.located(text)
        placeholders = [ids.count(self.token_id(token)) for token in (IMAGE_PAD, VIDEO_PAD)]
        given = [sum(visual.kind == kind for visual in visuals) for kind in ("image", "video")]
        if placeholders != given:
            raise ManifestError(
                f"the text has placeholders for {placeholders[0]} images and {placeholders[1]} videos, but {given[0]}"
                f" images and {given[1]} videos were given; write one {IMAGE_PAD} or {VIDEO_PAD} for each"
            )
        media = encode_media(visuals, self._encoder, self.image, self._stream, len(ids) - sum(given), max_length)
        stills, videos = media.stills, media.videos
        expanded = self._stream.expand(ids, media.still_tokens, media.groups(self._stream))
        input_ids = torch.tensor(expanded, dtype=torch.long)
        sample = Sample(
            input_ids=input_ids,
            labels=self._stream.labels(input_ids, last_turn_only)
            if spans is None
            else self._stream.spoken(input_ids, ids, places, spans),
            position_ids=input_ids.new_empty(3, 0),
            pixel_values=join([pixels for pixels, _ in stills]) if stills else None,
            image_grid_thw=torch.cat([grid for _, grid in stills]) if stills else None,
            pixel_values_videos=join([v.pixel_values for v in videos]) if videos else None,
            video_grid_thw=torch.cat([v.grid_thw for v in videos]) if videos else None,
            video_blocks=joined_blocks([v.plan for v in videos]),
            plans=[v.plan for v in videos],
            warnings=media.warnings,
            thinned=media.thinned,
        )
        return replace(sample, position_ids=self._positions(sample))

    def _positions(self, sample: Sample) -> Tensor:
        """Positions `[3, L]` of a sample's ids and media."""
        kinds = zip((IMAGE_PAD, VIDEO_PAD), sample.read_grids, strict=True)
        blocks = [(self.token_id(token), sizes) for token, sizes in kinds if sizes is not None]
        return stream_positions(sample.input_ids, blocks)

    def collate(
        self, samples: Sequence[Sample], padding_side: str = "right", length: int | None = None
    ) -> dict[str, Tensor]:
        """Samples → one padded batch: input_ids, attention_mask, labels `[B, L]`, position_ids `[3, B, L]`, pixels.

        Pixels are float32 in [−1, 1]. length: the least length of the padded rows.
        """
        return collate(samples, self.tokenizer.pad_token_id, padding_side, length)

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        thinking: Thinking = None,
        return_assistant_tokens_mask: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Chat messages, or a list of such lists, → text (`tokenize=False`), ids or `KeyeInputs`.

        Other arguments (`max_length`, `padding`, `return_tensors`, …) are those of a call of the processor, or
        variables of the template; unknown names are errors. Without return_dict and return_tensors, ids are lists.

        Args:
            thinking: see `sample`; `enable_thinking` is the same, unless it is a variable of the template.
            return_assistant_tokens_mask: also return `assistant_masks` `[B, L]`, 1 at the assistant's words: those that
                the template marks with `{% generation %}`, or all between `<|im_start|>assistant` and `<|im_end|>`.
        """
        template = chat_template or self.chat_template
        variables = {name: kwargs.pop(name) for name in variables_of(template, kwargs)}
        alias = kwargs.pop("enable_thinking", None)  # a variable where the template has it
        if alias is not None and thinking is not None and alias != thinking:
            raise ArgumentError(f"thinking is given twice, as {thinking!r} and {alias!r}; give it once")
        thinking = alias if thinking is None else thinking
        settings = call_settings(kwargs, ("thinking",))
        batched = not isinstance(conversation, str) and bool(conversation) and not hasattr(conversation[0], "keys")
        chats = [
            self._chat(
                messages, ".", add_generation_prompt, thinking, continue_final_message, chat_template, variables,
                marked=tokenize and return_assistant_tokens_mask,
            )
            for messages in (conversation if batched else [conversation])
        ]  # fmt: skip
        if not tokenize:
            texts = [text for text, *_ in chats]
            return texts if batched else texts[0]
        generating = add_generation_prompt or continue_final_message
        visuals = settings.configured([visuals for _, visuals, _ in chats])
        rows = [(text, media, spans) for (text, _, spans), media in zip(chats, visuals, strict=True)]
        inputs = self._inputs(rows, settings, "left" if generating else "right", return_assistant_tokens_mask)
        if return_dict:
            return inputs
        ids = inputs["input_ids"]
        return ids.tolist() if settings.return_tensors is None and not isinstance(ids, list) else ids

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **kwargs: Any,
    ) -> KeyeInputs:
        """Rendered text(s) with placeholders, and their images and videos in order → model inputs.

        Args:
            text: a text or a list of them. Special tokens in it are special: render chats with `apply_chat_template`.
            images, videos: one, a list of all, or a list of lists, one for each text. A list of frames is one video
                only inside a list.
            padding: True or "longest", "max_length" or False; padding_side: "left" (the default) or "right";
                pad_to_multiple_of: pad rows to a multiple of this number of tokens.
            max_length: the most tokens of a row, reached by smaller videos and images; with truncation=False only the
                length of `padding="max_length"`. truncation=True alone uses the tokenizer's limit.
            images_kwargs, videos_kwargs: options of every image and video, see `keye.processor.options`.
            return_tensors: "pt" or "np". Rows of different lengths are lists if neither this nor a padding is given, as
                in transformers; otherwise the entries are tensors.
            return_mm_token_type_ids: also `mm_token_type_ids` `[B, L]`, 1 for images and 2 for frames.
            do_sample_frames: False uses every frame of videos that are given as frames.
            video_metadata: of each video (`fps`, `frames_indices`).

        Raises:
            ArgumentError: an unknown or unsupported argument; it is also a ValueError.
            KeyeError: what `sample` raises.
        """
        if text is None:
            raise ArgumentError(f"the processor got no text; give one with {IMAGE_PAD} or {VIDEO_PAD} for each medium")
        settings = call_settings(kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        media = [media_of_texts(texts, kind, given) for kind, given in (("image", images), ("video", videos))]
        visuals = settings.configured([[*stills, *clips] for stills, clips in zip(*media, strict=True)])
        rows = [(one, media, None) for one, media in zip(texts, visuals, strict=True)]
        return self._inputs(rows, settings, "left")

    def _inputs(
        self,
        rows: Sequence[tuple[str, list[Visual], Spans | None]],
        settings: CallSettings,
        padding_side: str,
        masks: bool = False,
    ) -> KeyeInputs:
        limit = settings.limit(self.tokenizer.model_max_length)
        samples = [self._build(text, visuals, limit, spans=spans) for text, visuals, spans in rows]
        uneven = len({len(sample) for sample in samples}) > 1
        if settings.padding is False and uneven and settings.return_tensors is not None:
            raise ArgumentError("padding is False and the rows differ in length; give padding=True or one row")
        length = settings.padded(max(map(len, samples)))
        batch: dict[str, Any] = self.collate(samples, settings.padding_side or padding_side, length)
        # The model computes the same positions; tools that change the length of a row would break these.
        labels, _ = batch.pop("labels"), batch.pop("position_ids")
        if masks:
            batch["assistant_masks"] = (labels != IGNORED).long()
        if settings.return_mm_token_type_ids:
            still, clip = (batch["input_ids"] == token for token in (self.image_token_id, self.video_token_id))
            batch["mm_token_type_ids"] = still.long() + 2 * clip.long()
        for name in ("pixel_values", "pixel_values_videos"):
            if name in batch:
                batch[name] = batch[name].flatten(1)  # a row per patch, as in transformers
        if uneven and settings.return_tensors is None and settings.as_lists:
            real = batch["attention_mask"].bool()
            for name in [name for name in batch if name not in PIXELS]:
                batch[name] = [row[mask].tolist() for row, mask in zip(batch[name], real, strict=True)]
        if settings.return_tensors == "np":
            batch = {name: value.numpy() for name, value in batch.items()}
        return KeyeInputs(batch, samples=samples)


AutoProcessor.register(KeyeConfig, KeyeProcessor)
AutoTokenizer.register(KeyeConfig, fast_tokenizer_class=PreTrainedTokenizerFast)
