"""The encoder's frames and sizes for the Qwen2-VL, Qwen2.5-VL and Qwen3-VL processors of transformers.

    inputs = to_qwen(processor, messages, SlowFastEncoder(token_side=32))
    model.generate(**inputs)

These processors take videos of one frame size only, and they merge frames in pairs. Therefore there are two modes:

"video"   Each run of consecutive frames of one size is a separate video, in time order. n frames of a run cost
          ceil(n / 2) times the tokens of its size: at most the plan's number, about half of it in long runs. A run of
          an odd length repeats its last frame, as the processors do.
"images"  Each frame is an image after its time. The number of visual tokens equals the plan's.

Nothing is resized or sampled again: the model gets the encoder's frames. Times are exact: Qwen3-VL writes them into the
text, Qwen2.5-VL uses them for its positions within a run. If the processor writes no times, one precedes each run or
image in Qwen3-VL's format, `<12.5 seconds>`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

from keye.encoder import EncodedVideo, SlowFastEncoder
from keye.errors import KeyeError, ManifestError
from keye.slowfast.budget import SIDE, fit_size
from keye.slowfast.plan import VideoPlan
from keye.slowfast.resizing import resize
from keye.video.clip import Source
from keye.video.images import load_image

if TYPE_CHECKING:
    from transformers import BatchFeature, ProcessorMixin

Mode = Literal["video", "images"]
Message = dict[str, Any]

CLOCK = 1000  # time units per second for the processors
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"


@dataclass(frozen=True)
class Run:
    """Consecutive frames of one size: frames uint8 `[n, 3, h, w]`, times in seconds."""

    frames: torch.Tensor
    times: tuple[float, ...]


@dataclass(frozen=True)
class ClipFrames:
    """The frames of a clip that the encoder chose, in time order, for any model that takes frames.

    frames: T tensors uint8 `[3, h, w]`. sizes: their (height, width). timestamps: T seconds. plan: the VideoPlan.
    """

    frames: list[torch.Tensor]
    sizes: list[tuple[int, int]]
    timestamps: list[float]
    plan: VideoPlan

    @property
    def rate(self) -> float:
        """Frames per second: the encoder's rate if the timestamps agree with it within 5 %, else the measured rate.

        Frames rarely have exactly the sample times; with a rate of 2.03 instead of 2, Qwen2.5-VL, which rounds down,
        would place them a step too early.
        """
        requested = float(self.plan.settings["fps"])
        span = self.timestamps[-1] - self.timestamps[0]
        if span <= 0:
            return requested
        measured = (len(self.timestamps) - 1) / span
        return requested if abs(measured / requested - 1) < 0.05 else measured

    @cached_property
    def runs(self) -> list[Run]:
        """Groups of consecutive frames of one size."""
        starts = [i for i in range(len(self.sizes)) if i == 0 or self.sizes[i] != self.sizes[i - 1]]
        ends = [*starts[1:], len(self.sizes)]
        return [
            Run(torch.stack(self.frames[start:end]), tuple(self.timestamps[start:end]))
            for start, end in zip(starts, ends, strict=True)
        ]


def clip_frames(video: Source | EncodedVideo, encoder: SlowFastEncoder) -> ClipFrames:
    """The frames, sizes and timestamps that `encoder` chooses for a video, or those of an encoded one."""
    encoded = video if isinstance(video, EncodedVideo) else encoder(video)
    plan = encoded.plan
    return ClipFrames(encoded.pictures(), plan.frame_sizes, plan.timestamps.tolist(), plan)


def visual_tokens(plan: VideoPlan, mode: Mode = "video", merge: int = 2) -> int:
    """The number of visual tokens of a planned clip in a Qwen-VL model, which merges `merge` frames of a video."""
    counts, sizes = plan.tokens_per_frame.tolist(), plan.frame_sizes
    if _check_mode(mode) == "images":
        return sum(counts)
    total, length = 0, 0
    for i, count in enumerate(counts):
        length = 1 if i == 0 or sizes[i] != sizes[i - 1] else length + 1
        total += count * (length % merge == 1 or merge == 1)  # counted at the first of each `merge` frames
    return total


def to_qwen(
    processor: "ProcessorMixin",
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    encoder: SlowFastEncoder | None = None,
    *,
    mode: Mode = "video",
    add_generation_prompt: bool = True,
) -> "BatchFeature":
    """Chat messages with videos, or a list of such conversations, as inputs of `model(**inputs)` and `generate`.

    Args:
        processor: of Qwen2-VL, Qwen2.5-VL, Qwen3-VL or a derived model.
        messages: in the usual format; a video is {"type": "video", "video": source}, with any source that the encoder
            takes or an EncodedVideo; images {"type": "image", "image": source} get the processor's own sizes.
        encoder: its `token_side` must be the processor's patch size times its merge size (28 for Qwen2.5-VL, 32 for
            Qwen3-VL); by default one that fits.
        mode: "video" or "images", see above.
        add_generation_prompt: start a reply; several conversations are then padded on the left.

    Raises:
        KeyeError: encoder and processor do not fit.
        ManifestError: messages that are not in the format.
        VideoError: a video or image that cannot be read.
    """
    _check_mode(mode)
    side = _token_side(processor)
    encoder = SlowFastEncoder(token_side=side) if encoder is None else encoder
    conversations = [messages] if messages and isinstance(messages[0], dict) else list(messages)
    parts = [part for conversation in conversations for part in _visual_parts(conversation)]
    stills = [load_image(source, encoder.urls) for kind, source in parts if kind == "image"]
    clips = [_fitting(clip_frames(source, encoder), side) for kind, source in parts if kind == "video"]
    texts = [_render(processor, conversation, add_generation_prompt) for conversation in conversations]
    text_kwargs: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
    if add_generation_prompt:
        text_kwargs["padding_side"] = "left"
    if mode == "images":
        images = _in_order(processor, parts, stills, clips, side)
        texts = _expand(texts, processor, clips, lambda clip: _as_images(processor, clip))
        images_kwargs = {"do_resize": False, "input_data_format": "channels_first"}
        return processor(text=texts, images=images or None, images_kwargs=images_kwargs, **text_kwargs)
    runs = [(clip, run) for clip in clips for run in clip.runs]
    texts = _expand(texts, processor, clips, lambda clip: _as_videos(processor, clip))
    videos_kwargs = {
        "do_resize": False,
        "do_sample_frames": False,
        "input_data_format": "channels_first",
        "video_metadata": [_metadata(clip, run) for clip, run in runs],
    }
    if not runs:
        videos_kwargs = {}
    elif "cap_pixels_per_frame" in processor.video_processor.valid_kwargs.__annotations__:
        videos_kwargs["cap_pixels_per_frame"] = False  # avoids a warning about resizing, which is off
    return processor(
        text=texts,
        images=stills or None,
        images_kwargs={"input_data_format": "channels_first"} if stills else {},
        videos=[run.frames for _, run in runs] or None,
        videos_kwargs=videos_kwargs,
        **text_kwargs,
    )


def _check_mode(mode: str) -> str:
    if mode not in ("video", "images"):
        raise KeyeError(f'mode is {mode!r}; use "video" (runs of frames) or "images" (every frame an image)')
    return mode


def _token_side(processor: "ProcessorMixin") -> int:
    """Pixels along one side of a token."""
    try:
        return processor.image_processor.patch_size * processor.image_processor.merge_size
    except AttributeError:
        name = type(processor).__name__
        raise KeyeError(f"{name} has no patch_size and merge_size; give a Qwen2-VL, Qwen2.5-VL or Qwen3-VL") from None


def _fitting(clip: ClipFrames, side: int) -> ClipFrames:
    if any(length % side for size in clip.sizes for length in size):
        used = clip.plan.settings.get("token_side", SIDE)
        raise KeyeError(
            f"the encoder makes frames of multiples of {used} pixels and the processor needs multiples of {side};"
            f" build it with token_side={side}"
        )
    return clip


def _visual_parts(messages: Sequence[Message]) -> list[tuple[str, Any]]:
    """(image or video, source) of every visual element in order."""
    parts = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ManifestError("a message needs 'role' and 'content': write {'role': 'user', 'content': [...]}")
        for part in [] if isinstance(message["content"], str) else message["content"]:
            kind = part.get("type")
            if kind not in ("image", "video"):
                continue
            others = sorted(set(part) - {"type", kind, "path", "url"})
            if others:
                raise ManifestError(f"a {kind} element has {', '.join(others)}; set sampling and limits on the encoder")
            source = part.get(kind, part.get("path", part.get("url")))
            if source is None:
                raise ManifestError(f"a {kind} element names no file: write {{'type': '{kind}', '{kind}': PATH}}")
            parts.append((kind, source))
    return parts


def _render(processor: "ProcessorMixin", messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """The chat as text, with one placeholder per image and video; templates need types, not sources."""

    def plain(part: dict[str, Any]) -> dict[str, Any]:
        kind = part.get("type")
        return {"type": kind, kind: kind} if kind in ("image", "video") else part

    bare = [
        {**message, "content": content if isinstance(content := message["content"], str) else list(map(plain, content))}
        for message in messages
    ]
    return processor.apply_chat_template(bare, tokenize=False, add_generation_prompt=add_generation_prompt)


def _expand(texts: list[str], processor: "ProcessorMixin", clips: list[ClipFrames], show: Any) -> list[str]:
    """Each video's placeholder replaced by the text of `show` for its clip."""
    pattern = re.compile(re.escape(VISION_START + processor.video_token + VISION_END))
    found = sum(len(pattern.findall(text)) for text in texts)
    if found != len(clips):
        raise ManifestError(
            f"the chat template wrote {found} placeholders {pattern.pattern} for {len(clips)} videos;"
            " use a template of Qwen-VL and keep its special tokens out of the texts".replace("\\", "")
        )
    following = iter(clips)
    return [pattern.sub(lambda _: show(next(following)), text) for text in texts]


