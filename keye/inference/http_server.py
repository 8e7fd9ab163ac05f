"""The HTTP part of `keye serve`: routes, limits and errors. `keye.inference.answerer` generates the answers."""

import asyncio
import contextlib
import json
import logging
import math
import secrets
import socket
import sys
import time
import uuid
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, to_thread

from keye.errors import KeyeError
from keye.inference.answerer import Answerer, is_local, message_for_client
from keye.inference.answering import Answering, Figures
from keye.inference.logprobs import token_logprobs
from keye.inference.openai_format import Access, Request, RequestError, read_request

try:
    import uvicorn
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.requests import Request as HttpRequest
    from starlette.responses import JSONResponse, Response
    from starlette.types import Receive, Scope, Send

    from keye.inference.http_limits import SHUTTING_DOWN, BodyReader, HeadTimeoutProtocol, Limits
    from keye.inference.reloading import Reloading, add_reload
except ImportError as error:
    raise KeyeError("keye serve needs fastapi and uvicorn; install them with pip install 'keye[serve]'") from error

ANSWER = "/v1/chat/completions"


class Server:
    """A listening server. address: (host, port). `run` serves until `stop` is called or the process is interrupted."""

    def __init__(
        self, config: uvicorn.Config, listening: socket.socket, answerer: Answerer, running: "RunningRequests"
    ) -> None:
        self._server, self._socket, self._answerer = _Uvicorn(config, running), listening, answerer

    @property
    def address(self) -> tuple[str, int]:
        return self._socket.getsockname()[:2]

    def run(self) -> None:
        """Serve; after `stop`, SIGINT or SIGTERM running requests have some seconds, then they end with an error."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        self._server.should_exit = True

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._socket.close()
        self._answerer.close()


class RunningRequests:
    """The requests that are being read or answered, so that a server that stops can end them."""

    def __init__(self, bodies: BodyReader) -> None:
        self.bodies, self.replies, self.closed = bodies, set(), False

    def close(self) -> None:
        """End all requests, current and future; each client gets the reason. Call it in the event loop."""
        self.closed = True
        self.bodies.close()
        for reply in self.replies:
            reply.end()


class _Uvicorn(uvicorn.Server):
    """uvicorn, which ends running requests with a reason before it cancels them at its own timeout."""

    def __init__(self, config: uvicorn.Config, running: RunningRequests) -> None:
        super().__init__(config)
        self._running = running

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it logs a traceback for each cancelled request
        loop, grace = asyncio.get_running_loop(), self._running.bodies.limits.grace_seconds
        end = loop.call_later(grace, self._running.close)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()
            self._running.close()


def make_server(
    answerer: Answerer,
    access: Access,
    host: str = "127.0.0.1",
    port: int = 0,
    key: str | None = None,
    limits: Limits | None = None,
    reload_from: Path | None = None,
) -> Server:
    """A listening server; `run` starts serving.

    Args:
        answerer: generates the answers.
        access: the files and URLs that requests may name.
        host, port: the address; port 0 is a free one.
        key: the API key of requests; None for none.
        limits: for clients; `Limits()` by default.
        reload_from: the directory whose folders POST /v1/reload may load; None for no such route.

    Raises:
        KeyeError: the server cannot listen at the address.
    """
    if not 0 <= port < 1 << 16:  # getaddrinfo would reduce it modulo 65536
        raise KeyeError(f"--port {port} is invalid; give one from 1 to 65535, or 0 for a free one")
    limits = limits or Limits()
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        raise KeyeError(f"cannot listen at {host}:{port} ({error}); give another --host or --port") from error
    bodies = BodyReader(access.max_bytes * 3 // 2 + (1 << 20), limits)  # a clip in base64, and text
    running = RunningRequests(bodies)
    app = make_app(answerer, access, key, running, is_local(listening.getsockname()[0]), reload_from)
    config = uvicorn.Config(
        app,
        http=partial(HeadTimeoutProtocol, head_seconds=limits.head_seconds),
        ws="none",
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=math.ceil(limits.grace_seconds) + 10,  # a prompt ends between two layers
    )
    return Server(config, listening, answerer, running)


def make_app(
    answerer: Answerer,
    access: Access,
    key: str | None,
    running: RunningRequests,
    local: bool,
    reload_from: Path | None = None,
) -> FastAPI:
    """The routes. key: for `Authorization: Bearer`; local: whether the server can be reached from this machine only."""
    app = FastAPI(title=answerer.name, docs_url=None, redoc_url=None, openapi_url=None)
    threads = CapacityLimiter(answerer.places + 4)
    about = {"id": answerer.name, "object": "model", "created": answerer.created, "owned_by": "keye"}

    def check(request: HttpRequest) -> None:
        _check_host(request.headers.get("host", ""), local)
        if key is not None:
            if not _has_key(request.headers.get("authorization", ""), key):
                raise RequestError("the API key is missing or wrong; send Authorization: Bearer KEY", 401, "no_key")

    @app.get("/health")
    async def health(request: HttpRequest) -> Response:
        _check_host(request.headers.get("host", ""), local)
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models(request: HttpRequest) -> Response:
        check(request)
        return JSONResponse({"object": "list", "data": [about]})

    @app.get("/v1/models/{name:path}")
    async def model(request: HttpRequest, name: str) -> Response:
        check(request)
        if name.strip("/") != answerer.name.strip("/"):
            raise RequestError(f"there is no model {name!r} here, only {answerer.name}", 404, "model_not_found")
        return JSONResponse(about)

    @app.post(ANSWER)
    async def answer(request: HttpRequest) -> Response:
        check(request)
        running.bodies.check(request)
        return Reply(answerer, partial(read_request, access=access, most_tokens=answerer.most_tokens), running, threads)

    if reload_from is not None:
        add_reload(app, Reloading(answerer, reload_from), check, running.bodies)
    for kind in (RequestError, KeyeError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    return app


def _has_key(authorization: str, key: str) -> bool:
    """Whether a header (decoded as Latin-1) has the key, in UTF-8 or, as some clients send it, in Latin-1."""
    scheme, _, given = authorization.partition(" ")
    sent = given.strip(" \t").encode("latin-1")
    keys = (key.encode(), key.encode("latin-1", "ignore"))
    same = [secrets.compare_digest(sent, wanted) and wanted.decode(code) == key
            for wanted, code in zip(keys, ("utf-8", "latin-1"), strict=True)]  # fmt: skip
    return scheme.lower() == "bearer" and any(same)


def _check_host(named: str, local: bool) -> None:
    """Refuse a page in the user's browser that reaches a local server under its own host name (DNS rebinding)."""
    host = named.rpartition("@")[2]
    host = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    with contextlib.suppress(ValueError):
        if ip_address(host).is_loopback:
            return
    if local and host not in ("localhost", ""):
        raise RequestError(f"this server accepts requests to localhost only, not to {host}", 403, "not_allowed")


