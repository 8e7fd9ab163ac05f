"""Requests in OpenAI's chat format → messages and settings for the model; independent of HTTP and of the model.

`Access` decides which sources a client may name: `data:` URLs always, files only in the folder of `--media-root`, and
http(s) URLs only if downloading is enabled (`keye.video.fetch` then allows public addresses only).
"""

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keye.errors import KeyeError
from keye.inference.planned import planned_video
from keye.inference.sampling import Sampling
from keye.video.fetch import UrlRules, file_path, scheme_of, url_name

SAMPLING = ("start", "end", "fps")  # options of a clip in a request; none exceeds the encoder's budget
NEUTRAL = {
    "n": 1, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "response_format": {"type": "text"},
    "tool_choice": "none", "function_call": "none", "modalities": ["text"], "use_beam_search": False, "best_of": 1,
    "top_logprobs": 0,
}  # fmt: skip
"""Fields without an effect at these values (or null), which clients send; any other value is refused."""
READ = (
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "top_k", "min_p", "seed", "stop", "chat_template_kwargs", "reasoning_effort", "logprobs",
    "return_token_ids", "stop_token_ids",
)  # fmt: skip
LABELS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Fields without an effect on the answer; they are ignored."""
ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
MAX_DEPTH = 32
"""Most levels of lists and objects in a body; a valid request has six."""
KINDS = {"image_url": "image", "input_image": "image", "video_url": "video"}


class RequestError(KeyeError):
    """A request that cannot be answered. status: of HTTP; code: for programs; param: the invalid field."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request", param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True)
class Access:
    """What requests may name. media_root: files in this folder; urls: http(s) URLs; max_bytes: of one file."""

    media_root: Path | None = None
    urls: UrlRules | None = None
    max_bytes: int = 1 << 26

    def source(self, given: Any) -> str:
        """A clip or image as the encoder takes it; RequestError if it is not allowed."""
        given = given.get("url") if isinstance(given, Mapping) else given
        if not isinstance(given, str) or not given:
            raise RequestError('an image or video needs a URL; write {"type": "video_url", "video_url": {"url": …}}')
        scheme = scheme_of(given)
        if scheme == "data":
            if len(given) * 3 // 4 > self.max_bytes:
                raise RequestError(f"{url_name(given)} is larger than {self.max_bytes:,} bytes", 413, "too_large")
            return given
        if scheme in ("http", "https"):
            if self.urls is None:
                raise RequestError(
                    f"{url_name(given)}: downloading is disabled; send a data: URL, or start the server with --url",
                    403,
                    "not_allowed",
                )
            return given
        return self._file(given, scheme)

    def _file(self, given: str, scheme: str | None) -> str:
        refused = RequestError(
            "only files in the folder of --media-root are allowed; send a data: URL", 403, "not_allowed"
        )
        if self.media_root is None or scheme not in (None, "file") or "\0" in given:
            raise refused
        root = self.media_root.resolve()
        try:
            path = (root / (file_path(given) if scheme else given)).resolve()  # also resolves links
            within, exists = path.is_relative_to(root), path.is_file()
        except (OSError, ValueError, RuntimeError):  # a name that is too long, a broken URL, a loop of links
            raise refused from None
        if not within:
            raise refused
        if not exists:
            raise RequestError(f"{path.relative_to(root)} does not exist; check the path", 404, "not_found")
        if path.stat().st_size > self.max_bytes:
            raise RequestError(f"{path.relative_to(root)} is larger than {self.max_bytes:,} bytes", 413, "too_large")
        return str(path)


@dataclass(frozen=True)
class Request:
    """A parsed request.

    thinking: see `Chat`. usage: whether a stream ends with the token counts. logprobs: whether the answer has the
    log-probability of each token. token_ids: whether the answer has the ids of prompt and reply (vLLM's name).
    """

    model: str | None
    messages: list[dict[str, Any]]
    sampling: Sampling
    thinking: bool | None = None
    stream: bool = False
    usage: bool = field(default=False)
    logprobs: bool = False
    token_ids: bool = False


