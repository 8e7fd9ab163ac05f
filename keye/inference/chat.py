"""Chat: a conversation with a model about clips and images; `keye chat` is its terminal interface.

    chat = Chat.load("runs/mine/gspo/model")
    chat.add_video("clip.mp4")
    for piece in chat.ask("What happens first?"):
        print(piece.text, end="", flush=True)

The keys and values of the conversation stay in a cache, so that a later question costs only its own tokens; a clip is
encoded once.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from keye.aggregation.plans import encoded_sizes
from keye.checkpoint.released_layout import is_released
from keye.checkpoint.shards import read_json
from keye.encoder import EncodedVideo, SlowFastEncoder
from keye.errors import CheckpointError, KeyeError, loading
from keye.inference.answering import Answering, Figures, Piece, Sampling
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.reply import parse_reply
from keye.slowfast.pixels import PixelFormat
from keye.slowfast.plan import VideoPlan
from keye.video.clip import open_clip
from keye.video.fetch import UrlRules
from keye.video.images import load_image

Progress = Callable[[float], None]
"""Called with the fraction of a clip that is read, from 0 to 1."""

QUESTION_TOKENS = 256  # tokens reserved for a question when a clip is fitted into the context
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    directory: str | Path, device: str = "auto", dtype: str = "auto", urls: UrlRules | None = None
) -> tuple[KeyeForConditionalGeneration, KeyeProcessor]:
    """Model and processor of a directory or hub id, ready to answer.

    Args:
        directory: a local directory or a hub id.
        device: "auto" uses the GPU if there is one.
        dtype: one of `DTYPES`; "auto" uses the saved dtype.
        urls: what the processor may download.

    Raises:
        CheckpointError: no model that can be loaded. KeyeError: an unavailable device or unknown dtype.
    """
    name = str(directory)
    _check_directory(name)
    if dtype not in DTYPES:
        raise KeyeError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    place = _device(device)
    with loading(name):
        processor = KeyeProcessor.from_pretrained(name)
        model = KeyeForConditionalGeneration.from_pretrained(name, dtype=dtype)
    if urls is not None:
        processor = KeyeProcessor(
            processor.tokenizer, processor.encoder, processor.image, processor.chat_template, urls=urls
        )
    try:
        return model.to(place).eval(), processor
    except torch.OutOfMemoryError as error:
        raise KeyeError(
            f"{name} does not fit into the memory of {place}; use --dtype bfloat16 or another device"
        ) from error


def _check_directory(name: str) -> None:
    """Raise CheckpointError for a directory that is not Keye's; a hub id is accepted."""
    path, remedy = Path(name), "give one that a stage or keye convert wrote"
    if not path.is_dir():
        if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            raise CheckpointError(f"{name} is not a model directory; {remedy}")
        return
    values = read_json(path / "config.json")
    if values.get("model_type") != KeyeConfig.model_type:
        raise CheckpointError(f"{name} has a model of type {values.get('model_type')!r}, not Keye; {remedy}")
    if is_released(values):
        raise CheckpointError(
            f"{name} has the names of the released weights; convert it with keye convert (see keye convert --help)"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise KeyeError(f"the device {name!r} cannot be used here; use one of {', '.join(known)}") from error


class Chat:
    """A conversation with its clips, its history and its cache.

    Args:
        model, processor: see `load_model`.
        system: the system prompt.
        thinking: True, False or None: the suffix `/think`, `/no_think` or none of a question; it may be changed
            between questions, as may `sampling`.
        sampling: how replies are generated.
        context: most tokens of prompt and reply together; the model's limit by default.
    """

    def __init__(
        self,
        model: KeyeForConditionalGeneration,
        processor: KeyeProcessor,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        sampling: Sampling | None = None,
        context: int | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.system, self.thinking, self.sampling = system, thinking, sampling or Sampling()
        self.context = context or model.config.text_config.max_position_embeddings
        self.figures = Figures()
        self.reset()

    @classmethod
    def load(cls, directory: str | Path, device: str = "auto", dtype: str = "auto", **settings: Any) -> "Chat":
        """A chat with the model of a directory; see `load_model` for three arguments, the class for the rest."""
        return cls(*load_model(directory, device, dtype), **settings)

    def reset(self) -> None:
        """Clear the conversation and its media."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        self.plans: list[VideoPlan] = []
        self._media: list[dict[str, Any]] = []  # of the next question
        self._cache: Any = None
        self._cached: tuple[list[int], list, list, list] = ([], [], [], [])

    def add_video(self, source: Any, progress: Progress | None = None) -> VideoPlan:
        """Add a clip to the next question; its plan lists the frames that the model sees.

        Args:
            source: as the encoder takes it. A clip that is too long for the rest of the context is made smaller.
            progress: called with the fraction of the clip that is read.

        Raises:
            VideoError: a clip that cannot be read. KeyeError: the context has no room for one frame.
        """
        encoder = self.processor._encoder
        video = _encode(encoder, source, progress)
        room = self.context - self.sampling.max_new_tokens - QUESTION_TOKENS
        if self._length(video) > room:
            video = self._fitted(source, room)
        self._media.append({"type": "video", "video": video})
        self.plans.append(video.plan)
        return video.plan

    def _length(self, video: EncodedVideo) -> int:
        return len(self.processor.sample([*self.messages, self._turn([{"type": "video", "video": video}])]))

    def _fitted(self, source: Any, room: int) -> EncodedVideo:
        """The clip, read again with the rest of the context as its budget."""
        turn = self._turn([{"type": "video", "video": source}])
        sample = self.processor.sample([*self.messages, turn], max_length=max(room, 1))
        plan = sample.plans[-1]
        grid = sample.video_grid_thw[-len(encoded_sizes(plan)) :]
        pixels = sample.pixel_values_videos[-int(grid.prod(1).sum()) :].clone()
        return EncodedVideo(pixels, grid, plan, format=PixelFormat(pixels.dtype))

    def add_image(self, source: Any) -> None:
        """Add an image to the next question. Raises VideoError if it cannot be read."""
        self._media.append({"type": "image", "image": load_image(source, self.processor._encoder.urls)})

    def ask(self, question: str) -> Iterator[Piece]:
        """The reply in pieces; then `figures` has its statistics and `messages` its text, without the thought.

        Closing the iterator stops the model; the text until then is kept. A question without a reply is not kept.

        Raises:
            KeyeError: a chat that is longer than the context, or an empty question.
        """
        if not question.strip():
            raise KeyeError("the question is empty; write one")
        turn = self._turn([{"type": "text", "text": question}])
        if self.thinking is not None:
            turn["thinking"] = self.thinking
        sample = self.processor.sample(
            [*self.messages, turn], add_generation_prompt=True, max_length=self.context - 1, thinking=self.thinking
        )
        room = self.context - len(sample)
        sampling = replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room))
        answering = Answering(
            self.model, self.processor.tokenizer, self._inputs(sample), sampling, self._reusable(sample)
        )
        try:
            yield from answering
        finally:
            self.figures = answering.figures
            self._remember(answering, sample)
            if answering.text:
                self.messages += [turn, {"role": "assistant", "content": _reply_for_history(answering.text)}]
                self._media = []

    def _turn(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {"role": "user", "content": [*self._media, *parts]}

    def _inputs(self, sample: Sample) -> dict[str, torch.Tensor]:
        inputs = self.processor.collate([sample])
        return {name: value for name, value in inputs.items() if name != "labels"}

    def _reusable(self, sample: Sample) -> Any:
        """The cache, cropped to its common prefix with this prompt; an empty one if there is none."""
        known, *cached_grids = self._cached
        ids, grids = sample.input_ids.tolist(), _grids(sample)
        same = next((n for n, pair in enumerate(zip(known, ids, strict=False)) if pair[0] != pair[1]), len(known))
        same = min(same, len(ids) - 1)
        # All placeholders have the same id, so the sizes of the images and frames must be equal as well.
        changed = any(new[: len(old)] != old for old, new in zip(cached_grids, grids, strict=True))
        if self._cache is None or not same or changed:
            self._cache = DynamicCache(config=self.model.config.text_config)
            if any(getattr(self._cache, "is_sliding", [])):  # tokens outside the window are lost
                self._cache = None
            return self._cache
        if len(known) > same:
            self._cache.crop(same - len(known))  # a negative number removes so many
        return self._cache

    def _remember(self, answering: Answering, sample: Sample) -> None:
        if answering.sequence is None or self._cache is None:
            self._cache, self._cached = None, ([], [], [], [])
        else:
            known = answering.sequence[: self._cache.get_seq_length()].tolist()
            self._cached = (known, *_grids(sample))


def _grids(sample: Sample) -> tuple[list, list, list]:
    """The sizes of all images and frames, and what is read of the frames."""
    given = (sample.image_grid_thw, sample.video_grid_thw, sample.video_blocks)
    return tuple([] if grid is None else grid.tolist() for grid in given)


def _reply_for_history(text: str) -> str:
    """A reply as the history keeps it: without its thought, as in Qwen3's template."""
    after = text.partition("</think>")[2] if "</think>" in text else text
    return "" if "<think>" in after else after.strip() or parse_reply(text).answer


class _CountingMeasure:
    """A measure that reports how many frames it has processed."""

    def __init__(self, measure: Any, report: Callable[[int], None]) -> None:
        self._measure, self._report, self._frames = measure, report, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._measure, name)

    def prepare(self, frames: torch.Tensor) -> Any:
        self._frames += len(frames)
        self._report(self._frames)
        return self._measure.prepare(frames)


def _encode(encoder: SlowFastEncoder, source: Any, progress: Progress | None) -> EncodedVideo:
    """The encoded clip; progress is reported if the source can be opened twice."""
    if progress is None or not isinstance(source, str | Path):
        return encoder(source)
    with open_clip(source, encoder.fps, encoder.most_frames, urls=encoder.urls) as clip:
        expected = max(clip.expected, 1)
    counted = encoder.with_settings()
    counted.measure = _CountingMeasure(encoder.measure, lambda frames: progress(min(frames / expected, 1.0)))
    return counted(source)
