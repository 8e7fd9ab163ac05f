"""TRL's conversational preference form of a pair: `prompt`, `chosen` and `rejected` as lists of messages.

Images are in the column `images`, in the order of the parts `{"type": "image"}` of the prompt. TRL has no column for
videos. Read are also an explicit prompt as a text, and the form with an implicit prompt, whose `chosen` and `rejected`
are complete chats with a common beginning.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from keye.errors import ManifestError
from keye.processor.messages import KINDS
from keye.video.fetch import scheme_of

Row = dict[str, Any]


def to_conversational(messages: list[Row], chosen: str, rejected: str, base: Path, where: str) -> Row:
    """A pair in TRL's form; options of images, such as their largest number of tokens, have no place in it.

    Args:
        messages: the chat up to the answer; paths are relative to `base`. where: `file:line`, for the error.

    Returns:
        `prompt`, `chosen`, `rejected`, and `images` where there are some, as absolute paths or URLs: TRL opens them
        from any folder. A message without media has its text as `content`.

    Raises:
        ManifestError: the chat has a video, or an image that is not given by path or URL.
    """
    images: list[str] = []
    prompt = [message | {"content": _content(message["content"], images, base, where)} for message in messages]
    answers = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    row = {"prompt": prompt, **dict(zip(("chosen", "rejected"), answers, strict=True))}
    return row | ({"images": images} if images else {})


def has_video(messages: list[Row]) -> bool:
    """Whether a chat has a video."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    parts = (part for content in contents for part in content)
    return any(KINDS.get(name) == "video" for part in parts for name in (part.get("type"), *part))


def _content(content: str | list[Row], images: list[str], base: Path, where: str) -> str | list[Row]:
    """The content with images as placeholders, which are appended to `images`."""
    if isinstance(content, str):
        return content
    if all(set(part) <= {"type", "text"} for part in content):
        return "".join(part["text"] for part in content)
    parts: list[Row] = []
    for part in content:
        if "text" in part:
            parts.append({"type": "text", "text": part["text"]})
            continue
        given = next((part[name] for name in ("image", "path", "url", "image_url") if name in part), None)
        given = given.get("url") if isinstance(given, dict) else given
        if has_video([{"content": [part]}]) or not isinstance(given, str):
            raise ManifestError(
                f"{where} has a medium that TRL has no column for: write images by path or URL, or the form messages"
            )
        parts.append({"type": "image"})
        images.append(given if scheme_of(given) else os.path.abspath(base / given))
    return parts


def from_conversational(text: str) -> str:
    """A line of JSON in TRL's form as one with `messages`, `chosen` and `rejected`; any other line unchanged."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return text  # the reader of lines says what is wrong
    if not isinstance(row, dict) or "messages" in row or not {"chosen", "rejected"} <= row.keys():
        return text
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    lists = isinstance(chosen, list) and isinstance(rejected, list)
    if lists and len(chosen) > 1 and chosen[:-1] == rejected[:-1]:  # complete chats
        prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
    answers = {"chosen": _only(chosen), "rejected": _only(rejected)}
    return json.dumps({**row, "messages": _with_images(prompt, row.get("images")), **answers}, ensure_ascii=False)


def _only(answer: Any) -> Any:
    """The message of a list of one."""
    return answer[0] if isinstance(answer, list) and len(answer) == 1 else answer


def _with_images(prompt: Any, images: Any) -> Any:
    """The prompt with the column `images` at its image parts, or at the begin of its first user turn without such."""
    if not isinstance(prompt, list) or not isinstance(images, list) or not images:
        return prompt
    waiting = iter(images)
    filled: list[Row] = []
    for message in prompt:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            content = [
                {"type": "image", "image": next(waiting, None)} if part == {"type": "image"} else part
                for part in content
            ]
            message = message | {"content": content}
        filled.append(message)
    rest = [{"type": "image", "image": image} for image in waiting]
    if rest:
        first = next((i for i, message in enumerate(filled) if message.get("role") == "user"), None)
        if first is not None:
            content = filled[first]["content"]
            words = [{"type": "text", "text": content}] if isinstance(content, str) else content
            filled[first] = filled[first] | {"content": [*rest, *words]}
    return filled
