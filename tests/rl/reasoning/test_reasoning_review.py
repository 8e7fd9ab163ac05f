"""The queue of the review, its decisions on disk, and its server."""

import http.client
import json
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from keye.errors import KeyeError, ManifestError
from keye.processor.reply import parse_reply
from rl.reasoning.review import Decision, Review
from rl.reasoning.review_server import ReviewServer
from rl.reasoning.work import dropped_path
from tests.rl.reasoning.graded import write_graded
from tests.rl.reasoning.questions import rows


@contextmanager
def running(review):
    server = ReviewServer(review)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


def request(server, path, body=None, token=None, host=None):
    """(status, headers, body) of one request."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    headers = {"X-Token": server.token if token is None else token} | ({"Host": host} if host else {})
    connection.request("POST" if body is not None else "GET", path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, response.headers, text


def test_all_b_and_borderline_a_are_queued_and_the_output_follows_the_decisions(tmp_path):
    source, out = write_graded(tmp_path), tmp_path / "set" / "reviewed.jsonl"
    out.parent.mkdir()
    review = Review(source, out)
    assert [review.row(place)["id"] for place in range(len(review))] == ["q0/1", "q0/2", "q0/3"]
    assert review.write() == {"not queued": 1, "open": 3}
    review.decide(0, Decision(True, tuple(step["text"] for step in review.row(0)["trajectory"]["steps"])))
    review.decide(1, Decision(True, ("The square is blue.",)))
    review.decide(2, Decision(False, ()))
    assert review.write() == {"not queued": 1, "accepted": 1, "accepted, edited": 1, "rejected": 1}
    kept = {row["id"]: row for row in rows(out)}
    assert set(kept) == {"q0/0", "q0/1", "q0/2"} and [row["id"] for row in rows(dropped_path(out))] == ["q0/3"]
    edited = kept["q0/2"]["trajectory"]
    assert parse_reply(edited["text"]).thinking == edited["thinking"] == "The square is blue."
    assert parse_reply(edited["text"]).answer == "blue0" and kept["q0/2"]["reviewed"]["edited"]
    clip = kept["q0/1"]["messages"][0]["content"][0]["video"]
    assert (out.parent / clip).resolve() == (tmp_path / "clip0.mp4").resolve()


def test_decisions_are_on_disk_at_once_the_last_counts_and_a_torn_line_is_removed(tmp_path):
    source, out = write_graded(tmp_path), tmp_path / "reviewed.jsonl"
    review = Review(source, out)
    review.decide(1, Decision(False, ()))
    review.decide(1, Decision(True, ("Better.",)))
    with review.log.open("ab") as file:  # the process was killed here
        file.write(b'{"key": "ab')
    again = Review(source, out)
    assert again.decision(1) == Decision(True, ("Better.",)) and again.open == [0, 2]
    again.decide(0, Decision(False, ()))
    assert len(rows(again.log)) == 3


def test_a_decision_is_not_applied_to_another_chain_of_the_same_id(tmp_path):
    source, out = write_graded(tmp_path), tmp_path / "reviewed.jsonl"
    Review(source, out).decide(0, Decision(True, ("Fine.",)))
    source.write_text(source.read_text().replace("At 0.0 s there is noise.", "Another chain."))
    assert Review(source, out).open == [0, 1, 2]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"accept": True, "steps": []}, "needs a step"), ({"accept": True, "steps": [" \n "]}, "needs a step"),
        ({"accept": True, "steps": ["a</think>b"]}, "contains </think>"), ({"accept": 1, "steps": []}, "accept"),
        ({"steps": ["a"]}, "accept"), ({"accept": True, "steps": "a"}, "list"), ([], "accept"),
    ],
)  # fmt: skip
def test_a_decision_that_cannot_be_used_is_refused(given, why):
    with pytest.raises(KeyeError, match=why):
        Decision.of(given)


def test_a_file_of_another_step_is_refused(tmp_path):
    write_graded(tmp_path)
    with pytest.raises(ManifestError, match="questions.jsonl:1 is not a line of keye reasoning grade"):
        Review(tmp_path / "questions.jsonl", tmp_path / "out.jsonl")


def test_the_server_needs_its_token_and_a_local_name_and_loads_nothing(tmp_path):
    with running(Review(write_graded(tmp_path), tmp_path / "reviewed.jsonl")) as server:
        assert server.http.server_address[0] == "127.0.0.1"
        assert request(server, "/", token="")[0] == 403 and request(server, "/item", token="wrong")[0] == 403
        assert request(server, "/decide", "{}", token="")[0] == 403
        assert request(server, "/item", host="evil.example:80")[0] == 403
        status, headers, text = request(server, f"/?token={server.token}", token=None)
        assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
        assert "http://" not in text and "https://" not in text
        for body in ("", "[]", "{", '{"place": 99, "accept": true, "steps": ["a"]}', '{"place": true}', "[" * 9999):
            assert request(server, "/decide", body)[0] == 400
        assert request(server, "/decide", '{"place": 0, "accept": true, "steps": []}')[0] == 400
        assert request(server, "/item?place=77")[0] == 404 and request(server, "/nothing")[0] == 404
        assert len(server.review.open) == 3


def test_the_server_shows_the_filmstrip_and_goes_through_the_queue(tmp_path):
    with running(Review(write_graded(tmp_path), tmp_path / "reviewed.jsonl")) as server:
        item = json.loads(request(server, "/item")[2])
        assert (item["place"], item["total"], item["open"], item["grade"]) == (0, 3, 3, "A")
        assert item["media"].count("data:image/jpeg") >= 2 and "slow" in item["media"] and "fast" in item["media"]
        body = {"place": 0, "accept": True, "steps": ["Seen."]}
        assert json.loads(request(server, "/decide", json.dumps(body))[2]) == {"next": 1, "open": 2}
        assert json.loads(request(server, "/item?place=1")[2])["flawed"] == [1, 2]
        for place in (1, 2):
            request(server, "/decide", json.dumps({"place": place, "accept": False, "steps": []}))
        assert json.loads(request(server, "/item")[2])["place"] is None
        assert json.loads(request(server, "/item?place=0")[2])["decision"] == "accepted"


def test_a_clip_that_is_missing_is_said_and_the_chain_can_be_reviewed(tmp_path):
    source = write_graded(tmp_path)
    (tmp_path / "clip0.mp4").unlink()
    with running(Review(source, tmp_path / "reviewed.jsonl")) as server:
        item = json.loads(request(server, "/item")[2])
        assert "clip0.mp4" in item["media"] and len(item["steps"]) == 3
