"""The HTTP side of `keye serve`: routes, limits and errors. `keye.inference.answerer` makes the answers."""

import asyncio
import contextlib
import json
import secrets
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from typing import Any

from anyio import CapacityLimiter, to_thread

from keye.errors import KeyeError
from keye.inference.answerer import Answerer, in_words_of_a_request, is_local
from keye.inference.answering import Answering, Figures
from keye.inference.openai_format import Access, Request, RequestError, read_request

try:
    import uvicorn
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.requests import Request as HttpRequest
    from starlette.responses import JSONResponse, Response
    from starlette.types import Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise KeyeError("keye serve needs fastapi and uvicorn; install them with pip install 'keye[serve]'") from error

ANSWER = "/v1/chat/completions"


@dataclass(frozen=True)
class Limits:
    """What strangers may hold.

    connections: open at a time. head_seconds: until the head of a request is complete. body_seconds: until its body is.
    body_rate: bytes a second that a longer body must come at. bytes_in_flight: of all bodies together, as a multiple of
    the largest one.
    """

    connections: int = 256
    head_seconds: float = 15.0
    body_seconds: float = 30.0
    body_rate: int = 1 << 17
    bytes_in_flight: float = 2.0


class Server:
    """A listening server. address: (host, port). `run` answers until `stop` is called or the process is interrupted."""

    def __init__(self, config: uvicorn.Config, listening: socket.socket, answerer: Answerer) -> None:
        self._server, self._socket, self._answerer = uvicorn.Server(config), listening, answerer

    @property
    def address(self) -> tuple[str, int]:
        return self._socket.getsockname()[:2]

    def run(self) -> None:
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        self._server.should_exit = True

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._socket.close()
        self._answerer.close()


def make_server(
    answerer: Answerer,
    access: Access,
    host: str = "127.0.0.1",
    port: int = 0,
    key: str | None = None,
    limits: Limits | None = None,
) -> Server:
    """A server that listens; `run` lets it answer.

    Raises:
        KeyeError: the address cannot be had.
    """
    if not 0 <= port < 1 << 16:  # getaddrinfo would take it modulo that
        raise KeyeError(f"--port {port} is none; give one from 1 to 65535, or 0 for a free one")
    limits = limits or Limits()
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        raise KeyeError(f"{host}:{port} cannot be listened at ({error}); give another --host or --port") from error
    app = make_app(answerer, access, key, limits, is_local(listening.getsockname()[0]))
    config = uvicorn.Config(
        app,
        http=partial(PatientProtocol, head_seconds=limits.head_seconds),
        ws="none",
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
    )
    return Server(config, listening, answerer)


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which closes a connection whose request does not get complete in time."""

    def __init__(self, *args: Any, head_seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_seconds, self._deadline = head_seconds, None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._idle():
            self._expect_head()

    def _expect_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self._head_seconds, self._close_if_idle)

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _close_if_idle(self) -> None:
        self._deadline = None
        if self._idle() and not self.transport.is_closing():
            self.transport.close()


def make_app(answerer: Answerer, access: Access, key: str | None, limits: Limits, local: bool) -> FastAPI:
    """The routes. key: what `Authorization: Bearer` must say; local: whether only this machine reaches the server."""
    app = FastAPI(title=answerer.name, docs_url=None, redoc_url=None, openapi_url=None)
    bodies = Bodies(access.max_bytes * 3 // 2 + (1 << 20), limits)  # a clip in base64, and words
    threads = CapacityLimiter(answerer.places + 4)
    about = {"id": answerer.name, "object": "model", "created": answerer.began, "owned_by": "keye"}

    def check(request: HttpRequest) -> None:
        _check_host(request.headers.get("host", ""), local)
        if key is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not secrets.compare_digest(given.encode(), key.encode()):
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
        bodies.check(request)
        return Reply(answerer, partial(read_request, access=access, most_tokens=answerer.most_tokens), bodies, threads)

    for kind in (RequestError, KeyeError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    return app


def _check_host(named: str, local: bool) -> None:
    """A page in the user's browser must not reach a local server under a name of its own (DNS rebinding)."""
    host = named.rpartition("@")[2]
    host = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    with contextlib.suppress(ValueError):
        if ip_address(host).is_loopback:
            return
    if local and host not in ("localhost", ""):
        raise RequestError(f"this server is for this machine and not for {host}", 403, "not_allowed")


