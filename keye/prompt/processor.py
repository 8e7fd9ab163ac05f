"""KeyeProcessor: chat messages with images and videos → model inputs, for training and for generation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from keye.encoder import EncodedVideo, SlowFastEncoder
from keye.errors import ManifestError
from keye.model.config import KeyeConfig
from keye.model.rope import stream_positions
from keye.prompt.stream import (
    CHAT_TEMPLATE,
    IGNORED,
    IMAGE_PAD,
    SPECIAL_TOKENS,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Stream,
)
from keye.slowfast.plan import VideoPlan

Message = dict[str, Any]


@dataclass
class Sample:
    """One conversation, ready for the model.

    input_ids, labels: LongTensor `[L]`; labels are unshifted, −100 outside the assistant's words. position_ids
    `[3, L]`. Patches float32 `[N, 3, 14, 14]` and grids `[F, 3]` of the stills and of all videos' frames, in stream
    order. plans: what was decided about each video.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None
    plans: list[VideoPlan] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def visual_tokens(self) -> int:
        """How many of the tokens are visual."""
        grids = [g for g in (self.image_grid_thw, self.video_grid_thw) if g is not None]
        return sum(int(g.prod(1).sum()) // 4 for g in grids)


class KeyeProcessor(ProcessorMixin):
    """Tokenizer + slow-fast encoder.

    Args:
        tokenizer: any fast tokenizer that knows the stream's special tokens (`keye.prompt.tokenizer`).
        encoder: the arguments of `SlowFastEncoder`; its defaults when left out.
        image: the arguments of `SlowFastEncoder.image` (`min_tokens`, `max_tokens`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        encoder: dict[str, Any] | None = None,
        image: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template or CHAT_TEMPLATE)
        self._encoder = SlowFastEncoder(**(encoder or {}))
        # All settings, also those left to their defaults: a saved model must not change with a later default.
        self.encoder, self.image = self._encoder.settings, dict(image or {})
        ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
        self._stream = Stream(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], ids)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["tokenizer"]

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        return {k: v for k, v in values.items() if not k.startswith("_")}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:
        """Write tokenizer, template and settings; `preprocessor_config.json` lets the encoder be loaded alone."""
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
        self, messages: Sequence[Message], base_dir: str | Path = ".", add_generation_prompt: bool = False
    ) -> Sample:
        """One conversation → `Sample`; paths of images and videos are relative to `base_dir`.

        A video may also be an `EncodedVideo`, frames uint8 `[T, 3, H, W]` or anything else the encoder takes.

        Raises:
            ManifestError: a message that is not in the chat format.
            VideoError: a clip or image that cannot be read.
        """
        images, videos = [], []
        for part in _visual_parts(messages):
            kind = part["type"]
            source = part.get(kind, part.get("path", part.get("url")))
            if source is None:
                raise ManifestError(f"a {kind} element names no file: write {{'type': '{kind}', '{kind}': PATH}}")
            (images if kind == "image" else videos).append(_located(source, Path(base_dir)))
        text = self._render(messages, add_generation_prompt)
        return self.build(text, images, videos)

    def build(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Sample:
        """Rendered text with one placeholder per image and video → `Sample`."""
        stills = [self._encoder.image(image, **self.image) for image in images]
        encoded = [v if isinstance(v, EncodedVideo) else self._encoder(v) for v in videos]
        groups = [
            self._stream.video(
                v.plan.frame_types.tolist(), v.plan.tokens_per_frame.tolist(), v.plan.timestamps.tolist()
            )
            for v in encoded
        ]
        counts = [int(grid.prod()) // 4 for _, grid in stills]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        input_ids = torch.tensor(self._stream.expand(ids, counts, groups), dtype=torch.long)
        image_grid = torch.cat([grid for _, grid in stills]) if stills else None
        video_grid = torch.cat([v.grid_thw for v in encoded]) if encoded else None
        blocks = [
            (self.token_id(token), grid[:, 1:] // 2)
            for token, grid in ((IMAGE_PAD, image_grid), (VIDEO_PAD, video_grid))
            if grid is not None
        ]
        return Sample(
            input_ids=input_ids,
            labels=self._stream.labels(input_ids),
            position_ids=stream_positions(input_ids, blocks),
            pixel_values=torch.cat([pixels for pixels, _ in stills]) if stills else None,
            image_grid_thw=image_grid,
            pixel_values_videos=torch.cat([v.pixel_values for v in encoded]) if encoded else None,
            video_grid_thw=video_grid,
            plans=[v.plan for v in encoded],
        )

    def collate(self, samples: Sequence[Sample], padding_side: str = "right") -> dict[str, Tensor]:
        """Samples → one padded batch: input_ids, attention_mask, labels `[B, L]`, position_ids `[3, B, L]`, pixels."""
        length = max(len(s) for s in samples)
        rows = len(samples)
        batch = {
            "input_ids": torch.full((rows, length), self.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(rows, length, dtype=torch.long),
            "labels": torch.full((rows, length), IGNORED),
            "position_ids": torch.zeros(3, rows, length, dtype=torch.long),
        }
        for row, sample in enumerate(samples):
            at = slice(length - len(sample), length) if padding_side == "left" else slice(0, len(sample))
            batch["input_ids"][row, at] = sample.input_ids
            batch["attention_mask"][row, at] = 1
            batch["labels"][row, at] = sample.labels
            batch["position_ids"][:, row, at] = sample.position_ids
        for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
            parts = [getattr(s, name) for s in samples if getattr(s, name) is not None]
            if parts:
                batch[name] = torch.cat(parts)
        return batch

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        tokenize: bool = False,
        return_dict: bool = True,
        add_generation_prompt: bool = False,
        **_: Any,
    ) -> Any:
        """Chat messages, or a list of such lists, → text (`tokenize=False`), ids or `BatchFeature` of model inputs."""
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = conversation if batched else [conversation]
        if not tokenize:
            texts = [self._render(messages, add_generation_prompt) for messages in conversations]
            return texts if batched else texts[0]
        samples = [self.sample(m, add_generation_prompt=add_generation_prompt) for m in conversations]
        inputs = self.collate(samples, "left" if add_generation_prompt else "right")
        inputs.pop("labels")
        return BatchFeature(inputs) if return_dict else inputs["input_ids"]

    def __call__(
        self, text: str | Sequence[str], images: Sequence[Any] = (), videos: Sequence[Any] = (), **_: Any
    ) -> BatchFeature:
        """Rendered text(s) with placeholders, and the images and videos they name in order, → model inputs."""
        texts = [text] if isinstance(text, str) else list(text)
        images, videos, samples = list(images or ()), list(videos or ()), []
        for one in texts:
            n, m = one.count(IMAGE_PAD), one.count(VIDEO_PAD)
            samples.append(self.build(one, images[:n], videos[:m]))
            images, videos = images[n:], videos[m:]
        inputs = self.collate(samples, "left")
        inputs.pop("labels")
        return BatchFeature(inputs)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=self.chat_template,
        )


def _visual_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    parts = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ManifestError("a message needs 'role' and 'content': write {'role': 'user', 'content': [...]}")
        if not isinstance(message["content"], str):
            parts += [part for part in message["content"] if part.get("type") in ("image", "video")]
    return parts


def _located(source: Any, base: Path) -> Any:
    """A relative path is looked for beside the manifest; URLs, tensors and encoded videos stay as they are."""
    if isinstance(source, str) and "://" in source or not isinstance(source, str | Path):
        return source
    return base / source


AutoProcessor.register(KeyeConfig, KeyeProcessor)
