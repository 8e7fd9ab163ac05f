"""A request and its answer, independent of how it is sent."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from keye.processor.reply import Reply, parse_reply, write_reply

Message = dict[str, Any]

_TEMPLATE = 16  # tokens that a chat template adds to a message, at most


class InvalidAnswer(ValueError):
    """A response that is not a chat completion."""


@dataclass(frozen=True)
class Ask:
    """One request.

    messages: OpenAI's chat form; pictures as `data:` URLs. max_tokens: of the answer. temperature: 0 is greedy.
    sample: number of this request among repeated ones; it is also the seed. logprobs: whether to ask for the
    log-probability of each token. thinking: asks for a thought or for none, where the endpoint knows the switch
    (`chat_template_kwargs`); None sends nothing. files: URL in the messages → digest of the file's content, which
    takes its place in the key. visual_tokens: the most tokens of all pictures and clips together, for the cost.
    """

    messages: Sequence[Message]
    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float | None = None
    sample: int = 0
    logprobs: bool = False
    thinking: bool | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    visual_tokens: int = 0

    def key(self, model: str) -> str:
        """SHA-256 of all that determines the answer of `model`: the same request has the same key on any machine."""
        shown = {
            "model": model, "messages": _replaced(self.messages, self.files), "max_tokens": self.max_tokens,
            "temperature": self.temperature, "top_p": self.top_p, "sample": self.sample, "logprobs": self.logprobs,
            "thinking": self.thinking,
        }  # fmt: skip
        text = json.dumps(shown, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()

    @property
    def most_prompt_tokens(self) -> int:
        """An upper bound: a token is at least one byte of UTF-8."""
        texts = [text.encode("utf-8", "replace") for message in self.messages for text in _texts(message)]
        return sum(map(len, texts)) + _TEMPLATE * len(texts) + _TEMPLATE * (len(self.messages) + 1) + self.visual_tokens


def _replaced(value: Any, files: Mapping[str, str]) -> Any:
    """The value with every string that is a key of `files` replaced."""
    if isinstance(value, Mapping):
        return {name: _replaced(part, files) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(part, files) for part in value]
    return files.get(value, value) if isinstance(value, str) else value


def _texts(message: Message) -> list[str]:
    content = message["content"]
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part.get("type") == "text"]


@dataclass(frozen=True)
class Answer:
    """An answer.

    text: with its thought as `<think>…</think>`, also where the endpoint separates the two. finished: False if the
    limit of tokens cut it off. prompt_tokens, completion_tokens: as the endpoint reports them, else None. tokens and
    logprobs: the text of each token and its log-probability (≤ 0, natural); None where the endpoint gives none, or
    values that cannot be of this text. cost: in the currency of the price, when it was paid. cached: whether it was
    read from disk, and cost nothing now.
    """

    text: str
    finished: bool
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    tokens: tuple[str, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    cost: float = 0.0
    cached: bool = False

    def to_json(self) -> str:
        """The answer without `cached`."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "cached"}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Answer:
        """The answer that `to_json` wrote, as a cached one."""
        given = json.loads(text)
        for name in ("tokens", "logprobs"):
            given[name] = None if given[name] is None else tuple(given[name])
        return cls(**given, cached=True)


def read_answer(body: Any) -> Answer:
    """The answer in the body of a response; the fields that are optional may be missing or wrong.

    Raises:
        InvalidAnswer: the body is not a chat completion with one text.
    """
    try:
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content = message.get("content")
        thought = message.get("reasoning_content") or message.get("reasoning")
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise InvalidAnswer(f"no choices with a message in {str(body)!r:.120}") from error
    if content is None and thought is None or not isinstance(content, str | None):
        raise InvalidAnswer(f"the content is {content!r:.80}, not text")
    if not isinstance(thought, str | None) or finish not in ("stop", "length", "eos", None):
        raise InvalidAnswer(f"the answer ended with {finish!r:.40}")
    text = content or ""
    if thought is not None:
        text = write_reply(Reply(thought.strip(), parse_reply(text).answer))
    tokens, logprobs = _logprobs(choice.get("logprobs"), content or "", thought or "")
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    counts = (_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    return Answer(text, finish != "length", *counts, tokens, logprobs)


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _logprobs(given: Any, content: str, thought: str) -> tuple[tuple[str, ...] | None, tuple[float, ...] | None]:
    """Tokens with their log-probabilities; (None, None) unless they are numbers ≤ 0 and spell the answer."""
    entries = given.get("content") if isinstance(given, dict) else None
    if not isinstance(entries, list) or not entries:
        return None, None
    try:
        raw = [_bytes_of(entry) for entry in entries]
        values = [float(entry["logprob"]) for entry in entries]
    except (TypeError, KeyError, ValueError, AttributeError):
        return None, None
    written = "".join(b"".join(raw).decode(errors="replace").split())
    if any(not math.isfinite(value) or value > 1e-6 for value in values):
        return None, None
    if any("".join(part.split()) not in written for part in (content, thought)):
        return None, None
    return tuple(_pieces(raw)), tuple(min(0.0, value) for value in values)


def _bytes_of(entry: dict[str, Any]) -> bytes:
    return bytes(entry["bytes"]) if entry.get("bytes") is not None else entry["token"].encode()


def _pieces(raw: Sequence[bytes]) -> list[str]:
    """Each token's text; a character of several tokens belongs to the token that completes it."""
    pieces, waiting = [], b""
    for part in raw:
        waiting += part
        try:
            pieces.append(waiting.decode())
            waiting = b""
        except UnicodeDecodeError as error:
            incomplete = error.reason == "unexpected end of data" and len(waiting) - error.start < 4
            pieces.append(waiting[: error.start].decode() if incomplete else waiting.decode(errors="replace"))
            waiting = waiting[error.start :] if incomplete else b""
    if waiting and pieces:
        pieces[-1] += waiting.decode(errors="replace")
    return pieces
