"""The local page of the review: an HTTP server for one person's browser on the same machine.

It listens on 127.0.0.1 only. Every request needs the token of the printed address and a local host name, so that
neither another user nor a page of another site can read or decide anything. The page loads nothing from elsewhere.
"""

from __future__ import annotations

import json
import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from keye.encoder import SlowFastEncoder
from keye.errors import KeyeError
from keye.processor.messages import read_chat
from keye.processor.options import video_encoder
from keye.video.images import load_image
from keye.visualize.notebook import plan_html, thumbnail
from rl.reasoning.items import Row, question_of
from rl.reasoning.review import Decision, Review
from rl.reasoning.review_page import page

_MOST_BYTES = 1 << 20
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'nonce-{}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class ReviewServer:
    """Serves a review until it is closed.

    Args:
        review: the queue. port: 0 takes a free one. max_tokens: of the plan whose filmstrip is shown.

    Raises:
        KeyeError: the port is taken.
    """

    def __init__(self, review: Review, port: int = 0, max_tokens: int = 8_000) -> None:
        self.review, self.token = review, secrets.token_urlsafe(24)
        self.encoder = SlowFastEncoder(max_tokens=max_tokens)
        try:
            self.http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        except OSError as error:
            raise KeyeError(f"port {port} cannot be used ({error.strerror}); give another --port") from error
        self.http.daemon_threads = True

    @property
    def url(self) -> str:
        """The address for the browser, with the token."""
        return f"http://127.0.0.1:{self.http.server_port}/?token={self.token}"

    def run(self) -> None:
        """Answer requests until `close` or an interrupt."""
        self.http.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        """Stop answering."""
        self.http.shutdown()
        self.http.server_close()

    def item(self, place: int) -> Row:
        """What the page shows of a place in the queue."""
        row, review = self.review.row(place), self.review
        decision, path = review.decision(place), row["trajectory"]
        steps = [{"text": s["text"], "confidence": s["confidence"]} for s in path["steps"]]
        if decision is not None:
            steps = [{"text": text, "confidence": None} for text in decision.steps]
        return {
            "place": place, "total": len(review), "open": len(review.open), "id": row["id"], "grade": row["grade"],
            "why": "borderline" if row["grade"] == "A" else row.get("why", ""),
            "question": question_of(row["messages"]),
            "options": row.get("options") or [], "answer": row["answer"], "given": path["answer"], "steps": steps,
            "flawed": row.get("flawed", []) if decision is None else [],
            "confidence": path.get("answer_confidence"), "process": row.get("process"),
            "decision": None if decision is None else "accepted" if decision.accept else "rejected",
            "media": self._media(row),
        }  # fmt: skip

    def next_open(self, after: int) -> int | None:
        """The next place without a decision after a place, in a cycle; None if all are decided."""
        places = self.review.open
        return next((place for place in places if place > after), places[0] if places else None)

    def _media(self, row: Row) -> str:
        """The media as HTML: a filmstrip of each video's plan, and the images."""
        found = []
        try:
            users = [message for message in row["messages"] if message["role"] != "assistant"]
            for visual in read_chat(users, self.review.source.parent, generating=True).visuals:
                if visual.kind == "image":
                    picture = load_image(visual.source).permute(1, 2, 0).numpy()
                    found.append(thumbnail(picture, "image"))
                else:
                    encoder, sampling = video_encoder(self.encoder, visual.options)
                    found.append(plan_html(encoder.plan(visual.source, **sampling)))
        except KeyeError as error:  # the chain can still be reviewed or rejected
            found.append(f"<p>{_escaped(str(error))}</p>")
        return "".join(found)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _handler(server: ReviewServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(address.query).items()}
            if not self._allowed(query.get("token", "")):
                return
            if address.path == "/":
                nonce = secrets.token_urlsafe(12)
                self._send(page(nonce).encode(), "text/html; charset=utf-8", nonce=nonce)
            elif address.path == "/item":
                self._item(query.get("place", ""))
            else:
                self._fail(404, "there is no such page")

        def do_POST(self) -> None:
            if not self._allowed(""):
                return
            try:
                length = int(self.headers.get("Content-Length", ""))
                if not 0 <= length <= _MOST_BYTES or self.path != "/decide":
                    raise ValueError("a request of another form")
                given = json.loads(self.rfile.read(length))
                place = given["place"]
                if type(place) is not int or not 0 <= place < len(server.review):
                    raise ValueError("there is no such place in the queue")
                server.review.decide(place, Decision.of(given))
            except KeyeError as error:
                self._fail(400, str(error))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                self._fail(400, f"the request cannot be read ({error})")
            else:
                self._json({"next": server.next_open(place), "open": len(server.review.open)})

        def _item(self, place: str) -> None:
            number = server.next_open(-1) if place == "" else int(place) if place.isdecimal() else -1
            if number is None:
                self._json({"total": len(server.review), "open": 0, "place": None})
            elif 0 <= number < len(server.review):
                self._json(server.item(number))
            else:
                self._fail(404, "there is no such place in the queue")

        def _allowed(self, token: str) -> bool:
            host = self.headers.get("Host", "").rpartition(":")[0]
            given = self.headers.get("X-Token", token)
            if host in ("127.0.0.1", "localhost") and secrets.compare_digest(given.encode(), server.token.encode()):
                return True
            self._fail(403, "open the address that the command printed")
            return False

        def _json(self, value: Any, status: int = 200) -> None:
            self._send(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"), "application/json", status)

        def _fail(self, status: int, why: str) -> None:
            self.close_connection = True  # the rest of the request may not have been read
            self._json({"error": why}, status)

        def _send(self, data: bytes, kind: str, status: int = 200, nonce: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Referrer-Policy", "no-referrer")  # the address has the token
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Content-Security-Policy", _POLICY.format(nonce or secrets.token_urlsafe(8)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing; the page reports errors."""

    return Handler