class Bodies:
    """Reads bodies within limits of bytes and seconds. largest: bytes of one body."""

    def __init__(self, largest: int, limits: Limits) -> None:
        self.largest, self.limits = largest, limits
        self._room = int(largest * limits.bytes_in_flight)

    def check(self, request: HttpRequest) -> None:
        """RequestError for a body that will not be read."""
        if "transfer-encoding" in request.headers:  # it would overrule the Content-Length
            raise RequestError("Transfer-Encoding is not taken; send a Content-Length alone", 411, "length_required")
        try:
            length = int(request.headers["content-length"])
        except (KeyError, ValueError):
            raise RequestError("the request has no Content-Length", 411, "length_required") from None
        if not 0 <= length <= self.largest:
            raise RequestError(f"the body has {length:,} bytes and {self.largest:,} are allowed", 413, "too_large")
        # Other pages in a browser can post anything but this type without asking first, and they get no leave.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("the Content-Type is not application/json", 415, "invalid_request")

    @contextlib.asynccontextmanager
    async def read(self, request: HttpRequest) -> AsyncIterator[bytes]:
        """The body; its bytes count against the room of all until the block is left."""
        length = int(request.headers["content-length"])
        if length > self._room:
            raise RequestError("other requests are being read; try again later", 429, "busy")
        self._room -= length
        try:
            body = bytearray()
            async with asyncio.timeout(self.limits.body_seconds + length / self.limits.body_rate):
                async for chunk in request.stream():
                    body += chunk
            yield bytes(body)
        except TimeoutError:
            raise RequestError("the body did not arrive in time; send it again", 408, "timeout") from None
        finally:
            self._room += length


class Reply(Response):
    """Reads a request, has it answered, and sends the answer whole or as events; holds its place all that time."""

    def __init__(
        self, answerer: Answerer, parse: Callable[[bytes], Request], bodies: Bodies, threads: CapacityLimiter
    ) -> None:
        super().__init__()
        self.answerer, self.parse, self.bodies, self.threads = answerer, parse, bodies, threads
        self.begun = False

    async def __call__(self, scope: Scope, receive: Receive, send_: Send) -> None:
        async def send(message: Any) -> None:
            try:
                async with asyncio.timeout(self.bodies.limits.body_seconds):
                    await send_(message)
            except TimeoutError:
                raise ConnectionAbortedError from None

        try:
            with self.answerer.place():
                await self._answer(HttpRequest(scope, receive), scope, receive, send)
        except ConnectionAbortedError:  # who does not read is let go; uvicorn closes what is not complete
            return
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:
            if _client_left(error):
                return
            if not self.begun:
                await _error_response(error)(scope, receive, send)
            else:  # its status is out already
                await send({"type": "http.response.body", "body": _event(_error_of(error)[0])})

    async def _answer(self, http: HttpRequest, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.bodies.read(http) as body:
            request = await self._in_thread(self.parse, body)
            del body
            answering = await self._in_thread(self.answerer.start, request)
        watch = asyncio.create_task(_stop_when_left(receive, answering))
        pieces = iter(answering)
        try:
            if request.stream:
                await self._stream(answering, pieces, request, send)
            else:
                await (await self._whole(answering, pieces))(scope, receive, send)
        finally:
            answering.stop()
            watch.cancel()
            await self._in_thread(pieces.close)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await to_thread.run_sync(partial(function, *args), limiter=self.threads)

    async def _whole(self, answering: Answering, pieces: Any) -> Response:
        said = {True: "", False: ""}
        while (piece := await self._in_thread(next, pieces, None)) is not None:
            said[piece.thinking] += piece.text
        message = {"role": "assistant", "content": said[False], "refusal": None}
        if said[True]:
            message["reasoning_content"] = said[True]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answering.figures.finish}
        about = self._about("chat.completion")
        return JSONResponse({**about, "choices": [choice], "usage": _usage(answering.figures)})

    async def _stream(self, answering: Answering, pieces: Any, request: Request, send: Send) -> None:
        about = self._about("chat.completion.chunk")

        def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return _event({**about, "choices": [choice], **({"usage": None} if request.usage else {})})

        async def write(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        piece = await self._in_thread(next, pieces, None)  # what is wrong with the clip still gets a status of its own
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self.begun = True
        await write(chunk({"role": "assistant", "content": ""}))
        while piece is not None:
            await write(chunk({"reasoning_content" if piece.thinking else "content": piece.text}))
            piece = await self._in_thread(next, pieces, None)
        await write(chunk({}, answering.figures.finish))
        if request.usage:
            await write(_event({**about, "choices": [], "usage": _usage(answering.figures)}))
        await write(b"data: [DONE]\n\n", more=False)

    def _about(self, kind: str) -> dict[str, Any]:
        name = f"chatcmpl-{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.answerer.name}


async def _stop_when_left(receive: Receive, answering: Answering) -> None:
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
    """An error as OpenAI's clients read it, and its status; one sentence, no traceback."""
    code, param = "invalid_request", None
    if isinstance(error, RequestError):
        message, status, code, param = str(error), error.status, error.code, error.param
    elif isinstance(error, KeyeError) and error.__cause__ is not None and "the model failed" in str(error):
        message, status, code = str(error), 500, "failed"
    elif isinstance(error, KeyeError):
        message, status = in_words_of_a_request(error), 400
    elif isinstance(error, HTTPException):
        status, code = error.status_code, "not_found" if error.status_code == 404 else "invalid_request"
        message = f"there is no such address or method here; POST to {ANSWER}"
    else:  # whatever it is, the server goes on and says so
        said = "".join(c if c.isprintable() else "?" for c in str(error)[:500])
        print(f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {said}", file=sys.stderr, flush=True)
        message, status, code = f"the server failed on this request ({type(error).__name__})", 500, "failed"
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}, status


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _usage(figures: Figures) -> dict[str, int]:
    read, written = figures.prompt_tokens, figures.new_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
