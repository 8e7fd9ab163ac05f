"""An encoded prompt as chat messages for a server: its text, and its frames as the plan has them.

A video is sent as the part {"type": "video_plan", "video_plan": {"plan": …, "frames": [PNG, …]}}, which `keye serve`
reads: every frame has its size in the plan, so the server computes the same tokens from the same pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

from PIL import Image
from torch import Tensor

from keye.aggregation.plans import encoded_sizes
from keye.encoded import EncodedVideo
from keye.processor.processor import KeyeProcessor, Sample
from keye.processor.stream import IM_END, IM_START, IMAGE_PAD, VISION_END, VISION_START
from keye.slowfast.pixels import PixelFormat

Part = dict[str, Any]


def messages_of(sample: Sample, processor: KeyeProcessor) -> list[dict[str, Any]]:
    """The chat of a prompt without the assistant's opening, for a server with the same tokenizer and template."""
    start, end = processor.token_id(IM_START), processor.token_id(IM_END)
    ids, stills, videos = sample.input_ids.tolist(), _stills(sample), _videos(sample)
    messages = []
    for place, token in enumerate(ids):
        if token == start and end in ids[place:]:
            turn = ids[place + 1 : ids.index(end, place)]
            parts = list(_parts(turn, processor, stills, videos))
            role, _, text = parts[0]["text"].partition("\n")
            content = [{"type": "text", "text": text}, *parts[1:]] if text else parts[1:]
            messages.append({"role": role, "content": content})
    return messages


def _parts(turn: list[int], processor: KeyeProcessor, stills: Iterator[Part], videos: Iterator[Part]) -> Iterator[Part]:
    """The texts and media of a turn's ids, in order."""
    opening, closing = processor.token_id(VISION_START), processor.token_id(VISION_END)
    while turn:
        stop = turn.index(opening) if opening in turn else len(turn)
        if stop:
            yield {"type": "text", "text": processor.tokenizer.decode(turn[:stop], skip_special_tokens=False)}
        if stop < len(turn):
            is_still = turn[stop + 1] == processor.token_id(IMAGE_PAD)
            yield next(stills if is_still else videos)
            stop = turn.index(closing, stop) + 1
        turn = turn[stop:]


def _stills(sample: Sample) -> Iterator[Part]:
    if sample.image_grid_thw is not None:
        for picture in _pictures(sample.pixel_values, sample.image_grid_thw):
            yield {"type": "image_url", "image_url": {"url": _png(picture)}}


def _videos(sample: Sample) -> Iterator[Part]:
    if sample.video_grid_thw is None:
        return
    pictures = iter(_pictures(sample.pixel_values_videos, sample.video_grid_thw))
    for plan in sample.plans:
        frames = [_png(next(pictures)) for _ in encoded_sizes(plan)]
        yield {"type": "video_plan", "video_plan": {"plan": plan.to_dict(), "frames": frames}}


def _pictures(pixels: Tensor, grid: Tensor) -> list[Tensor]:
    """Frames uint8 [3, h, w] from patches [N, 3, p, p], bytes or floats in [−1, 1]."""
    return EncodedVideo(pixels, grid, None, format=PixelFormat(pixels.dtype)).pictures()


def _png(picture: Tensor) -> str:
    """A picture uint8 [3, h, w] as a data: URL, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
