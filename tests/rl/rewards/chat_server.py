"""A real HTTP server with the OpenAI protocol that behaves badly on request."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """Serves `/v1/chat/completions`; `behave` maps a request to a text, or to one of:

    an int (HTTP status), None (an answer without text), "<garbage>" (no JSON), "<list>" (JSON of another shape),
    "<close>" (the connection ends), "<slow>" (silence for 3 s), "<drip>" (a byte every 0.1 s for 5 s).
    """

    def __init__(self, behave: Callable[[dict], object]) -> None:
        self.behave, self.requests, self.active, self.most = behave, [], 0, 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append(asked)
                    server.active += 1
                    server.most = max(server.most, server.active)
                try:
                    self.reply(server.behave(asked))
                except OSError:
                    pass  # the client has gone
                finally:
                    with server.lock:
                        server.active -= 1

            def reply(self, behaviour):
                if behaviour == "<close>":
                    self.close_connection = True
                    self.connection.close()
                elif behaviour == "<slow>":
                    time.sleep(3)
                    self.send(200, completion("late"))
                elif behaviour == "<drip>":
                    self.send_response(200)
                    self.send_header("Content-Length", "50")
                    self.end_headers()
                    for _ in range(50):
                        self.wfile.write(b" ")
                        time.sleep(0.1)
                elif behaviour == "<garbage>":
                    self.send(200, b"<html>no model here")
                elif behaviour == "<list>":
                    self.send(200, b'["a"]')
                elif isinstance(behaviour, int):
                    self.send(behaviour, b'{"error": {"message": "as asked"}}')
                else:
                    self.send(200, completion(behaviour))

            def send(self, status, body):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


def completion(text: str | None) -> bytes:
    """The body of an answer."""
    message = {"role": "assistant", "content": text}
    content = [{"token": word, "logprob": -0.5, "bytes": None, "top_logprobs": []} for word in (text or "").split()]
    choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": {"content": content}}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    head = {"id": "a", "object": "chat.completion", "created": 1, "model": "m"}
    return json.dumps(head | {"choices": [choice], "usage": usage}).encode()
