"""A real HTTP server on localhost whose answers are a function of the request, for tests of clients."""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text, prompt=10, completion=5, finish="stop", **choice) -> dict[str, Any]:
    """The body of a valid response."""
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish, **choice}], "usage": usage}


def text_of(request: dict[str, Any]) -> str:
    """All text of the last message of a request."""
    content = request["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class Fake:
    """requests: the bodies so far. most: the most requests at a time."""

    def __init__(self, answer: Callable[[dict[str, Any], BaseHTTPRequestHandler], Any]) -> None:
        self.answer, self.requests, self.now, self.most = answer, [], 0, 0
        self.lock, self.url = threading.Lock(), ""


class Server(ThreadingHTTPServer):
    """A server whose queue has room for all connections of a client; five are the default, others are reset."""

    daemon_threads = True
    request_queue_size = 128


@contextmanager
def served(answer, port=0):
    """`answer(request, handler)` gives a body, (status, body, *headers), or None if it wrote the response itself."""
    fake = Fake(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                fake.requests.append(request)
                fake.now += 1
                fake.most = max(fake.most, fake.now)
            try:
                given = fake.answer(request, self)
            finally:
                with fake.lock:
                    fake.now -= 1
            if given is None:
                self.close_connection = True
                return
            status, body, *headers = given if isinstance(given, tuple) else (200, given)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = Server(("127.0.0.1", port), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
