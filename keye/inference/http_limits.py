"""Limits for the clients of a server: connections, seconds, and bytes of request bodies in memory."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from uvicorn.protocols.http.h11_impl import H11Protocol

from keye.inference.openai_format import RequestError

SHUTTING_DOWN = "the server is shutting down; ask again later"


@dataclass(frozen=True)
class Limits:
    """The limits for all clients together and for one request.

    connections: open at a time. head_seconds: until the head of a request is complete. body_seconds: time that a body
    has in addition to its bytes at `body_rate` (bytes per second). total_seconds: until a body is complete, at any
    rate. bytes_in_flight: received bytes of all bodies together, as a multiple of the largest allowed body.
    grace_seconds: time for running requests to finish when the server stops.
    """

    connections: int = 256
    head_seconds: float = 15.0
    body_seconds: float = 15.0
    body_rate: int = 1 << 17
    total_seconds: float = 600.0
    bytes_in_flight: float = 2.0
    grace_seconds: float = 5.0


class HeadTimeoutProtocol(H11Protocol):
    """uvicorn's HTTP/1.1; closes a connection whose request head is not complete in time."""

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


class BodyReader:
    """Reads request bodies within limits of bytes and seconds. largest: most bytes of one body."""

    def __init__(self, largest: int, limits: Limits) -> None:
        self.largest, self.limits = largest, limits
        self._room = int(largest * limits.bytes_in_flight)
        self._reading: set[asyncio.Timeout] = set()
        self._closed = False

    def check(self, request: HttpRequest) -> None:
        """Raise RequestError for a body that is refused before it is read."""
        if "transfer-encoding" in request.headers:  # it overrides the Content-Length
            raise RequestError("Transfer-Encoding is not supported; send only a Content-Length", 411, "length_required")
        try:
            length = int(request.headers["content-length"])
        except (KeyError, ValueError):
            raise RequestError("the request has no Content-Length", 411, "length_required") from None
        if not 0 <= length <= self.largest:
            raise RequestError(f"the body has {length:,} bytes and {self.largest:,} are allowed", 413, "too_large")
        # A page in a browser can post other types without a CORS preflight, which is never granted.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("the Content-Type is not application/json", 415, "invalid_request")

    @contextlib.asynccontextmanager
    async def read(self, request: HttpRequest) -> AsyncIterator[bytes]:
        """The body; its received bytes count against the limit of all bodies until the block ends.

        Raises:
            RequestError: the limit is reached (429), the body is too slow (408), or the server stops (503).
        """
        body = bytearray()
        try:
            await self._receive(request, body)
            yield bytes(body)
        finally:
            self._room += len(body)

    async def _receive(self, request: HttpRequest, body: bytearray) -> None:
        busy = RequestError("other requests are being read; try again later", 429, "busy")
        if int(request.headers["content-length"]) > self._room:  # before the client sends it all
            raise busy
        began = asyncio.get_running_loop().time()
        limit = asyncio.timeout_at(began if self._closed else self._deadline(began, 0))
        self._reading.add(limit)
        try:
            async with limit:
                async for chunk in request.stream():
                    if len(chunk) > self._room:
                        raise busy
                    self._room -= len(chunk)
                    body += chunk
                    if not self._closed and not limit.expired():
                        limit.reschedule(self._deadline(began, len(body)))
        except TimeoutError:
            if self._closed:
                raise RequestError(SHUTTING_DOWN, 503, "shutdown") from None
            raise RequestError("the body did not arrive in time; send it again", 408, "timeout") from None
        finally:
            self._reading.discard(limit)

    def _deadline(self, began: float, received: int) -> float:
        """When more bytes are due. Received bytes extend the deadline; the declared length does not."""
        limits = self.limits
        return began + min(limits.total_seconds, limits.body_seconds + received / limits.body_rate)

    def close(self) -> None:
        """End all reading, current and future. Call it in the event loop."""
        self._closed = True
        for limit in self._reading:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())