def read_request(body: bytes, access: Access, most_tokens: int) -> Request:
    """Parse the body of POST /v1/chat/completions.

    Args:
        body: JSON.
        access: the sources that it may name.
        most_tokens: limit of an answer, also for a request that asks for more.

    Raises:
        RequestError: an invalid or unsupported field.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON ({str(error)[:80]})") from error
    if not isinstance(given, dict):
        raise RequestError("the body is not a JSON object")
    _check_values(given)
    for name, value in given.items():
        if name in NEUTRAL and value not in (None, NEUTRAL[name]):
            raise RequestError(f"{name} must be {json.dumps(NEUTRAL[name])}", param=name)
        # Ignoring an unknown field would return answers that were sampled differently than requested.
        if name not in (*NEUTRAL, *READ, *LABELS) and value not in (None, [], {}, False):
            raise RequestError(f"{name[:40]} is not supported; omit it", param=name)
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is missing or empty; give a list of messages", param="messages")
    if not isinstance(messages[-1], dict) or messages[-1].get("role") != "user":
        raise RequestError("the last message must be the user's", param="messages")
    options = _typed(given, "stream_options", dict) or {}
    for name in ("logprobs", "return_token_ids"):
        if _typed(given, name, bool) and given.get("stream"):
            raise RequestError(f"{name} needs a complete answer; omit stream", param=name)
    return Request(
        model=_typed(given, "model", str),
        messages=[_message(message, access) for message in messages],
        sampling=_sampling(given, most_tokens),
        thinking=_thinking(given),
        stream=bool(_typed(given, "stream", bool)),
        usage=bool(_typed(options, "include_usage", bool)),
        logprobs=bool(given.get("logprobs")),
        token_ids=bool(_typed(given, "return_token_ids", bool)),
    )


def _check_values(given: dict[str, Any]) -> None:
    """Raise RequestError for values that are invalid in any field: lone surrogates, huge numbers, deep nesting."""
    waiting: list[tuple[str, Any, int]] = [("", given, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        field = re.split(r"[.\[]", path, maxsplit=1)[0] or None
        if depth > MAX_DEPTH:
            raise RequestError(f"{path[:80]} is nested more than {MAX_DEPTH} deep", param=field)
        if isinstance(value, dict):
            for name in value:
                if not _is_text(name):
                    raise RequestError(f"a key of {path or 'the body'} contains a lone surrogate", param=field)
            waiting += [(f"{path}.{name[:40]}" if path else name[:40], item, depth + 1) for name, item in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{path}[{place}]", item, depth + 1) for place, item in enumerate(value)]
        elif isinstance(value, str) and not _is_text(value):
            raise RequestError(f"{path} contains a lone surrogate, which is not a character", param=field)
        elif isinstance(value, int) and abs(value) > sys.float_info.max:
            raise RequestError(f"{path} has more than 308 digits", param=field)


def _is_text(value: str) -> bool:
    """Whether a string can be encoded as UTF-8."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _typed(given: Mapping[str, Any], name: str, kind: type) -> Any:
    value = given.get(name)
    if value is not None and not isinstance(value, kind):
        raise RequestError(f"{name} is {str(value)[:40]!r}; give a {kind.__name__}", param=name)
    return value


def _number(given: Mapping[str, Any], name: str, integer: bool = False) -> Any:
    value = given.get(name)
    if value is None:
        return None
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or integer and value != int(value):
        raise RequestError(f"{name} is {str(value)[:40]!r}; give a {'whole ' if integer else ''}number", param=name)
    return int(value) if integer else float(value)


def _sampling(given: Mapping[str, Any], most_tokens: int) -> Sampling:
    limits = {name: _number(given, name, integer=True) for name in ("max_completion_tokens", "max_tokens")}
    limit_name, limit = next(((k, v) for k, v in limits.items() if v is not None), ("max_tokens", most_tokens))
    if limit < 1:
        raise RequestError(f"{limit_name} is {limit}; give 1 or more", param=limit_name)
    stop = given.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(text, str) for text in stop):
        raise RequestError("stop must be a string or a list of up to four strings", param="stop")
    seed = _number(given, "seed", integer=True)
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise RequestError("seed has more than 64 bits", param="seed")
    try:
        return Sampling(
            max_new_tokens=min(limit, most_tokens),
            temperature=_number(given, "temperature") or 0.0,
            top_p=_number(given, "top_p"),
            seed=seed,
            stop=tuple(stop),
            top_k=0 if given.get("top_k") == -1 else _number(given, "top_k", integer=True),  # vLLM's value for all
            min_p=_number(given, "min_p"),
            stop_ids=_stop_ids(given),
        )
    except RequestError:
        raise
    except KeyeError as error:
        raise RequestError(str(error), param=str(error).split()[0]) from error


def _stop_ids(given: Mapping[str, Any]) -> tuple[int, ...]:
    """`stop_token_ids` (vLLM's name): ids of tokens that end the reply."""
    ids = _typed(given, "stop_token_ids", list) or []
    if len(ids) > 64 or not all(type(number) is int and 0 <= number < 2**31 for number in ids):
        raise RequestError("stop_token_ids must be a list of up to 64 ids of tokens", param="stop_token_ids")
    return tuple(ids)


def _thinking(given: Mapping[str, Any]) -> bool | None:
    """`chat_template_kwargs.enable_thinking` (Qwen3's name) or `.thinking`; `reasoning_effort` "none" is False."""
    kwargs = _typed(given, "chat_template_kwargs", dict) or {}
    values = [_typed(kwargs, name, bool) for name in ("enable_thinking", "thinking")]
    thinking = next((value for value in values if value is not None), None)
    effort = _typed(given, "reasoning_effort", str)
    return (None if effort is None else effort != "none") if thinking is None else thinking


def _message(message: Any, access: Access) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"a message needs a role of {', '.join(ROLES)}", param="messages")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str | list):
        raise RequestError("a message's content must be a string or a list of parts", param="messages")
    parts = content if isinstance(content, str) else [_part(part, access) for part in content]
    return {"role": ROLES[role], "content": parts}


def _part(part: Any, access: Access) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "video_plan":
        return {"type": "video", "video": planned_video(part.get("video_plan"), access.max_bytes)}
    if not isinstance(kind, str) or kind not in KINDS:
        raise RequestError(f"a part of a message must be text or one of {', '.join(KINDS)}", param="messages")
    source = part.get("image_url" if KINDS[kind] == "image" else kind)
    plain = {"type": KINDS[kind], KINDS[kind]: access.source(source)}
    options = {**(source if isinstance(source, dict) else {}), **part}
    sampling = {name: _number(options, name) for name in SAMPLING if options.get(name) is not None}
    return {**plain, **sampling} if plain["type"] == "video" else plain