def _as_images(processor: "ProcessorMixin", clip: ClipFrames) -> str:
    image = VISION_START + processor.image_token + VISION_END
    return "".join(f"<{time:.1f} seconds>{image}" for time in clip.timestamps)


def _as_videos(processor: "ProcessorMixin", clip: ClipFrames) -> str:
    video = VISION_START + processor.video_token + VISION_END
    runs = clip.runs
    writes_times = hasattr(processor, "_calculate_timestamps")  # Qwen3-VL: one before each pair of frames
    if writes_times or len(runs) == 1:
        return video * len(runs)
    return "".join(f"<{run.times[0]:.1f} seconds>{video}" for run in runs)


def _metadata(clip: ClipFrames, run: Run) -> dict[str, Any]:
    """The run as frames of a clip with `CLOCK` frames per second: it has exact times and the exact rate."""
    count = len(run.times)
    height, width = run.frames.shape[-2:]
    return {
        "total_num_frames": max(count, round(count * CLOCK / clip.rate)),
        "fps": CLOCK,
        "frames_indices": [round(time * CLOCK) for time in run.times],
        "duration": count / clip.rate,
        "height": height,
        "width": width,
    }


def _in_order(
    processor: "ProcessorMixin",
    parts: list[tuple[str, Any]],
    stills: list[torch.Tensor],
    clips: list[ClipFrames],
    side: int,
) -> list[torch.Tensor]:
    """Images at the processor's sizes and the clips' frames, in the order of the text."""
    limits = processor.image_processor.size
    fewest = math.ceil(limits["shortest_edge"] / side**2)
    most = max(fewest, limits["longest_edge"] // side**2)
    still, clip = iter(stills), iter(clips)
    images: list[torch.Tensor] = []
    for kind, _ in parts:
        if kind == "video":
            images += next(clip).frames
        else:
            picture = next(still)
            size = fit_size(*picture.shape[1:], fewest, most, side)
            images.append(resize(picture[None], size, "bicubic")[0])
    return images
