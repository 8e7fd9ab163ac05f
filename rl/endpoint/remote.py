"""An OpenAI-compatible endpoint: one attempt of a request, with every failure classified."""

from __future__ import annotations

import os
from typing import Any

from keye.errors import KeyeError
from rl.endpoint.ask import Answer, Ask, InvalidAnswer, read_answer
from rl.endpoint.errors import EndpointError, RefusedRequest, TransientError

_ITEM = (400, 413, 422)
"""Status codes that concern one request; 408, 409, 425, 429 and 5xx pass, all others concern every request."""
_PASSING = (408, 409, 425, 429)
_UNSENT = ("ConnectTimeout", "ConnectError", "PoolTimeout", "ProxyError", "UnsupportedProtocol")


class RemoteModel:
    """A model at an OpenAI-compatible endpoint.

    Args:
        url: base URL, such as http://localhost:8000/v1.
        model: its name there; also the name in the keys of the cache, without the URL.
        key: API key; it is in no message and no file.
    """

    def __init__(self, url: str, model: str, key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise KeyeError(f"the endpoint's URL {url!r} does not start with http:// or https://; correct it")
        self.url, self.name, self._key = url, model, key or "none"
        self._client: Any = None

    @classmethod
    def from_environment(cls, prefix: str) -> RemoteModel:
        """The endpoint of the variables `<prefix>_URL`, `<prefix>_MODEL` and `<prefix>_KEY` (optional).

        Raises:
            KeyeError: a variable is missing.
        """
        given = {name: os.environ.get(f"{prefix}_{name}", "").strip() for name in ("URL", "MODEL", "KEY")}
        for name, example in (("URL", "http://localhost:8000/v1"), ("MODEL", "Qwen3-8B")):
            if not given[name]:
                raise KeyeError(
                    f"the variable {prefix}_{name} is not set; set it (such as {example}), or set {prefix}_MODEL to a "
                    "local model directory"
                )
        return cls(given["URL"], given["MODEL"], given["KEY"] or None)

    def __repr__(self) -> str:
        return f"{self.name} at {self.url}"

    async def complete(self, ask: Ask, seconds: float) -> Answer:
        """One attempt.

        Raises:
            TransientError: a later attempt may succeed. RefusedRequest: this request is refused.
            EndpointError: every request is refused.
        """
        import openai

        client = self._connected(openai)
        try:
            response = await client.chat.completions.with_raw_response.create(**self._fields(ask), timeout=seconds)
            return read_answer(response.http_response.json())
        except openai.APITimeoutError as error:
            raise TransientError(f"no answer within {seconds:g} s", charged=_sent(error)) from error
        except openai.APIConnectionError as error:
            cause = error.__cause__
            why = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
            raise TransientError(f"the connection failed ({why:.120})", charged=_sent(error)) from error
        except openai.APIStatusError as error:
            raise self._status(error) from error
        except (InvalidAnswer, ValueError, RecursionError) as error:  # not JSON, or not a completion
            raise TransientError(f"not a chat completion ({str(error):.160})", charged=True) from error

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()

    def _connected(self, openai: Any) -> Any:
        if self._client is None:  # within the event loop that uses it
            self._client = openai.AsyncOpenAI(base_url=self.url, api_key=self._key, max_retries=0)
        return self._client

    def _fields(self, ask: Ask) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "model": self.name, "messages": _unicode(list(ask.messages)), "max_completion_tokens": ask.max_tokens,
            "temperature": ask.temperature,
        }  # fmt: skip
        if ask.temperature:
            fields["seed"] = ask.sample
        if ask.top_p is not None:
            fields["top_p"] = ask.top_p
        if ask.logprobs:
            fields["logprobs"] = True
        if ask.thinking is not None:
            fields["extra_body"] = {"chat_template_kwargs": {"enable_thinking": ask.thinking}}
        return fields

    def _status(self, error: Any) -> Exception:
        """The error of a response with a status that is not 2xx."""
        status, said = error.status_code, str(error).replace(self._key, "…")[:200]
        if status in _PASSING or status >= 500:
            wait = _wait(error.response.headers)
            return TransientError(f"status {status}: {said}", charged=status >= 500, wait=wait, busy=status == 429)
        if status in _ITEM:
            return RefusedRequest(f"{self!r} refuses a request with status {status}: {said}; correct the question")
        if status in (401, 403):
            return EndpointError(f"{self!r} refuses the API key with status {status}: {said}; set its …_KEY variable")
        return EndpointError(f"{self!r} answers with status {status}: {said}; correct the URL or the model's name")


def _unicode(value: Any) -> Any:
    """A value of JSON without surrogates, which no request can contain; each becomes a question mark."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {name: _unicode(part) for name, part in value.items()}
    return [_unicode(part) for part in value] if isinstance(value, list | tuple) else value


def _sent(error: BaseException) -> bool:
    """Whether the request may have reached the endpoint: the connection existed when it failed."""
    return type(error.__cause__).__name__ not in _UNSENT


def _wait(headers: Any) -> float | None:
    try:
        return max(0.0, float(headers.get("retry-after")))
    except (TypeError, ValueError):  # absent, or a date
        return None