class Reply(Response):
    """Reads a request, generates the answer, and sends it in one response or as events.

    Its place is freed when the answer is generated, so that a client that has read an answer finds a free place.
    """

    def __init__(
        self, answerer: Answerer, parse: Callable[[bytes], Request], running: RunningRequests, threads: CapacityLimiter
    ) -> None:
        super().__init__()
        self.answerer, self.parse, self.running, self.threads = answerer, parse, running, threads
        self.started = False
        self._answering: Answering | None = None

    async def __call__(self, scope: Scope, receive: Receive, send_: Send) -> None:
        async def send(message: Any) -> None:
            try:
                async with asyncio.timeout(self.running.bodies.limits.body_seconds):
                    await send_(message)
            except TimeoutError:
                raise ConnectionAbortedError from None

        self.running.replies.add(self)
        try:
            with self.answerer.place() as release:
                await self._answer(HttpRequest(scope, receive), scope, receive, send, release)
        except ConnectionAbortedError:  # the client does not read; uvicorn closes the incomplete response
            return
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:
            if _client_left(error):
                return
            if not self.started:
                await _error_response(error)(scope, receive, send)
            else:  # the status is already sent
                await send({"type": "http.response.body", "body": _event(_error_of(error)[0])})
        finally:
            self.running.replies.discard(self)

    def end(self) -> None:
        """Stop generating, because the server stops; the client gets an error."""
        if self._answering is not None:
            self._answering.stop()

    def _check_end(self) -> None:
        if self.running.closed:
            raise RequestError(SHUTTING_DOWN, 503, "shutdown")

    async def _answer(
        self, http: HttpRequest, scope: Scope, receive: Receive, send: Send, release: Callable[[], None]
    ) -> None:
        async with self.running.bodies.read(http) as body:
            request = await self._in_thread(self.parse, body)
            del body
            self._answering = answering = await self._in_thread(self.answerer.start, request)
        self._check_end()
        watch = asyncio.create_task(_stop_on_disconnect(receive, answering))
        pieces = iter(answering)
        try:
            if request.stream:
                await self._stream(answering, pieces, request, send, release)
            else:
                response = await self._complete(answering, pieces, request)
                release()
                await response(scope, receive, send)
        finally:
            answering.stop()
            watch.cancel()
            await self._in_thread(pieces.close)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await to_thread.run_sync(partial(function, *args), limiter=self.threads)

    async def _complete(self, answering: Answering, pieces: Any, request: Request) -> Response:
        texts = {True: "", False: ""}
        while (piece := await self._in_thread(next, pieces, None)) is not None:
            texts[piece.thinking] += piece.text
        self._check_end()
        message = {"role": "assistant", "content": texts[False], "refusal": None}
        if texts[True]:
            message["reasoning_content"] = texts[True]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answering.figures.finish}
        if request.logprobs:
            choice["logprobs"] = token_logprobs(answering.tokenizer, answering.scored())
        about = self._about("chat.completion", answering)
        if request.token_ids:
            choice["token_ids"] = [token for token, _ in answering.scored()]
            about["prompt_token_ids"] = answering.inputs["input_ids"][0].tolist()
        return JSONResponse({**about, "choices": [choice], "usage": _usage(answering.figures)})

    async def _stream(
        self, answering: Answering, pieces: Any, request: Request, send: Send, release: Callable[[], None]
    ) -> None:
        about: dict[str, Any] = {}

        def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return _event({**about, "choices": [choice], **({"usage": None} if request.usage else {})})

        async def write(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        piece = await self._in_thread(next, pieces, None)  # an error in the clip still gets its own status
        if piece is None:
            self._check_end()
        about |= self._about("chat.completion.chunk", answering)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self.started = True
        await write(chunk({"role": "assistant", "content": ""}))
        while piece is not None:
            await write(chunk({"reasoning_content" if piece.thinking else "content": piece.text}))
            piece = await self._in_thread(next, pieces, None)
        self._check_end()
        release()
        await write(chunk({}, answering.figures.finish))
        if request.usage:
            await write(_event({**about, "choices": [], "usage": _usage(answering.figures)}))
        await write(b"data: [DONE]\n\n", more=False)

    def _about(self, kind: str, answering: Answering) -> dict[str, Any]:
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
        return {**about, "model": self.answerer.name, "system_fingerprint": answering.weights}


async def _stop_on_disconnect(receive: Receive, answering: Answering) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answering.stop()


def _client_left(error: BaseException) -> bool:
    return type(error).__name__ == "ClientDisconnect"


async def _on_error(_: HttpRequest, error: Exception) -> Response:
    return _error_response(error)


def _error_response(error: Exception) -> Response:
    body, status = _error_of(error)
    # The rest of the request may not have been read.
    return JSONResponse(body, status, headers={"Connection": "close"})


def _error_of(error: Exception) -> tuple[dict[str, Any], int]:
    """An error as OpenAI's clients expect it, and its status; without a traceback."""
    code, param = "invalid_request", None
    if isinstance(error, RequestError):
        message, status, code, param = str(error), error.status, error.code, error.param
    elif isinstance(error, KeyeError) and error.__cause__ is not None and "the model failed" in str(error):
        message, status, code = str(error), 500, "failed"
    elif isinstance(error, KeyeError):
        message, status = message_for_client(error), 400
    elif isinstance(error, HTTPException):
        status, code = error.status_code, "not_found" if error.status_code == 404 else "invalid_request"
        message = f"there is no such address or method here; POST to {ANSWER}"
    else:  # the server continues and logs the error
        text = "".join(c if c.isprintable() else "?" for c in str(error)[:500])
        print(f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {text}", file=sys.stderr, flush=True)
        message, status, code = f"the server failed on this request ({type(error).__name__})", 500, "failed"
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}, status


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _usage(figures: Figures) -> dict[str, int]:
    read, written = figures.prompt_tokens, figures.new_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
