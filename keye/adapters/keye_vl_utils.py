"""`process_vision_info` with the interface of keye-vl-utils 1.5.2; only the import changes.

    from keye.adapters.keye_vl_utils import process_vision_info

Arguments, element keys, results and the decisions on the same frames (patch_cosine, 0.9, 30 %, 48–768 tokens per
frame, 65,536 in total) equal the release's. The differences are its errors and gaps:

sampling    at the times i / fps, which the timestamps contain; the release spreads frames over the frame numbers and
            divides them by the average rate, as `sampling="index"` does here.
budget      `video_total_pixels` is never exceeded, and a fast frame never costs more than its share or the minimum.
any clip    under half a second, damaged, black, of one frame, of any aspect; video_start, video_end and nframes work.
upright     rotation of videos and EXIF of images are applied; transparency is blended with white.
shape       pixels are made square and untagged HD is BT.709; the release uses coded pixels and BT.601, as
            `sampling="index"` does here.
URLs        are loaded only if `urls` allows it.
memory      a clip's frames are in memory once, and nothing else that grows with it.

An `encoder` gives another measure, policy or budget.
"""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from keye.encoder import SlowFastEncoder
from keye.errors import KeyeError, ManifestError, VideoError
from keye.slowfast.budget import SIDE, fit_size
from keye.video.clip import open_clip
from keye.video.decoding.containers import open_container
from keye.video.decoding.decoder import Decoder
from keye.video.fetch import UrlRules, data_bytes, download, scheme_of, url_name
from keye.video.images import load_image

Element = dict[str, Any]
Sampling = Literal["time", "index"]

IMAGE_TOKENS = (4, 20_480)  # limits of an image; an image in a list of frames has the limits of a frame


def process_vision_info(
    conversations: Sequence[Element] | Sequence[Sequence[Element]] | None = None,
    vision_infos: Sequence[Element] | None = None,
    image_factor: int = SIDE,
    *,
    encoder: SlowFastEncoder | None = None,
    sampling: Sampling = "time",
    urls: UrlRules | None = None,
) -> tuple[list[Image.Image] | None, list[torch.Tensor] | None, dict[str, list]]:
    """Images, videos and the processor's arguments of one or several conversations.

    Elements are as in keye-vl-utils: "image" or "image_url" (path, `file:`, `data:` or http URL, PIL image) and "video"
    (the same, bytes, or a list of images), with min_pixels, max_pixels, resized_height, resized_width, fps, max_frames,
    video_total_pixels and min_frame_similarity in the same element, and here also nframes, video_start and video_end
    (seconds).

    Args:
        conversations: messages of one conversation, or a list of conversations.
        vision_infos: the elements, instead of conversations.
        image_factor: pixels along one side of a token.
        encoder: `SlowFastEncoder.released()` by default.
        sampling: "time" or "index", see above.
        urls: what may be downloaded.

    Returns:
        images: resized, or None. videos: uint8 `[T, 3, H, W]` at their own size, or None. arguments: lists with one
        entry per video: height, width, fast_height, fast_width in pixels, timestamps `[T]` in seconds, frame_types
        `[T]` int32, 0 slow and 1 fast. A list of images without fps has no timestamps.

    Raises:
        VideoError: an image or video that cannot be read.
        ManifestError, KeyeError: invalid elements or limits.
    """
    if conversations is None and vision_infos is None:
        raise ManifestError("process_vision_info got no messages; give conversations or vision_infos")
    infos = extract_vision_info(conversations) if vision_infos is None else vision_infos
    urls = encoder.urls if urls is None and encoder is not None else urls
    images: list[Image.Image] = []
    videos: list[torch.Tensor] = []
    described: list[dict[str, Any]] = []
    for info in infos:
        if "image" in info or "image_url" in info:
            images.append(fetch_image(info, image_factor, urls=urls))
        elif "video" in info:
            frames, values = fetch_video(info, image_factor, encoder=encoder, sampling=sampling, urls=urls)
            videos.append(frames)
            described.append(values)
        else:
            raise ManifestError(
                f"an element of type {info.get('type')!r} names no source; add image, image_url or video"
            )
    arguments: dict[str, list] = defaultdict(list)
    for key in dict.fromkeys(key for values in described for key in values):
        arguments[key] = [values.get(key) for values in described]
    return images or None, videos or None, arguments


