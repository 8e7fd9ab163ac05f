"""Chat messages in any of the usual formats → one plain form for the template, and their media.

A message is {"role": ..., "content": ...}; the content a string or a list of parts:

    {"type": "text", "text": "What happens?"}
    {"type": "image", "image": SOURCE}        also "url", "path" or "base64", or {"type": "image_url", "image_url": ...}
    {"type": "video", "video": SOURCE}        also "url", "path" or "base64", or {"type": "video_url", "video_url": ...}

with options of the image or video in the same element (`keye.processor.options`). An assistant's message may have its
thought as `reasoning_content`, and `tool_calls`; both become text. A user's or an assistant's message may have
`"thinking": true` or `false`, the mode of the question.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from keye.encoder import EncodedVideo
from keye.errors import ManifestError
from keye.processor.options import Options, read_options
from keye.processor.reply import Reply, Thinking, parse_reply, with_suffix, write_reply
from keye.processor.stream import IMAGE_PAD, VIDEO_PAD
from keye.video.fetch import scheme_of

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
KINDS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
_ONE = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, torch.Tensor, np.ndarray)


@dataclass(frozen=True)
class Visual:
    """One image or video of a chat. kind: "image" or "video"; source: for the encoder; options: its settings."""

    kind: str
    source: Any
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Chat:
    """messages: roles with strings or lists of plain parts, for the template. visuals: the media in order."""

    messages: list[Message]
    visuals: list[Visual]


def read_chat(
    messages: Sequence[Message],
    base_dir: str | Path = ".",
    guard: Callable[[str], str] = str,
    thinking: Thinking = None,
    generating: bool = False,
) -> Chat:
    """A chat in its plain form.

    Args:
        messages: one conversation, see the module's docstring.
        base_dir: the folder of relative paths.
        guard: applied to the text of messages (`Spelling.guard`).
        thinking: the suffix of questions whose messages do not set it: of the last one if `generating`, otherwise of
            each that an assistant's message answers.
        generating: whether an answer follows, or continues, after the last message.

    Raises:
        ManifestError: a message, part, source or option that is not in the format.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ManifestError("a chat is a list of messages; write [{'role': 'user', 'content': 'hello'}]")
    visuals: list[Visual] = []
    turns = [_turn(message, Path(base_dir), visuals) for message in messages]
    for place, mode in _modes(messages, turns, thinking, generating).items():
        _suffix(turns[place], mode)
    for turn in turns:
        content = turn["content"]
        if isinstance(content, str):
            turn["content"] = guard(content)
        else:
            turn["content"] = [{**part, "text": guard(part["text"])} if "text" in part else part for part in content]
    return Chat(turns, visuals)


def _turn(message: Message, base: Path, visuals: list[Visual]) -> Message:
    """The message with only role and content; its images and videos are appended to `visuals`."""
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not isinstance(message, Mapping) or "role" not in message or (message.get("content") is None and not calls):
        raise ManifestError("a message needs 'role' and 'content': write {'role': 'user', 'content': [...]}")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise ManifestError(f"a message has the role {role!r}; use one of {', '.join(ROLES)}")
    if content is None:
        content = ""
    if isinstance(content, str):
        plain: str | list[Message] = _words(content)
    elif isinstance(content, Sequence):
        plain = []
        for part in content:
            _add(plain, _part(part, base, visuals))
    else:
        raise ManifestError(f"a message's content is a {type(content).__name__}; give a string or a list of parts")
    thought = message.get("reasoning_content")
    if thought is not None:
        if role != "assistant":
            raise ManifestError(f"a message of role {role} has reasoning_content; only assistant messages may have it")
        plain = write_reply(Reply(_words(thought), _text(plain)))
    if calls:
        plain = _with_calls(role, plain, calls)
    return {"role": role, "content": plain}


