"""What strangers may hold of a server: connections, seconds, and bytes of bodies that are being read."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from uvicorn.protocols.http.h11_impl import H11Protocol

from keye.inference.openai_format import RequestError

ENDING = "the server is shutting down; ask again later"


@dataclass(frozen=True)
class Limits:
    """What strangers may hold.

    connections: open at a time. head_seconds: until the head of a request is complete. body_seconds: until a body has
    to come at `body_rate` bytes a second, counted from its first. whole_seconds: until a body is complete, whatever its
    rate. bytes_in_flight: bytes of all bodies that have arrived, together, as a multiple of the largest body.
    grace_seconds: what running requests have to finish when the server is told to stop.
    """

    connections: int = 256
    head_seconds: float = 15.0
    body_seconds: float = 15.0
    body_rate: int = 1 << 17
    whole_seconds: float = 600.0
    bytes_in_flight: float = 2.0
    grace_seconds: float = 5.0


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


class Bodies:
    """Reads bodies within limits of bytes and seconds. largest: bytes of one body."""

    def __init__(self, largest: int, limits: Limits) -> None:
        self.largest, self.limits = largest, limits
        self._room = int(largest * limits.bytes_in_flight)
        self._reading: set[asyncio.Timeout] = set()
        self._closed = False

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
        """The body; the bytes that have arrived count against the room of all until the block is left.

        Raises:
            RequestError: the room is used up (429), the body comes too slowly (408), or the server stops (503).
        """
        body = bytearray()
        try:
            await self._arrive(request, body)
            yield bytes(body)
        finally:
            self._room += len(body)

    async def _arrive(self, request: HttpRequest, body: bytearray) -> None:
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
                raise RequestError(ENDING, 503, "shutdown") from None
            raise RequestError("the body did not arrive in time; send it again", 408, "timeout") from None
        finally:
            self._reading.discard(limit)

    def _deadline(self, began: float, arrived: int) -> float:
        """When more has to be there. What is declared buys no time, only what arrives does."""
        limits = self.limits
        return began + min(limits.whole_seconds, limits.body_seconds + arrived / limits.body_rate)

    def close(self) -> None:
        """End all reading, now and from now on. Call it in the event loop."""
        self._closed = True
        for limit in self._reading:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())
