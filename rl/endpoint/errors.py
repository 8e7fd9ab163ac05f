"""Errors of endpoints: of one request, or of all of them."""

from keye.errors import KeyeError


class EndpointError(KeyeError):
    """The endpoint cannot be used: the run stops, and the same command continues later."""


class RefusedRequest(EndpointError):
    """This request gets no answer, however often it is sent; others may."""


class TransientError(Exception):
    """A failed attempt that is repeated. charged: whether the endpoint may bill for it; wait: seconds it asks for;
    busy: whether it limits the rate of requests."""

    def __init__(self, message: str, charged: bool = False, wait: float | None = None, busy: bool = False) -> None:
        super().__init__(message)
        self.charged, self.wait, self.busy = charged, wait, busy
