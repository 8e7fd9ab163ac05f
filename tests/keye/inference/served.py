"""A running server, and raw HTTP requests to it."""

import contextlib
import http.client
import json
import threading
import time

from keye.inference.http_server import make_server

POST = "/v1/chat/completions"


@contextlib.contextmanager
def serving(answerer, access, **more):
    """A running server's (host, port)."""
    with make_server(answerer, access, **more) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server.address
        finally:
            server.stop()
            thread.join(30)


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def ask(address, body, headers=None, method="POST", path=POST):
    """(status, headers, text) of one request."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    body = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, response.headers, text


def head_of(length):
    """The head of a POST whose body has this number of bytes."""
    head = f"POST {POST} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode()


def user(*parts, **more):
    return {"model": "tiny", "messages": [{"role": "user", "content": list(parts)}], **more}


def words(text):
    return {"type": "text", "text": text}
