"""Chat: a conversation with a model about clips and images, without a terminal; `keye chat` is its face.

    chat = Chat.load("runs/mine/gspo/model")
    chat.add_video("clip.mp4")
    for piece in chat.ask("What happens first?"):
        print(piece.text, end="", flush=True)

The keys and values of what was said stay in a cache, so that a later question costs only its own tokens; a clip passes
through the vision tower once.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import DynamicCache

from keye.checkpoint.released_layout import is_released
from keye.checkpoint.shards import read_json
from keye.encoder import EncodedVideo, SlowFastEncoder
from keye.errors import CheckpointError, KeyeError
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
"""Called with the share of a clip that is read, from 0 to 1."""

QUESTION = 256  # tokens that are kept free for a question when a clip is fitted into the context
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    directory: str | Path, device: str = "auto", dtype: str = "auto", urls: UrlRules | None = None
) -> tuple[KeyeForConditionalGeneration, KeyeProcessor]:
    """Model and processor of a directory or hub id, ready to answer.

    Args:
        device: "auto" takes the GPU if there is one. dtype: "auto" keeps the saved one.
        urls: what the processor may download.

    Raises:
        CheckpointError: nothing loadable there. KeyeError: a device or dtype that is not there.
    """
    name = str(directory)
    _check_directory(name)
    if dtype not in DTYPES:
        raise KeyeError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    place = _device(device)
    try:
        processor = KeyeProcessor.from_pretrained(name)
        model = KeyeForConditionalGeneration.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name} cannot be loaded ({reason}); give a directory that a stage or scripts/convert.py wrote"
        ) from error
    if urls is not None:
        processor = KeyeProcessor(
            processor.tokenizer, processor.encoder, processor.image, processor.chat_template, urls=urls
        )
    try:
        return model.to(place).eval(), processor
    except torch.OutOfMemoryError as error:
        raise KeyeError(f"{place} has not the memory for {name}; use --dtype bfloat16 or another device") from error


def _check_directory(name: str) -> None:
    """Say what is wrong with a directory that plainly is none of ours; a hub id may pass."""
    path, mend = Path(name), "give one that a stage or scripts/convert.py wrote"
    if not path.is_dir():
        if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            raise CheckpointError(f"{name} is no model directory; {mend}")
        return
    values = read_json(path / "config.json")
    if values.get("model_type") != KeyeConfig.model_type:
        raise CheckpointError(f"{name} holds a model of type {values.get('model_type')!r}, not a Keye one; {mend}")
    if is_released(values):
        raise CheckpointError(
            f"{name} has the names of the released weights; convert it once: python scripts/convert.py --help shows how"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise KeyeError(f"the device {name!r} cannot be used here; use one of {', '.join(there)}") from error


class Chat:
    """A conversation with its clips, its history and its cache.

    Args:
        system: the system prompt. thinking: True, False or None: `/think`, `/no_think` or nothing behind a question;
            may be changed between questions, as may `sampling`.
        context: most tokens of prompt and reply together; the model's own limit when left out.
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
        """A chat with the model of a directory; see `load_model` for the first three, the class for the rest."""
        return cls(*load_model(directory, device, dtype), **settings)

    def reset(self) -> None:
        """Forget what was said and shown."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        self.plans: list[VideoPlan] = []
        self._shown: list[dict[str, Any]] = []  # media that go with the next question
        self._cache: Any = None
        self._cached: tuple[list[int], list, list] = ([], [], [])

    def add_video(self, source: Any, progress: Progress | None = None) -> VideoPlan:
        """Show a clip with the next question; its plan says what of it the model sees.

        source: what the encoder takes. A clip that is too long for what is left of the context is thinned to fit.

        Raises:
            VideoError: a clip that cannot be read. KeyeError: no room for it, not even for one frame.
        """
        encoder = self.processor._encoder
        video = _encode(encoder, source, progress)
        room = self.context - self.sampling.max_new_tokens - QUESTION
        if self._length(video) > room:
            video = self._fitted(source, room)
        self._shown.append({"type": "video", "video": video})
        self.plans.append(video.plan)
        return video.plan

    def _length(self, video: EncodedVideo) -> int:
        return len(self.processor.sample([*self.messages, self._turn([{"type": "video", "video": video}])]))

    def _fitted(self, source: Any, room: int) -> EncodedVideo:
        """The clip, read again with what is left of the context as its budget."""
        turn = self._turn([{"type": "video", "video": source}])
        sample = self.processor.sample([*self.messages, turn], max_length=max(room, 1))
        plan = sample.plans[-1]
        grid = sample.video_grid_thw[-len(plan) :]
        pixels = sample.pixel_values_videos[-int(grid.prod(1).sum()) :].clone()
        return EncodedVideo(pixels, grid, plan, format=PixelFormat(pixels.dtype))

    def add_image(self, source: Any) -> None:
        """Show an image with the next question. Raises VideoError if it cannot be read."""
        self._shown.append({"type": "image", "image": load_image(source, self.processor._encoder.urls)})

    def ask(self, question: str) -> Iterator[Piece]:
        """The reply, piece by piece; then `figures` says what it took and `messages` holds it, without its thought.

        Closing the iterator stops the model; what was said until then is kept. A question to which nothing was said
        leaves no trace.

        Raises:
            KeyeError: a chat that is longer than the context, an empty question.
        """
        if not question.strip():
            raise KeyeError("the question is empty; write what you want to know")
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
                self.messages += [turn, {"role": "assistant", "content": _said(answering.text)}]
                self._shown = []

    def _turn(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {"role": "user", "content": [*self._shown, *parts]}

    def _inputs(self, sample: Sample) -> dict[str, torch.Tensor]:
        inputs = self.processor.collate([sample])
        return {name: value for name, value in inputs.items() if name != "labels"}

    def _reusable(self, sample: Sample) -> Any:
        """The cache, cut back to what this prompt begins with; an empty one where nothing can be used."""
        known, *seen = self._cached
        ids, shown = sample.input_ids.tolist(), _grids(sample)
        same = next((n for n, pair in enumerate(zip(known, ids, strict=False)) if pair[0] != pair[1]), len(known))
        same = min(same, len(ids) - 1)
        # Placeholders look alike whatever they show: the pictures themselves must be the same, in the same sizes.
        if self._cache is None or not same or any(new[: len(old)] != old for old, new in zip(seen, shown, strict=True)):
            self._cache = DynamicCache(config=self.model.config.text_config)
            if any(getattr(self._cache, "is_sliding", [])):  # what left the window cannot be brought back
                self._cache = None
            return self._cache
        if len(known) > same:
            self._cache.crop(same - len(known))  # a negative number is how many go
        return self._cache

    def _remember(self, answering: Answering, sample: Sample) -> None:
        if answering.sequence is None or self._cache is None:
            self._cache, self._cached = None, ([], [], [])
        else:
            known = answering.sequence[: self._cache.get_seq_length()].tolist()
            self._cached = (known, *_grids(sample))


def _grids(sample: Sample) -> tuple[list, list]:
    """Sizes of all images and frames, to compare."""
    given = (sample.image_grid_thw, sample.video_grid_thw)
    return tuple([] if grid is None else grid.tolist() for grid in given)


def _said(text: str) -> str:
    """What of a reply goes on in the history: thoughts of earlier turns are left out, as in Qwen3's template."""
    behind = text.partition("</think>")[2] if "</think>" in text else text
    return "" if "<think>" in behind else behind.strip() or parse_reply(text).answer


class _Counted:
    """A measure that tells how many frames it has seen."""

    def __init__(self, measure: Any, tick: Callable[[int], None]) -> None:
        self._measure, self._tick, self._seen = measure, tick, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._measure, name)

    def prepare(self, frames: torch.Tensor) -> Any:
        self._seen += len(frames)
        self._tick(self._seen)
        return self._measure.prepare(frames)


def _encode(encoder: SlowFastEncoder, source: Any, progress: Progress | None) -> EncodedVideo:
    """The clip as the encoder has it, its progress told where the source can be opened twice."""
    if progress is None or not isinstance(source, str | Path):
        return encoder(source)
    with open_clip(source, encoder.fps, encoder.most_frames, urls=encoder.urls) as clip:
        expected = max(clip.expected, 1)
    counted = encoder.with_settings()
    counted.measure = _Counted(encoder.measure, lambda seen: progress(min(seen / expected, 1.0)))
    return counted(source)
