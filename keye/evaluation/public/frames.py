"""The clip of a question as the model sees it: the frames of a slow-fast plan or of the authors, and subtitles."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from keye.aggregation.plans import entry_frames
from keye.encoded import EncodedVideo
from keye.encoder import SlowFastEncoder
from keye.errors import VideoError
from keye.evaluation.public.question import PublicBenchmark, PublicQuestion, Subtitle
from keye.video.clip import read_frames_at
from keye.video.decoding.containers import open_container
from keye.video.decoding.decoder import Decoder
from keye.video.decoding.prefetch import reading
from keye.video.images import load_image
from keye.video.stills import image_paths

Frames = Literal["plan", "official"]


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a clip are used.

    Attributes:
        frames: "plan" samples as the encoder does; "official" takes the frames that the authors take.
        num_frames: number of frames, evenly spread for "plan"; None takes the encoder's, or the authors', number.
    """

    frames: Frames = "plan"
    num_frames: int | None = None


def encode(
    question: PublicQuestion, benchmark: PublicBenchmark, encoder: SlowFastEncoder, choice: FrameChoice
) -> EncodedVideo:
    """The clip of a question, with the plan that the encoder makes of the chosen frames; pixels are uint8.

    Raises:
        VideoError: the clip cannot be read.
    """
    source, sampling = question.clip, dict(question.sampling)
    if choice.frames == "official":
        source, sampling = _official(question, benchmark, choice.num_frames)
    elif choice.num_frames is not None:
        sampling["num_frames"] = choice.num_frames
    video = encoder(source, dtype=torch.uint8, **sampling)
    if source is not question.clip:
        video = replace(video, plan=replace(video.plan, source=str(question.clip)))
    return video


def _official(
    question: PublicQuestion, benchmark: PublicBenchmark, count: int | None
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The frames that the authors take, and their times."""
    count = count or benchmark.num_frames
    if question.clip.is_dir():
        paths, rate = image_paths(question.clip), question.sampling["source_fps"]
        chosen = sorted(set(benchmark.frames(question, len(paths), rate, count)))
        pictures, times = [load_image(paths[index]) for index in chosen], [index / rate for index in chosen]
    else:
        appear, rate = clock_of(question.clip)
        chosen = sorted(set(benchmark.frames(question, len(appear), rate, count)))
        found = read_frames_at(question.clip, [appear[index] for index in chosen])
        pictures, times = [frame.pixels for frame in found], [frame.time for frame in found]
    return pictures, {"timestamps": times}


def clock_of(path: Path) -> tuple[list[float], float]:
    """(the seconds at which the frames of a video appear, frames per second).

    Raises:
        VideoError: the file is no video, or its packets have no times.
    """
    with reading():
        decoder = Decoder(open_container(path, str(path)), str(path), 1.0, 1)
        try:
            appear, rate = decoder.appear, decoder.rate
        finally:
            decoder.close()
    if not appear:
        raise VideoError(f"the packets of {path} have no times; encode it again, or use --frames plan")
    return appear, rate


def messages_of(question: PublicQuestion, video: EncodedVideo | None) -> list[dict[str, Any]]:
    """The chat of a question: the clip and its subtitles, and the prompt.

    Without a video, all subtitles are shown, as in the authors' runs without frames.
    """
    *before, last = question.messages
    subtitles, prompt, parts = question.subtitles, question.prompt, []
    if question.heading:
        parts = [] if video is None else [{"type": "video", "video": video}]
        shown = list(subtitles) if video is None else displayed(subtitles, video.plan.timestamps.tolist())
        if shown:
            prompt = "\n".join([question.heading, *(subtitle.text for subtitle in shown), prompt])
    elif video is None:
        parts = [{"type": "text", "text": f"{subtitle.text}\n"} for subtitle in subtitles]
    else:
        parts = interleaved(video, subtitles)
    return [*before, {**last, "content": [*parts, {"type": "text", "text": prompt}]}]


def displayed(subtitles: Sequence[Subtitle], times: Sequence[float]) -> list[Subtitle]:
    """The subtitles that a frame at one of the times shows."""
    return [subtitle for subtitle in subtitles if any(subtitle.start <= time < subtitle.end for time in times)]


def interleaved(video: EncodedVideo, subtitles: Sequence[Subtitle]) -> list[dict[str, Any]]:
    """The frames of one plan as videos with the subtitles between them.

    A subtitle follows the frames until its middle; it is left out if no frame is within it, or within half a second of
    the middle of one that is shorter than a second.
    """
    times = video.plan.timestamps.tolist()
    parts: list[dict[str, Any]] = []
    done = 0
    for subtitle in subtitles:
        middle = (subtitle.start + subtitle.end) / 2
        start, end = subtitle.start, subtitle.end
        if end - start < 1:
            start, end = middle - 0.5, middle + 0.5
        upto = max(done, sum(time <= middle for time in times))
        if upto > done:
            parts.append({"type": "video", "video": part_of(video, done, upto)})
            done = upto
        if any(start < time < end for time in times):
            parts.append({"type": "text", "text": f"{subtitle.text}\n"})
    if done < len(times):
        parts.append({"type": "video", "video": part_of(video, done, len(times))})
    return parts


def part_of(video: EncodedVideo, first: int, stop: int) -> EncodedVideo:
    """The entries first … stop − 1 of an encoded video, with their times, types and sizes."""
    if (first, stop) == (0, len(video.plan)):
        return video
    ends = [0, *video.grid_thw.prod(1).cumsum(0).tolist()]
    frames = entry_frames(video.plan)[first:stop]
    columns = ["frame_types", "timestamps", "frame_indices", "similarity"]
    columns += ["levels"] if video.plan.levels is not None else []
    plan = replace(video.plan, **{name: getattr(video.plan, name)[first:stop] for name in columns})
    shown = slice(min(frames), max(frames) + 1)
    pixels = video.pixel_values[ends[shown.start] : ends[shown.stop]]
    return replace(video, pixel_values=pixels, grid_thw=video.grid_thw[shown], plan=plan)