def _with_calls(role: str, content: str | list[Message], calls: Any) -> str | list[Message]:
    """The content followed by its `tool_calls`, each on its own lines, as Qwen's models write them."""
    if role != "assistant":
        raise ManifestError(f"a message of role {role} has tool_calls; only assistant messages may have them")
    lines = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ManifestError(f"tool_calls has {call!r:.80}; write {{'function': {{'name', 'arguments'}}}}")
        arguments = function.get("arguments") or {}
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        lines.append(f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": {written}}}\n</tool_call>')
    before = _text(content)
    words = ("\n" if before and not before.endswith("\n") else "") + "\n".join(lines)
    if isinstance(content, str):
        return content + words
    parts = list(content)
    _add(parts, {"type": "text", "text": words})
    return parts


def _add(parts: list[Message], part: Message) -> None:
    """Append a part. Adjacent texts are joined, so that the guard sees a special token that spans two of them."""
    if parts and "text" in part and "text" in parts[-1]:
        parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
    else:
        parts.append(part)


def _part(part: Any, base: Path, visuals: list[Visual]) -> Message:
    if not isinstance(part, Mapping):
        raise ManifestError(f"a part of a message is {part!r:.80}; write {{'type': 'text', 'text': ...}}")
    given = {key: value for key, value in part.items() if value is not None}  # tables fill rows with None
    kind = given.pop("type", next((name for name in ("text", *KINDS) if name in given), None))
    if kind == "text":
        if "text" not in given:
            raise ManifestError("a text element has no text; write {'type': 'text', 'text': ...}")
        return {"type": "text", "text": _words(given["text"])}
    if not isinstance(kind, str) or kind not in KINDS:
        raise ManifestError(f"a part of a message has the type {kind!r}; use text or one of {', '.join(KINDS)}")
    visual = _visual(kind, given, base)
    visuals.append(visual)
    return {"type": visual.kind}


def _visual(name: str, given: dict[str, Any], base: Path) -> Visual:
    kind = KINDS[name]
    found = {key: given.pop(key) for key in dict.fromkeys((kind, name, "url", "path", "base64")) if key in given}
    if not found or "" in [value for value in found.values() if isinstance(value, str)]:
        raise ManifestError(f"a {kind} element names no file: write {{'type': '{kind}', '{kind}': PATH}}")
    if len(found) > 1:
        raise ManifestError(f"a {kind} element names {' and '.join(found)}; give one source")
    ((key, source),) = found.items()
    if isinstance(source, Mapping):  # OpenAI's {"url", "detail"} (detail is ignored); {"bytes", "path"} of datasets
        source = next((source[key] for key in ("url", "bytes", "path") if source.get(key) is not None), source)
    if key == "base64":
        if not isinstance(source, str):
            raise ManifestError(f"a {kind} element's base64 is a {type(source).__name__}; give a string")
        source = source if source.startswith("data:") else f"data:;base64,{source}"
    options = read_options(kind, given)
    if options and isinstance(source, EncodedVideo):
        raise ManifestError(f"an encoded video cannot have {', '.join(options)}; set them on the encoder")
    return Visual(kind, located(kind, source, base), options)


def located(kind: str, source: Any, base: Path) -> Any:
    """The source with relative paths below `base`, also in lists; URLs, pixels and file objects do not change.

    Raises:
        ManifestError: a source that cannot be an image or video.
    """
    if isinstance(source, str | os.PathLike):
        if not os.fspath(source):  # the path would be the base folder itself
            raise ManifestError(f"a {kind} element names no file: write {{'type': '{kind}', '{kind}': PATH}}")
        return source if scheme_of(source) else base / source
    if isinstance(source, _ONE) or hasattr(source, "read"):
        return source
    if kind == "video":
        if isinstance(source, list | tuple):
            return [located("image", picture, base) for picture in source]
        if isinstance(source, EncodedVideo) or isinstance(source, Iterable) and not isinstance(source, Mapping | Set):
            return source
    forms = "a path, a URL, bytes, a picture" + (" or frames" if kind == "video" else "")
    raise ManifestError(f"a {kind} element's source is {source!r:.80}; give {forms}")


def _words(text: Any) -> str:
    if not isinstance(text, str):
        raise ManifestError(f"a message's text is {text!r:.80}; give a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ManifestError(f"a message's text is not Unicode ({error.reason}); correct its encoding") from error
    return text


def _text(content: str | list[Message]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _modes(messages: Sequence[Message], turns: list[Message], thinking: Thinking, generating: bool) -> dict[int, bool]:
    """The user's turns that get a suffix, and its mode."""
    if not (thinking is None or isinstance(thinking, bool) or thinking == "as_answered"):
        raise ManifestError(f"thinking is {thinking!r}; give True, False, None or 'as_answered'")
    users = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    if generating and thinking is not None and not users:
        raise ManifestError("thinking needs a user message to put its suffix in; add one or omit thinking")
    modes: dict[int, bool] = {}
    for place, (message, turn) in enumerate(zip(messages, turns, strict=True)):
        given = message.get("thinking")
        if given is not None and not isinstance(given, bool):
            raise ManifestError("a message's thinking is true or false; the thought itself is its reasoning_content")
        if turn["role"] == "user" and given is not None:
            modes[place] = given
        before = [user for user in users if user < place]
        if turn["role"] != "assistant" or not before:
            continue
        if given is not None:
            modes.setdefault(before[-1], given)
        elif thinking == "as_answered":
            modes.setdefault(before[-1], bool(parse_reply(_text(turn["content"])).thinking))
        elif thinking is not None and not generating:
            modes.setdefault(before[-1], thinking)
    if generating and isinstance(thinking, bool):
        modes[users[-1]] = thinking
    return modes


def _suffix(turn: Message, mode: bool) -> None:
    content = turn["content"]
    if isinstance(content, str):
        turn["content"] = with_suffix(content, mode)
    elif content and "text" in content[-1]:
        content[-1] = {"type": "text", "text": with_suffix(content[-1]["text"], mode)}
    else:
        content.append({"type": "text", "text": with_suffix("", mode)})


def media_of_texts(texts: Sequence[str], kind: str, given: Any) -> list[list[Visual]]:
    """The media of one kind for each text, by its placeholders."""
    pad = IMAGE_PAD if kind == "image" else VIDEO_PAD
    counts = [text.count(pad) for text in texts]
    if given is None:
        given = []
    elif not isinstance(given, list | tuple):
        given = [given]
    nested = len(given) == len(texts) and all(isinstance(part, list | tuple) for part in given)
    if nested and (kind == "image" or [len(part) for part in given] == counts):
        given = [medium for part in given for medium in part]
    if len(given) != sum(counts):
        many = f"{len(given)} {kind}s were given for {sum(counts)} placeholders"
        raise ManifestError(f"{many}; write one {pad} for each")
    media = iter([Visual(kind, located(kind, medium, Path())) for medium in given])
    return [[next(media) for _ in range(count)] for count in counts]