def extract_vision_info(conversations: Sequence[Element] | Sequence[Sequence[Element]]) -> list[Element]:
    """The image and video elements, in order, of one or several conversations."""
    chats = [conversations] if conversations and isinstance(conversations[0], dict) else conversations
    keys, kinds = {"image", "image_url", "video"}, ("image", "image_url", "video")
    elements = [element for chat in chats for message in chat for element in _elements(message)]
    return [element for element in elements if keys & set(element) or element.get("type") in kinds]


def _elements(message: Any) -> list[Element]:
    """The elements of a message, none of a plain text; ManifestError for anything else."""
    if not isinstance(message, Mapping) or "content" not in message:
        raise ManifestError(f"{message!r:.80} is not a message; give dicts with role and content")
    content = message["content"] if isinstance(message["content"], list) else []
    for element in content:
        if not isinstance(element, Mapping):
            raise ManifestError(f"{element!r:.80} is not an element of a message; give dicts with type and content")
    return content


def smart_resize(
    height: int, width: int, factor: int = SIDE, min_pixels: int | None = None, max_pixels: int | None = None
) -> tuple[int, int]:
    """(height, width) in multiples of `factor`, from min_pixels to max_pixels, with the same aspect ratio."""
    fewest = IMAGE_TOKENS[0] if min_pixels is None else max(1, -(-min_pixels // factor**2))
    most = IMAGE_TOKENS[1] if max_pixels is None else max_pixels // factor**2
    return fit_size(height, width, fewest, max(fewest, most), side=factor)


def fetch_image(
    ele: Element, size_factor: int = SIDE, is_video: bool = False, *, urls: UrlRules | None = None
) -> Image.Image:
    """One image element as an RGB image, resized; `is_video`: with the limits of a frame."""
    source = ele["image"] if "image" in ele else ele["image_url"]
    source = source["url"] if isinstance(source, dict) and "url" in source else source
    picture = Image.fromarray(load_image(_plain(source), urls).permute(1, 2, 0).contiguous().numpy())
    if "resized_height" in ele and "resized_width" in ele:
        height, width = smart_resize(ele["resized_height"], ele["resized_width"], size_factor)
    else:
        released = SlowFastEncoder.released()
        limits = (released.min_tokens_per_frame, released.max_tokens_per_frame) if is_video else IMAGE_TOKENS
        least, most = (tokens * SIDE**2 for tokens in limits)
        width, height = picture.size
        height, width = smart_resize(
            height, width, size_factor, int(ele.get("min_pixels", least)), int(ele.get("max_pixels", most))
        )
    return picture.resize((width, height))


def fetch_video(
    ele: Element,
    image_factor: int = SIDE,
    *,
    encoder: SlowFastEncoder | None = None,
    sampling: Sampling = "time",
    urls: UrlRules | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """One video element as (frames uint8 `[T, 3, H, W]`, the processor's arguments)."""
    if sampling not in ("time", "index"):
        raise KeyeError(f'sampling is {sampling!r}; use "time" (true times) or "index" (as keye-vl-utils)')
    encoder = _configured(encoder, ele, image_factor)
    timed = True
    if isinstance(ele["video"], list | tuple):
        frames, times = _listed(ele, image_factor, encoder, urls)
        timed = "fps" in ele
    elif sampling == "index":
        frames, times = _by_index(ele, encoder, urls)
    else:
        frames, times = _by_time(ele, encoder, urls)
    plan = encoder.plan(frames, timestamps=times.tolist())
    if plan.levels is not None:
        raise KeyeError(
            f"the policy {encoder.policy.spec} gives frames more than two sizes, which keye-vl-utils cannot describe;"
            " use another policy, or call the encoder"
        )
    shown = plan.frame_indices
    frames = frames if torch.equal(shown, torch.arange(len(frames))) else frames[shown]
    (height, width), (fast_height, fast_width) = plan.slow_size, plan.fast_size
    values = {"height": height, "width": width, "fast_height": fast_height, "fast_width": fast_width}
    if timed:
        values["timestamps"] = times[shown]
    values["frame_types"] = plan.frame_types.int()
    return frames, values


def _configured(encoder: SlowFastEncoder | None, ele: Element, side: int) -> SlowFastEncoder:
    """The encoder with the settings of the element."""
    base = SlowFastEncoder.released(token_side=side) if encoder is None else encoder
    area = base.token_side**2
    changed: dict[str, Any] = {}
    if "min_pixels" in ele:
        changed["min_tokens_per_frame"] = max(base.min_tokens_per_frame, int(ele["min_pixels"]) // area)
    if "max_pixels" in ele:
        fewest = changed.get("min_tokens_per_frame", base.min_tokens_per_frame)
        changed["max_tokens_per_frame"] = max(fewest, int(ele["max_pixels"]) // area)
    if "video_total_pixels" in ele:
        changed["max_tokens"] = int(ele["video_total_pixels"]) // area
    for key, name in (("min_frame_similarity", "threshold"), ("fps", "fps"), ("max_frames", "max_frames")):
        if key in ele:
            changed[name] = ele[key]
    if not changed:
        return base
    kept = {"measure": base.measure} if "threshold" in changed else {"measure": base.measure, "policy": base.policy}
    return SlowFastEncoder(**{**base.settings, **kept, **changed})


def _by_time(ele: Element, encoder: SlowFastEncoder, urls: UrlRules | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames `[T, 3, H, W]` and times `[T]` of the frames shown at i / fps seconds."""
    wanted = {"start": ele.get("video_start"), "end": ele.get("video_end"), "num_frames": ele.get("nframes")}
    with open_clip(_plain(ele["video"]), encoder.fps, _most_frames(encoder), urls=urls, **wanted) as clip:
        frames = torch.empty(clip.expected, 3, *clip.size, dtype=torch.uint8)
        times = []
        for frame in clip:
            frames[len(times)] = frame.pixels
            times.append(frame.time)
    return frames[: len(times)], torch.tensor(times)


def _by_index(ele: Element, encoder: SlowFastEncoder, urls: UrlRules | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames and times as in the release: spread over the frame numbers, with times from the average rate."""
    if {"video_start", "video_end", "nframes"} & set(ele):
        raise ManifestError('video_start, video_end and nframes need sampling="time", the default')
    source = _plain(ele["video"])
    with ExitStack() as stack:
        name, local = str(source)[:200], source
        if scheme_of(source) == "data":
            name, local = url_name(source), data_bytes(source)
        elif scheme_of(source) in ("http", "https"):
            name, local = url_name(source), stack.enter_context(download(source, urls))
        elif isinstance(source, str | Path) and not Path(source).is_file():
            raise VideoError(f"{source} is not a file; check the path")
        # Pixels as decord returns them: neither made square nor with the colour matrix that their size suggests.
        opened = open_container(io.BytesIO(local) if isinstance(local, bytes) else local, name)
        decoder = Decoder(opened, name, encoder.fps, _most_frames(encoder), as_coded=True)
        stack.callback(decoder.close)
        rate, shown = decoder.rate, decoder.appear
        if not shown:
            raise VideoError(f'the frames of {name} have no times; encode it again, or use sampling="time"')
        count = max(1, min(int(len(shown) / rate * min(encoder.fps, rate)), _most_frames(encoder)))
        indices = torch.linspace(0, len(shown) - 1, count).round().long()
        frames = list(decoder.frames_at([shown[index] for index in indices.tolist()]))
    if not frames:
        raise VideoError(f"no frame of {name} can be decoded; replace it or encode it again")
    times = torch.tensor([index / rate for index in range(len(shown))])[indices]
    return torch.stack([frame.pixels for frame in frames]), times[: len(frames)]


def _listed(
    ele: Element, factor: int, encoder: SlowFastEncoder, urls: UrlRules | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A list of images as frames, resized to the size of one frame, subsampled evenly to fit the budget."""
    common = {key: value for key, value in ele.items() if key not in ("type", "video")}
    sources = list(ele["video"])
    if not sources:
        raise VideoError("a video is a list of 0 images; give one or more")
    kept = torch.linspace(0, len(sources) - 1, min(len(sources), _most_frames(encoder))).round().long().tolist()
    pictures = []
    for index in kept:
        source = sources[index]
        element = source if isinstance(source, dict) else {"image": source, **common}
        pictures.append(torch.from_numpy(np.array(fetch_image(element, factor, True, urls=urls))).permute(2, 0, 1))
    sizes = {tuple(picture.shape[1:]) for picture in pictures}
    if len(sizes) > 1:
        raise VideoError(f"the images of a video come out at {len(sizes)} sizes; give resized_height and resized_width")
    return torch.stack(pictures), torch.tensor([index / encoder.fps for index in kept])


def _most_frames(encoder: SlowFastEncoder) -> int:
    """Most frames that are in memory: those that can be shown."""
    return max(1, min(encoder.most_frames, encoder.max_tokens // encoder.min_tokens_per_frame))


def _plain(source: Any) -> Any:
    """The path in `file://clip.mp4`, which strictly would name a host."""
    if isinstance(source, str) and source.startswith("file://") and Path(source[7:]).exists():
        return source[7:]
    return source
