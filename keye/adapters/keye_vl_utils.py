"""`process_vision_info` with the signature and the meaning of keye-vl-utils 1.5.2; its users switch by one import.

    from keye.adapters.keye_vl_utils import process_vision_info

Arguments, element keys and what comes back are those of the release, and so are its decisions (patch_cosine, 0.9, 30 %,
48–768 tokens a frame, 65,536 in all) on the same frames. What differs is what the release gets wrong or cannot do:

sampling    at true times i / fps, and timestamps that say so, where the release spreads frames over the frame numbers
            and divides them by the average rate; `sampling="index"` does as the release.
budget      `video_total_pixels` is never exceeded, and a fast frame never costs more than its share or the minimum.
any clip    under half a second, damaged, black, of one frame, of any aspect; video_start, video_end and nframes work.
upright     rotation of videos and EXIF of images are obeyed; transparency is laid on white.
shape       pixels are made square and untagged HD is BT.709, where the release takes pixels as they are coded and
            BT.601; `sampling="index"` does as the release.
URLs        are loaded only when `urls` allows it.
memory      a clip's frames are held once, and nothing else that grows with it.

An `encoder` brings another measure, policy or budget than the released ones.
"""

import io
from collections import defaultdict
from collections.abc import Sequence
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

IMAGE_TOKENS = (4, 20_480)  # fewest and most of a still; of a picture in a list of frames, those of a frame


def process_vision_info(
    conversations: Sequence[Element] | Sequence[Sequence[Element]] | None = None,
    vision_infos: Sequence[Element] | None = None,
    image_factor: int = SIDE,
    *,
    encoder: SlowFastEncoder | None = None,
    sampling: Sampling = "time",
    urls: UrlRules | None = None,
) -> tuple[list[Image.Image] | None, list[torch.Tensor] | None, dict[str, list]]:
    """Images, videos and the processor's arguments of one conversation or several.

    Elements are as in keye-vl-utils: "image" or "image_url" (path, `file:`, `data:` or http URL, PIL image) and "video"
    (the same, bytes, or a list of images), with min_pixels, max_pixels, resized_height, resized_width, fps, max_frames,
    video_total_pixels and min_frame_similarity beside it, and here also nframes, video_start and video_end (seconds).

    Returns (images, resized | None; videos uint8 [T, 3, H, W] at their own size | None; lists with one entry for each
    video: height, width, fast_height, fast_width in pixels, timestamps [T] seconds, frame_types [T] int32, 0 slow and 1
    fast). A list of images without fps has no timestamps.

    Raises VideoError for what cannot be read, ManifestError and KeyeError for elements and limits that make no sense.
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
    """The elements with pictures, in order, of one conversation or several."""
    talks = [conversations] if conversations and isinstance(conversations[0], dict) else conversations
    keys, kinds = {"image", "image_url", "video"}, ("image", "image_url", "video")
    return [
        element
        for talk in talks
        for message in talk
        if isinstance(message["content"], list)
        for element in message["content"]
        if keys & set(element) or element.get("type") in kinds
    ]


def smart_resize(
    height: int, width: int, factor: int = SIDE, min_pixels: int | None = None, max_pixels: int | None = None
) -> tuple[int, int]:
    """(height, width) in multiples of `factor` with at least min_pixels and at most max_pixels, aspect kept."""
    fewest = IMAGE_TOKENS[0] if min_pixels is None else max(1, -(-min_pixels // factor**2))
    most = IMAGE_TOKENS[1] if max_pixels is None else max_pixels // factor**2
    return fit_size(height, width, fewest, max(fewest, most), side=factor)


def fetch_image(
    ele: Element, size_factor: int = SIDE, is_video: bool = False, *, urls: UrlRules | None = None
) -> Image.Image:
    """One image element as an RGB picture at its size; `is_video`: with the limits of a frame, not of a still."""
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
    """One video element as (frames uint8 [T, 3, H, W], the processor's arguments for it)."""
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
    shown = plan.frame_indices
    frames = frames if torch.equal(shown, torch.arange(len(frames))) else frames[shown]
    (height, width), (fast_height, fast_width) = plan.slow_size, plan.fast_size
    values = {"height": height, "width": width, "fast_height": fast_height, "fast_width": fast_width}
    if timed:
        values["timestamps"] = times[shown]
    values["frame_types"] = plan.frame_types.int()
    return frames, values


def _configured(encoder: SlowFastEncoder | None, ele: Element, side: int) -> SlowFastEncoder:
    """The encoder with what the element sets."""
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
    """Frames [T, 3, H, W] and times [T] of what is on the screen at i / fps seconds."""
    wanted = {"start": ele.get("video_start"), "end": ele.get("video_end"), "num_frames": ele.get("nframes")}
    with open_clip(_plain(ele["video"]), encoder.fps, encoder.most_frames, urls=urls, **wanted) as clip:
        frames = torch.empty(clip.expected, 3, *clip.size, dtype=torch.uint8)
        times = []
        for frame in clip:
            frames[len(times)] = frame.pixels
            times.append(frame.time)
    return frames[: len(times)], torch.tensor(times)


def _by_index(ele: Element, encoder: SlowFastEncoder, urls: UrlRules | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames and times as the release has them: spread over the frame numbers, timed by the average rate."""
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
            raise VideoError(f"{source} is no file; check the path")
        # Pixels as decord has them: neither stretched to be square nor in the colours that their size suggests.
        opened = open_container(io.BytesIO(local) if isinstance(local, bytes) else local, name)
        decoder = Decoder(opened, name, encoder.fps, encoder.most_frames, as_coded=True)
        stack.callback(decoder.close)
        rate, shown = decoder.rate, decoder.appear
        if not shown:
            raise VideoError(f'the frames of {name} have no times; encode it again, or use sampling="time"')
        count = max(1, min(int(len(shown) / rate * min(encoder.fps, rate)), encoder.most_frames))
        indices = torch.linspace(0, len(shown) - 1, count).round().long()
        frames = list(decoder.frames_at([shown[index] for index in indices.tolist()]))
    if not frames:
        raise VideoError(f"no frame of {name} can be decoded; replace it or encode it again")
    times = torch.tensor([index / rate for index in range(len(shown))])[indices]
    return torch.stack([frame.pixels for frame in frames]), times[: len(frames)]


def _listed(
    ele: Element, factor: int, encoder: SlowFastEncoder, urls: UrlRules | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A list of images as frames, resized to the size of one frame, evenly thinned to what the budget holds."""
    common = {key: value for key, value in ele.items() if key not in ("type", "video")}
    sources = list(ele["video"])
    if not sources:
        raise VideoError("a list of 0 images is no video; give one or more")
    kept = torch.linspace(0, len(sources) - 1, min(len(sources), encoder.most_frames)).round().long().tolist()
    pictures = []
    for index in kept:
        source = sources[index]
        element = source if isinstance(source, dict) else {"image": source, **common}
        pictures.append(torch.from_numpy(np.array(fetch_image(element, factor, True, urls=urls))).permute(2, 0, 1))
    sizes = {tuple(picture.shape[1:]) for picture in pictures}
    if len(sizes) > 1:
        raise VideoError(f"the images of a video come out at {len(sizes)} sizes; give resized_height and resized_width")
    return torch.stack(pictures), torch.tensor([index / encoder.fps for index in kept])


def _plain(source: Any) -> Any:
    """`file://clip.mp4` names a file here, too, though as a URL it would name a machine."""
    if isinstance(source, str) and source.startswith("file://") and Path(source[7:]).exists():
        return source[7:]
    return source
