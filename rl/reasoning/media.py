"""A question's messages as an endpoint accepts them: videos as the frames of their plan, or as clips."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import mimetypes
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from keye.encoder import SlowFastEncoder
from keye.errors import KeyeError
from keye.processor.messages import Visual, read_chat
from keye.processor.options import still_limits, video_encoder
from keye.slowfast.policies import SLOW
from keye.video.fetch import scheme_of
from rl.questions.prompts import Prompt

Send = Literal["frames", "clip"]

_CLIP = ("start", "end", "fps")  # options that the server accepts with a clip
_CLIP_TOKENS = 75_000  # the report's budget of a video
_PATCH = 14


@dataclass
class Shown:
    """messages: in OpenAI's form. files, visual_tokens: see `Ask`. plans: (slow, fast) frames of each video sent as
    frames."""

    messages: list[dict[str, Any]]
    files: dict[str, str] = field(default_factory=dict)
    visual_tokens: int = 0
    plans: list[tuple[int, int]] = field(default_factory=list)


class Media:
    """Turns questions into requests.

    Args:
        send: "frames": each video as the frames of its slow-fast plan, at the plan's sizes, each after a text with its
            second and type. "clip": each video as a file, for `keye serve` and local models, which make the plan
            themselves.
        max_tokens: budget of a video's plan in tokens, and of an image, for "frames".
        clip_root: for "clip", the folder that the server was started with as --media-root; paths are sent relative to
            it. None sends the file's content.
        local: for "clip", send absolute paths.
    """

    def __init__(
        self, send: Send = "frames", max_tokens: int = 8_000, clip_root: Path | None = None, local: bool = False
    ) -> None:
        self.send, self.clip_root, self.local = send, clip_root, local
        self.encoder = SlowFastEncoder(max_tokens=max_tokens)
        self.max_tokens = max_tokens

    def settings(self) -> dict[str, Any]:
        """What determines the requests, for the record of a step."""
        return {"send": self.send} | ({"max_visual_tokens": self.max_tokens} if self.send == "frames" else {})

    def show(self, prompt: Prompt) -> Shown:
        """The messages of a question with its media.

        Raises:
            KeyeError: a video or image cannot be read, or has an option that cannot be sent.
        """
        chat = read_chat(prompt.messages, prompt.base_dir, generating=True)
        shown, visuals = Shown([]), iter(chat.visuals)
        for message in chat.messages:
            content = message["content"]
            if not isinstance(content, str):
                content = [new for part in content for new in self._part(part, visuals, shown)]
            shown.messages.append({"role": message["role"], "content": content})
        return shown

    def _part(self, part: dict[str, Any], visuals: Any, shown: Shown) -> list[dict[str, Any]]:
        if "text" in part:
            return [{"type": "text", "text": part["text"]}]
        visual = next(visuals)
        if visual.kind == "image":
            return [self._image(visual, shown)]
        return self._clip(visual, shown) if self.send == "clip" else self._frames(visual, shown)

    def _image(self, visual: Visual, shown: Shown) -> dict[str, Any]:
        limits = still_limits(self.encoder, {"max_tokens": self.max_tokens}, visual.options)
        pixels, grid = self.encoder.image(visual.source, dtype=torch.uint8, **limits)
        _, rows, columns = grid[0].tolist()
        picture = pixels.reshape(rows, columns, 3, _PATCH, _PATCH).permute(2, 0, 3, 1, 4)
        return _picture(picture.reshape(3, rows * _PATCH, columns * _PATCH), shown)

    def _frames(self, visual: Visual, shown: Shown) -> list[dict[str, Any]]:
        encoder, sampling = video_encoder(self.encoder, visual.options)
        video = encoder(visual.source, dtype=torch.uint8, **sampling)
        slow, fast = video.plan.counts
        shown.plans.append((slow, fast))
        about = f"A video as {slow + fast} frames in the order of time, each after its second."
        if fast:
            about += f" {fast} of them are small (fast): they are similar to the latest large one (slow) before them."
        parts = [{"type": "text", "text": about}]
        kinds, times = video.plan.frame_types.tolist(), video.plan.timestamps.tolist()
        for entry, (kind, second) in enumerate(zip(kinds, times, strict=True)):
            parts.append({"type": "text", "text": f"{second:.1f} s, {'slow' if kind == SLOW else 'fast'}:"})
            parts.append(_picture(video.picture(entry), shown))
        return parts

    def _clip(self, visual: Visual, shown: Shown) -> list[dict[str, Any]]:
        refused = sorted(set(visual.options) - set(_CLIP))
        if refused or not isinstance(visual.source, str | os.PathLike):
            what = f"the option {refused[0]}" if refused else "a list of pictures"
            raise KeyeError(f"{what} of a video cannot be sent with a clip; use --send frames")
        url = str(visual.source)
        if not scheme_of(url):
            path = Path(url).resolve()
            if not path.is_file():
                raise KeyeError(f"{path} is not a file; use --send frames for folders of frames, or correct the path")
            digest = _digest(path, path.stat().st_mtime_ns)
            url = self._address(path)
            shown.files[url] = digest
        shown.visual_tokens += _CLIP_TOKENS
        return [{"type": "video_url", "video_url": {"url": url}, **visual.options}]

    def _address(self, path: Path) -> str:
        if self.local:
            return str(path)
        if self.clip_root is None:
            kind = mimetypes.guess_type(path.name)[0] or "video/mp4"
            return f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode()
        root = self.clip_root.resolve()
        if not path.is_relative_to(root):
            raise KeyeError(f"{path} is not in --clip-root {root}; give the server's --media-root with all clips in it")
        return str(path.relative_to(root))


@functools.lru_cache(4096)
def _digest(path: Path, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _picture(pixels: torch.Tensor, shown: Shown) -> dict[str, Any]:
    """A picture uint8 [3, h, w] as a part of a message."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=90)
    # Patches of 14 pixels without merging; services that count tiles of 512 pixels charge at least 255.
    shown.visual_tokens += max(300, -(-pixels.shape[1] // _PATCH) * -(-pixels.shape[2] // _PATCH))
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}
