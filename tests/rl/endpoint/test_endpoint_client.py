"""The client against a real server that is down, slow, silent, cut off, or answers with something else."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from keye.errors import KeyeError
from rl.endpoint import Ask, Client, CostCeiling, EndpointError, Limits, Price, RefusedRequest, RemoteModel
from rl.endpoint.errors import TransientError
from tests.rl.endpoint.fake_server import completion, served, text_of

QUICK = Limits(concurrency=4, seconds=5, patience=20, invalid=3, first_wait=0.02, longest_wait=0.05)
FREE = Price()


def ask(text="hello", **more):
    return Ask([{"role": "user", "content": text}], **({"max_tokens": 20} | more))


def client(fake_or_url, folder, limits=QUICK, price=FREE, **more):
    url = fake_or_url if isinstance(fake_or_url, str) else fake_or_url.url
    return Client(RemoteModel(url, "tiny", "secret-key"), folder, price, limits, **more)


def test_answers_come_once_from_the_server_and_then_from_disk(tmp_path):
    with served(lambda request, _: completion(text_of(request).upper())) as fake:
        with client(fake, tmp_path) as first:
            answers = first.ask_many(ask(f"w{number}") for number in range(20))
        assert [answer.text for answer in answers] == [f"W{number}" for number in range(20)]
        assert fake.most <= QUICK.concurrency and len(fake.requests) == 20
        with client(fake, tmp_path) as again:
            assert [a.text for a in again.ask_many(ask(f"w{number}") for number in range(20))][7] == "W7"
            assert again.hits == 20 and again.ask(ask("w7")).cached
        assert len(fake.requests) == 20


def test_every_part_of_a_request_is_in_its_key():
    base, picture = ask(), [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    others = [
        ask("hello "), ask(max_tokens=21), ask(temperature=1.0), ask(top_p=0.5), ask(sample=1), ask(logprobs=True),
        ask(thinking=False), Ask([{"role": "user", "content": picture}], max_tokens=20),
    ]  # fmt: skip
    keys = {one.key("tiny") for one in (base, *others)} | {base.key("large")}
    assert len(keys) == len(others) + 2
    clip = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "/a/clip.mp4"}}]}]
    moved = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "/b/clip.mp4"}}]}]
    assert Ask(clip, files={"/a/clip.mp4": "d1"}).key("m") == Ask(moved, files={"/b/clip.mp4": "d1"}).key("m")
    assert Ask(clip, files={"/a/clip.mp4": "d1"}).key("m") != Ask(clip, files={"/a/clip.mp4": "d2"}).key("m")


def test_the_same_request_of_many_threads_is_sent_once(tmp_path):
    def slow(request, _):
        time.sleep(0.1)
        return completion("yes")

    with served(slow) as fake, client(fake, tmp_path) as one:
        assert {answer.text for answer in one.ask_many([ask()] * 8)} == {"yes"}
        assert len(fake.requests) == 1


def silent(request, handler):
    time.sleep(1.0)


def dribbling(request, handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(20):  # each byte in time, but never all of them
        time.sleep(0.1)
        handler.wfile.write(b" ")


def cut_off(request, handler):
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n{"choi')


@pytest.mark.parametrize(
    "fault",
    [
        silent, dribbling, cut_off, lambda *_: (500, {"error": "x"}), lambda *_: (429, {"error": "busy"}),
        lambda *_: b"<html>ok</html>", lambda *_: {}, lambda *_: {"choices": []}, lambda *_: [1, 2],
        lambda *_: {"choices": [{"message": {"content": ["no", "text"]}}]}, lambda *_: b"\xff\xfe\x00",
        lambda *_: {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}, lambda *_: b"[" * 100_000,
    ],
    ids=lambda fault: getattr(fault, "__name__", None),
)  # fmt: skip
def test_a_fault_is_repeated_until_the_answer_comes(tmp_path, fault):
    count = []

    def answer(request, handler):
        count.append(1)
        try:
            return fault(request, handler) if len(count) < 3 else completion("right")
        except OSError:  # the client has left
            return None

    said, limits = [], replace(QUICK, seconds=0.4) if fault in (silent, dribbling) else QUICK
    with served(answer) as fake, client(fake, tmp_path, limits, log=said.append) as one:
        assert one.ask(ask()).text == "right"
        assert one.retries >= 2
    assert len(said) == 2 and "repeated" in said[0] and "answers again" in said[1]


def test_an_endpoint_that_is_down_is_waited_for_and_then_used(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with client(f"http://127.0.0.1:{port}/v1", tmp_path, price=Price(1, 1, 1)) as one:
        future = one.submit(ask())
        time.sleep(0.3)
        assert not future.done()
        with served(lambda *_: completion("up"), port):
            assert future.result(10).text == "up"
        assert one.ledger.lost == 0  # nothing was sent before


def test_after_its_patience_the_run_stops_with_a_sentence(tmp_path):
    limits = Limits(concurrency=2, seconds=0.2, patience=0.3, first_wait=0.05, longest_wait=0.05)
    with client("http://127.0.0.1:9/v1", tmp_path, limits) as one:
        with pytest.raises(EndpointError, match=r"tiny at http.* gave no answer in \d+ attempts.*run the same command"):
            one.ask(ask())


def test_a_server_that_always_lies_refuses_the_request_and_not_the_run(tmp_path):
    with served(lambda *_: {"choices": "none"}) as fake, client(fake, tmp_path) as one:
        with pytest.raises(RefusedRequest, match="no usable answer in 3 attempts"):
            one.ask(ask())
        assert len(fake.requests) == 3


@pytest.mark.parametrize(("status", "kind"), [(400, RefusedRequest), (413, RefusedRequest), (401, EndpointError)])
def test_a_refusal_is_not_repeated_and_does_not_show_the_key(tmp_path, status, kind):
    with served(lambda *_: (status, {"error": {"message": "bad secret-key here"}})) as fake:
        with client(fake, tmp_path) as one, pytest.raises(EndpointError) as raised:
            one.ask(ask())
        assert type(raised.value) is kind and "secret-key" not in str(raised.value)
        assert len(fake.requests) == 1


def test_a_wait_that_the_server_asks_for_is_kept(tmp_path):
    times = []

    def answer(request, handler):
        times.append(time.monotonic())
        if len(times) > 1:
            return completion("ok")
        handler.wfile.write(b"HTTP/1.1 429 No\r\nRetry-After: 0.5\r\nContent-Length: 2\r\n\r\n{}")

    limits = Limits(concurrency=1, seconds=2, patience=5, first_wait=0.01, longest_wait=1)
    with served(answer) as fake, client(fake, tmp_path, limits) as one:
        one.ask(ask())
    assert times[1] - times[0] >= 0.5


def test_the_ceiling_stops_before_it_is_exceeded_and_counts_earlier_runs(tmp_path):
    price = Price(prompt=0.0, completion=1e6, ceiling=50.0)  # 1 per token of an answer; 20 are reserved, 5 used
    with served(lambda *_: completion("x")) as fake:
        with client(fake, tmp_path, price=price) as one, pytest.raises(CostCeiling, match="raise --max-cost"):
            one.ask_many(ask(f"{number}") for number in range(30))
        assert one.cache.spent <= 50
        sent = len(fake.requests)
        assert sent == 7  # after 35, another 20 could exceed 50
        with client(fake, tmp_path, price=price) as again:
            assert again.cache.spent == 35 and again.ledger.cost == 0
            with pytest.raises(CostCeiling):
                again.ask(ask("another"))
            assert again.ask(ask("0")).cached
        assert len(fake.requests) == sent


def test_requests_without_an_answer_count_at_their_bound(tmp_path):
    count = []

    def answer(request, handler):
        count.append(1)
        return cut_off(request, handler) if len(count) == 1 else completion("x", 10, 5)

    price = Price(prompt=0.0, completion=1e6)
    with served(answer) as fake, client(fake, tmp_path, price=price) as one:
        assert one.ask(ask()).cost == 5
        assert one.cache.spent == 25 and one.ledger.lost == 1
    with client("http://127.0.0.1:9/v1", tmp_path) as again:
        assert again.cache.spent == 25


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": -4, "completion_tokens": 2}, {"prompt_tokens": "many"}])
def test_a_missing_or_impossible_count_of_tokens_is_charged_at_the_bound(tmp_path, usage):
    price = Price(prompt=2.0, completion=3.0)
    with served(lambda *_: completion("x") | {"usage": usage}) as fake, client(fake, tmp_path, price=price) as one:
        assert one.ask(ask()).cost == price.bound(ask()) > 0


def test_prices_that_are_no_prices_are_refused():
    for wrong in ({"prompt": -1.0}, {"completion": float("nan")}, {"ceiling": 5.0}):
        with pytest.raises(KeyeError):
            Price(**wrong)


CHILD = """
import sys
from rl.endpoint import Ask, Client, Limits, RemoteModel
client = Client(RemoteModel(sys.argv[1], "tiny"), sys.argv[2], limits=Limits(concurrency=2))
client.ask_many(Ask([{"role": "user", "content": str(number)}], max_tokens=4) for number in range(40))
print("done", flush=True)
"""


def test_kill_9_loses_at_most_the_requests_in_flight(tmp_path):
    answered, lock, enough = [], threading.Lock(), threading.Event()

    def answer(request, _):
        time.sleep(0.02)
        with lock:
            answered.append(text_of(request))
            if len(answered) == 12:
                enough.set()
        return completion("a" + text_of(request))

    with served(answer) as fake:
        root = Path(__file__).resolve().parents[3]
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, fake.url, str(tmp_path)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        assert enough.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.1)
        before = len(answered)
        with client(fake, tmp_path, Limits(concurrency=2)) as one:
            assert len(one.cache) >= before - 2
            texts = [a.text for a in one.ask_many(ask(str(number), max_tokens=4) for number in range(40))]
        assert texts == [f"a{number}" for number in range(40)]
        assert len(answered) <= 42


def test_a_line_cut_off_or_damaged_on_disk_is_asked_again(tmp_path):
    with served(lambda request, _: completion(text_of(request))) as fake:
        with client(fake, tmp_path) as one:
            one.ask_many([ask("first"), ask("second")])
        (log,) = tmp_path.glob("*.log")
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(lines[0].replace(b'"text": "', b'"text": "X') + lines[1][:-9])
        with client(fake, tmp_path) as again:
            assert again.cache.damaged == 1 and len(again.cache) == 0
            assert [answer.text for answer in again.ask_many([ask("first"), ask("second")])] == ["first", "second"]
        with client(fake, tmp_path) as third:
            assert len(third.cache) == 2


def test_the_environment_names_the_model_and_a_missing_variable_is_a_sentence(tmp_path, monkeypatch):
    for name in ("URL", "MODEL", "KEY"):
        monkeypatch.delenv(f"KEYE_JUDGE_{name}", raising=False)
    with pytest.raises(KeyeError, match="KEYE_JUDGE_URL is not set"):
        Client.from_environment("judge", tmp_path)
    monkeypatch.setenv("KEYE_JUDGE_URL", "http://localhost:1/v1")
    with pytest.raises(KeyeError, match="KEYE_JUDGE_MODEL is not set"):
        Client.from_environment("judge", tmp_path)
    monkeypatch.setenv("KEYE_JUDGE_MODEL", "big")
    monkeypatch.setenv("KEYE_JUDGE_KEY", "k-123")
    with Client.from_environment("judge", tmp_path) as one:
        assert one.backend.name == "big" and "k-123" not in repr(one.backend)


@pytest.mark.parametrize("headers", [[("Retry-After", "0.02")], []])
def test_an_endpoint_that_limits_the_rate_loses_no_request(tmp_path, headers):
    # Three of four requests are refused. One that is refused often is behind others, and the endpoint is not gone.
    numbers, said = itertools.count(), []

    def limiting(request, _):
        return completion("yes") if next(numbers) % 4 == 0 else (429, {"error": "busy"}, *headers)

    limits = Limits(concurrency=16, seconds=10, patience=1.0, first_wait=0.02, longest_wait=0.3)
    with served(limiting) as fake, client(fake, tmp_path, limits, log=said.append) as one:
        began = time.monotonic()
        answers = one.ask_many(ask(f"w{number}") for number in range(150))
        assert [answer.text for answer in answers] == ["yes"] * 150
        assert not headers or time.monotonic() - began < 60
    assert 1 <= sum("is repeated" in text for text in said) <= 3 and len(said) <= 6


def test_an_endpoint_that_refuses_everything_is_left_after_the_patience(tmp_path):
    limits = replace(QUICK, patience=0.5)
    with served(lambda *_: (429, {"error": "busy"})) as fake, client(fake, tmp_path, limits) as one:
        began = time.monotonic()
        with pytest.raises(EndpointError, match="status 429"):
            one.ask(ask())
        assert time.monotonic() - began < 20


def test_the_wait_that_an_endpoint_asks_for_is_kept_and_not_doubled(tmp_path):
    with client("http://127.0.0.1:1/v1", tmp_path, Limits(first_wait=0.1, longest_wait=60)) as one:
        pauses = [one._pause(TransientError("busy", wait=2.0), 32.0) for _ in range(200)]
        assert min(pauses) >= 2.0 and max(pauses) <= 3.0 and len(set(pauses)) > 100  # not all at the same time
        assert max(one._pause(TransientError("busy", wait=1e9), 1.0) for _ in range(50)) <= 90
        assert min(one._pause(TransientError("busy", wait=0.0), 1.0) for _ in range(50)) >= 0.05
        assert 16 <= one._pause(TransientError("down"), 32.0) <= 32


def test_a_text_that_is_not_unicode_is_sent_with_question_marks(tmp_path):
    echo = lambda request, _: completion(text_of(request))  # noqa: E731
    with served(echo) as fake, client(fake, tmp_path, price=Price(1, 1)) as one:
        assert one.ask(ask("blue\ud83d 青")).text == "blue? 青"
