"""`keye serve`: one model behind an OpenAI-compatible address, on the standard library alone.

GET /v1/models, POST /v1/chat/completions (whole or as server-sent events), GET /health. Requests wait in line, as one
model answers one at a time; a client that leaves takes its request with it. Why not `transformers serve`: it would read
any file that a request names, and has no answer but 500 for a clip that cannot be read; `for_transformers` lets it load
our models all the same.
"""

import argparse
import contextlib
import json
import select
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from keye.answering import Answering, Figures
from keye.chat import load_model
from keye.errors import KeyeError
from keye.model.keye import KeyeForConditionalGeneration
from keye.openai_format import Access, Request, RequestError, read_request
from keye.prompt.processor import KeyeProcessor
from keye.slowfast.fetch import UrlRules

ANSWER = "/v1/chat/completions"
IDLE = 60.0  # seconds without a byte after which a connection is closed


def serve(arguments: argparse.Namespace) -> int:
    """Run `keye serve` until it is interrupted."""
    from keye.terminal import busy, quiet

    quiet()
    root = Path(arguments.media_root) if arguments.media_root else None
    if root is not None and not root.is_dir():
        raise KeyeError(f"--media-root {root} is no folder; give the one that holds the clips")
    urls = UrlRules(max_bytes=arguments.max_bytes) if arguments.url else None
    access = Access(root, urls, arguments.max_bytes)
    with busy(f"loading {arguments.model}"):
        model, processor = load_model(arguments.model, arguments.device, arguments.dtype, urls)
    answerer = Answerer(model, processor, arguments.name or arguments.model, arguments.max_new_tokens, arguments.queue)
    with make_server(answerer, access, arguments.host, arguments.port) as server:
        host, port = server.server_address[:2]
        print(f"{answerer.name} answers at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        if not server.local:
            print(f"anyone who reaches {host}:{port} can ask; no key is checked", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


class Line:
    """A line of waiting threads, first come, first served, with an end: more than `longest` waiting are sent away."""

    def __init__(self, longest: int) -> None:
        self.longest, self._waiting, self._changed = longest, deque[object](), threading.Condition()

    @contextlib.contextmanager
    def turn(self, still_there: Callable[[], bool]) -> Iterator[None]:
        """Wait for one's turn; RequestError if the line is full, ConnectionError if `still_there()` is no longer so."""
        ticket = object()
        with self._changed:
            if len(self._waiting) > self.longest:
                raise RequestError(f"{self.longest} requests are waiting already; try again later", 429, "busy")
            self._waiting.append(ticket)
        try:
            with self._changed:
                while self._waiting[0] is not ticket:
                    self._changed.wait(1.0)
                    if not still_there():
                        raise ConnectionError("the client left")
            yield
        finally:
            with self._changed:
                self._waiting.remove(ticket)
                self._changed.notify_all()


class Answerer:
    """The model, and the line before it. name: what it is called in requests; most_tokens: of one answer."""

    def __init__(
        self,
        model: KeyeForConditionalGeneration,
        processor: KeyeProcessor,
        name: str,
        most_tokens: int = 4096,
        longest_line: int = 16,
    ) -> None:
        self.model, self.processor, self.name, self.most_tokens = model, processor, name, most_tokens
        self.line, self.began = Line(longest_line), int(time.time())
        self.context = model.config.text_config.max_position_embeddings

    def start(self, request: Request) -> Answering:
        """The answer to a request, to be iterated over; clips that are too long for the context are thinned."""
        if request.model not in (None, "", self.name):
            raise RequestError(f"there is no model {request.model!r} here, only {self.name}", 404, "model_not_found")
        wanted = min(request.sampling.max_new_tokens, max(1, self.context // 2))
        sample = self.processor.sample(
            request.messages,
            add_generation_prompt=True,
            thinking=request.thinking,
            max_length=self.context - wanted,
        )
        inputs = self.processor.collate([sample])
        inputs.pop("labels")
        room = min(request.sampling.max_new_tokens, self.context - len(sample))
        sampling = replace(request.sampling, max_new_tokens=room)
        return Answering(self.model, self.processor.tokenizer, inputs, sampling)


class Server(ThreadingHTTPServer):
    """The listening socket. local: whether only this machine can reach it."""

    daemon_threads = True
    answerer: Answerer
    access: Access

    @property
    def local(self) -> bool:
        return ip_address(self.server_address[0]).is_loopback


def make_server(answerer: Answerer, access: Access, host: str = "127.0.0.1", port: int = 0) -> Server:
    """A server that listens; `serve_forever` lets it answer. KeyeError if the address cannot be had."""
    if not 0 <= port < 1 << 16:  # getaddrinfo would take it modulo that
        raise KeyeError(f"--port {port} is none; give one from 1 to 65535, or 0 for a free one")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        kind = type("Server", (Server,), {"address_family": family})
        server = kind(address, Handler)
    except OSError as error:
        raise KeyeError(f"{host}:{port} cannot be listened at ({error}); give another --host or --port") from error
    server.answerer, server.access = answerer, access
    return server


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "keye", ""
    timeout = IDLE
    _streaming = False

    def do_GET(self) -> None:
        """The models, or whether all is well."""
        with self._plain_errors():
            self._check_host()
            path, name = self.path.partition("?")[0].rstrip("/"), self.server.answerer.name
            about = {"id": name, "object": "model", "created": self.server.answerer.began, "owned_by": "keye"}
            if path == "/health":
                self._json({"status": "ok"})
            elif path == "/v1/models":
                self._json({"object": "list", "data": [about]})
            elif path == f"/v1/models/{name.rstrip('/')}":
                self._json(about)
            else:
                raise RequestError(f"there is no {path or '/'} here; POST to {ANSWER}", 404, "not_found")

    def do_POST(self) -> None:
        """An answer."""
        with self._plain_errors():
            self._check_host()
            body = self._body()
            if self.path.partition("?")[0].rstrip("/") != ANSWER:
                raise RequestError(f"there is no {self.path} here; POST to {ANSWER}", 404, "not_found")
            request = read_request(body, self.server.access, self.server.answerer.most_tokens)
            with self.server.answerer.line.turn(self._still_there):
                answering = self.server.answerer.start(request)
                (self._stream if request.stream else self._whole)(answering, request)

    def _check_host(self) -> None:
        """A page in the user's browser must not reach a local server under a name of its own (DNS rebinding)."""
        host = self.headers.get("Host", "").rpartition("@")[2]
        host = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
        with contextlib.suppress(ValueError):
            if ip_address(host).is_loopback:
                return
        if self.server.local and host not in ("localhost", ""):
            raise RequestError(f"this server is for this machine and not for {host}", 403, "not_allowed")

    def _body(self) -> bytes:
        limit = self.server.access.max_bytes * 3 // 2 + (1 << 20)  # a clip in base64, and words
        try:
            length = int(self.headers["Content-Length"])
        except (TypeError, ValueError):
            raise RequestError("the request has no Content-Length", 411, "length_required") from None
        if not 0 <= length <= limit:
            raise RequestError(f"the body has {length:,} bytes and {limit:,} are allowed", 413, "too_large")
        body = self.rfile.read(length)
        # Other pages in a browser can post anything but this type without asking first, and they get no leave.
        if self.headers.get_content_type() != "application/json":
            raise RequestError("the Content-Type is not application/json", 415, "invalid_request")
        return body

    def _whole(self, answering: Answering, request: Request) -> None:
        said = {True: "", False: ""}
        with contextlib.closing(iter(answering)) as pieces:
            for piece in pieces:
                said[piece.thinking] += piece.text
                if not self._still_there():
                    return
        message = {"role": "assistant", "content": said[False], "refusal": None}
        if said[True]:
            message["reasoning_content"] = said[True]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answering.figures.finish}
        about = self._about("chat.completion")
        self._json({**about, "choices": [choice], "usage": _usage(answering.figures)})

    def _stream(self, answering: Answering, request: Request) -> None:
        about = self._about("chat.completion.chunk")

        def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return {**about, "choices": [choice], **({"usage": None} if request.usage else {})}

        with contextlib.closing(iter(answering)) as pieces:
            first = next(pieces, None)  # what is wrong with the clip or the model still gets a status of its own
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Cache-Control", "no-cache")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = self._streaming = True
            self._event(chunk({"role": "assistant", "content": ""}))
            try:
                while first is not None:
                    self._event(chunk({"reasoning_content" if first.thinking else "content": first.text}))
                    first = next(pieces, None)
            except KeyeError as error:
                self._event(_error(str(error), 500, "failed", None))
                return
        self._event(chunk({}, answering.figures.finish))
        if request.usage:
            self._event({**about, "choices": [], "usage": _usage(answering.figures)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _about(self, kind: str) -> dict[str, Any]:
        name = f"chatcmpl-{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.server.answerer.name}

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n")
        self.wfile.flush()

    def _json(self, value: dict[str, Any], status: int = 200) -> None:
        if self._streaming:  # its status is out already
            return
        body = json.dumps(value, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:  # the rest of the request may not have been read
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    def _still_there(self) -> bool:
        """Whether the client still holds the connection."""
        try:
            readable = select.select([self.connection], [], [], 0)[0]
            return not readable or self.connection.recv(1, socket.MSG_PEEK) != b""
        except (OSError, ValueError):
            return False

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Every error becomes a status and one sentence; a client that left gets nothing."""
        try:
            try:
                yield
            except RequestError as error:
                self._json(_error(str(error), error.status, error.code, error.param), error.status)
            except KeyeError as error:
                sentence = str(error).replace("give urls=UrlRules() to allow it", "start the server with --url")
                status = 500 if error.__cause__ is not None and "the model failed" in sentence else 400
                self._json(_error(sentence, status, "failed" if status == 500 else "invalid_request", None), status)
            except OSError:
                raise
            except Exception as error:  # whatever it is, the server goes on and says so
                self.log_error("%s: %s", type(error).__name__, str(error)[:500])
                sentence = f"the server failed on this request ({type(error).__name__})"
                self._json(_error(sentence, 500, "failed", None), 500)
        except OSError:  # the client left
            self.close_connection = True

    def log_message(self, format: str, *values: object) -> None:  # noqa: A002  the name is the base class's
        line = "".join(c if c.isprintable() else "?" for c in format % values)
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _usage(figures: Figures) -> dict[str, int]:
    read, written = figures.prompt_tokens, figures.new_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _error(message: str, status: int, code: str, param: str | None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def for_transformers() -> None:
    """Make `transformers serve` (5.23) know Keye's model class, in this process; its loader goes by names of its own.

    Call it before `transformers.cli.transformers.main()`, whose command line it leaves as it is.
    """
    from transformers import AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto

    config = KeyeForConditionalGeneration.config_class
    # The key lets the loader take the class below. A class named as the value, too, would be sent sound.
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config.model_type] = config.model_type
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type] = KeyeForConditionalGeneration.__name__
    AutoModelForMultimodalLM.register(config, KeyeForConditionalGeneration, exist_ok=True)
