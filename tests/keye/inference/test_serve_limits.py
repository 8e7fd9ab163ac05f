"""The limits for clients of the server, over real sockets; how it stops; its answers to arbitrary requests."""

import asyncio
import contextlib
import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from anyio import to_thread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keye.errors import KeyeError
from keye.inference.answerer import Answerer
from keye.inference.answering import Answering
from keye.inference.chat import load_model
from keye.inference.http_limits import BodyReader, Limits
from keye.inference.openai_format import READ, ROLES, Access, RequestError, read_request
from keye.inference.sampling import Sampling
from keye.inference.serve import api_key
from keye.video.fetch import UrlRules
from tests.keye.inference.served import POST, ask, head_of, serving, until, user, words
from tests.keye.inference.talk import tiny_directory

LARGEST = 1500 + (1 << 20)  # bytes of a body where clips may have 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("limits")
    tiny_directory(path / "model")
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder / "model", "cpu", "float32")


@contextlib.contextmanager
def lines(address, number):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(number)]


def test_idle_connections_that_declare_large_bodies_block_no_client(loaded):
    with serving(Answerer(*loaded, "tiny", most_tokens=8), Access(max_bytes=1000)) as address:
        with lines(address, 3) as held:
            for line in held:
                line.sendall(head_of(LARGEST) + b"{")
            time.sleep(0.3)
            assert ask(address, user(words("?"), max_tokens=1))[0] == 200


def test_bytes_of_bodies_that_have_arrived_are_bounded(loaded, monkeypatch):
    """Two bodies lack a byte of the largest size: there is room for two bytes, and a third body is refused."""
    made, init = [], BodyReader.__init__
    monkeypatch.setattr(BodyReader, "__init__", lambda self, *args: made.append(self) or init(self, *args))
    with serving(Answerer(*loaded, "tiny", most_tokens=8), Access(max_bytes=1000)) as address:
        with lines(address, 2) as held:
            for line in held:
                line.sendall(head_of(LARGEST) + b"x" * (LARGEST - 1))
            until(lambda: made[0]._room == 2)
            assert ask(address, user(words("?"), max_tokens=1))[0] == 429
        until(lambda: ask(address, user(words("?"), max_tokens=1))[0] == 200)


def test_room_is_used_up_by_bytes_that_come_later(loaded):
    """Three bodies begin while there is room for them; together they do not fit, and one is refused on the way."""
    with serving(Answerer(*loaded, "tiny", most_tokens=8), Access(max_bytes=1000)) as address:
        with lines(address, 3) as held:
            for line in held:
                line.sendall(head_of(LARGEST))
            time.sleep(0.2)
            for line in held:
                line.settimeout(1)
                with contextlib.suppress(TimeoutError, ConnectionError):
                    line.sendall(b"x" * (LARGEST - 1))
            answers = []
            for line in held:
                with contextlib.suppress(TimeoutError):
                    answers.append(line.recv(100).split()[1])
            assert answers == [b"429"]


@pytest.mark.parametrize(("rate", "whole", "gap"), [(1 << 20, 60.0, 0.05), (1, 1.0, 0.05)])
def test_a_body_comes_at_a_rate_and_in_time(loaded, rate, whole, gap):
    """A byte at a time: too slow for the first limits; fast enough for the second ones, whose total time is short."""
    limits = Limits(body_seconds=0.5, body_rate=rate, total_seconds=whole)
    with serving(Answerer(*loaded, "tiny", most_tokens=8), Access(), limits=limits) as address:
        with lines(address, 1) as (line,):
            began = time.monotonic()
            line.sendall(head_of(10_000))
            line.settimeout(gap)
            answer = b""
            while not answer and time.monotonic() < began + 10:
                line.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    answer = line.recv(100)
            assert answer.split()[1] == b"408"
            assert min(0.5, whole) <= time.monotonic() - began + 0.1 and time.monotonic() - began < 5


@pytest.mark.parametrize("stream", [False, True])
def test_one_request_after_another_is_never_refused(loaded, stream, monkeypatch):
    """One place: it is free for a client that has read the previous answer, also if cleaning up takes long."""
    run = to_thread.run_sync

    async def slow(function, **more):
        if getattr(function.func, "__name__", "") == "close":
            await asyncio.sleep(0.1)
        return await run(function, **more)

    monkeypatch.setattr(to_thread, "run_sync", slow)
    answerer = Answerer(*loaded, "tiny", most_tokens=2, batch=1, waiting=0)
    with serving(answerer, Access()) as address:
        connection = http.client.HTTPConnection(*address, timeout=60)
        body = json.dumps(user(words("?"), stream=stream))
        found = []
        for _ in range(10):
            connection.request("POST", POST, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            found.append(response.status)
            response.read()
        assert set(found) == {200}
        connection.close()


def test_a_slow_reader_of_a_finished_answer_takes_no_place(loaded):
    answerer = Answerer(*loaded, "tiny", most_tokens=4, batch=1, waiting=0)
    with serving(answerer, Access()) as address, lines(address, 1) as (line,):
        body = json.dumps(user(words("?"), stream=True)).encode()
        line.sendall(head_of(len(body)) + body)
        assert line.recv(12) == b"HTTP/1.1 200"
        until(lambda: answerer._taken == 0)
        assert ask(address, user(words("?"), max_tokens=1))[0] == 200


def test_tokens_are_counted_up_to_the_text_that_ends_the_answer(loaded, monkeypatch):
    """Expected: the tokens of the greedy answer whose text first contains the stop text; streamed or not."""
    monkeypatch.setattr(Answering, "_ends", lambda self: [10**6])
    tokenizer = loaded[1].tokenizer
    answerer = Answerer(*loaded, "tiny", most_tokens=24)
    asked = read_request(json.dumps(user(words("red red"))).encode(), Access(), 24)
    answering = answerer.start(asked)
    for _ in answering:
        pass
    ids = answering.sequence[answering.figures.prompt_tokens :].tolist()
    texts = [tokenizer.decode(ids[: n + 1], skip_special_tokens=True) for n in range(len(ids))]
    clean = [n for n, text in enumerate(texts) if text and not text.endswith("\ufffd")]
    place = clean[len(clean) // 2]
    stop = texts[place][-2:]
    wanted = next(n for n in clean if stop in texts[n]) + 1
    assert wanted < len(ids) and stop.strip()
    with serving(answerer, Access()) as address:
        question = user(words("red red"), max_tokens=24, stop=stop)
        for _ in range(8):
            whole = json.loads(ask(address, question)[2])
            streamed = ask(address, {**question, "stream": True, "stream_options": {"include_usage": True}})[2]
            last = json.loads(streamed.split("\n\n")[-3].removeprefix("data: "))
            assert whole["usage"]["completion_tokens"] == last["usage"]["completion_tokens"] == wanted
            assert whole["choices"][0]["finish_reason"] == "stop"
    answerer.close()


@pytest.mark.parametrize("key", ["secret", "schlüssel", "ключ-鍵", "aà"])
def test_a_key_of_any_letters(loaded, key):
    with serving(Answerer(*loaded, "tiny", most_tokens=2), Access(), key=key) as address:

        def status(sent):
            with lines(address, 1) as (line,):
                line.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: " + sent + b"\r\n\r\n")
                return line.recv(100).split()[1]

        assert status(b"Bearer " + key.encode()) == b"200"
        for wrong in (b"", b"?", key.encode()[:-1], key.encode() + b"x", key.encode("latin-1", "ignore")[:-1]):
            assert status(b"Bearer " + wrong) == b"401"
        if key == "schlüssel":
            assert status(b"Bearer " + key.encode("latin-1")) == b"200"


def test_where_the_key_comes_from(tmp_path, monkeypatch):
    path = tmp_path / "key"
    path.write_text("from file\n".replace(" ", "-"))
    monkeypatch.delenv("KEYE_API_KEY", raising=False)
    assert api_key(None, None) is None
    assert api_key("given", None) == "given" and api_key(None, str(path)) == "from-file"
    monkeypatch.setenv("KEYE_API_KEY", "set")
    assert api_key(None, None) == "set" and api_key("given", None) == "given"
    monkeypatch.setenv("KEYE_API_KEY", "")
    (tmp_path / "empty").write_text("\n")
    for given_, file, message in (
        (None, None, "KEYE_API_KEY is empty"),
        ("", None, "--api-key is empty"),
        ("a\nb", None, "control characters"),
        (" a", None, "white space"),
        (None, str(tmp_path / "empty"), "is empty"),
        (None, str(tmp_path / "none"), "cannot be read"),
        ("a", str(path), "exclude each other"),
    ):
        with pytest.raises(KeyeError, match=message):
            api_key(given_, file)


# --- ends

SERVE = "import sys, keye.cli; sys.exit(keye.cli.main(sys.argv[1:]))"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_ends_running_requests_with_a_reason(folder, sent, times):
    """A stream and an answer run, a third body has not arrived: all get the reason; no traceback, exit code 0."""
    command = [sys.executable, "-c", ENDLESS + SERVE, "serve", str(folder / "model"), "--name", "tiny", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = re.search(r"http://([\d.]+):(\d+)/", process.stdout.readline()).groups()
            with lines((address[0], int(address[1])), 3) as held:
                for line, stream in zip(held, (True, False), strict=False):
                    body = json.dumps(user(words("?"), stream=stream)).encode()
                    line.sendall(head_of(len(body)) + body)
                held[2].sendall(head_of(50) + b"{")
                assert held[0].recv(12) == b"HTTP/1.1 200"
                time.sleep(0.3)
                for _ in range(times):
                    process.send_signal(sent)
                    time.sleep(0.1)
                said = [b"".join(iter(lambda line=line: line.recv(1 << 16), b"")) for line in held]
            assert process.wait(30) == 0
        finally:
            process.kill()
        assert "Traceback" not in process.stderr.read()
    if times == 1:
        assert all(b"the server is shutting down" in text for text in said)
        assert said[1].startswith(b"HTTP/1.1 503") and said[2].startswith(b"HTTP/1.1 503")


ENDLESS = """
import keye.inference.answering, keye.inference.answerer, keye.inference.http_limits as limits, dataclasses
keye.inference.answering.Answering._ends = lambda self: [10**6]
start = keye.inference.answerer.Answerer.__init__
def patient(self, *args, **more):
    start(self, *args, **more)
    self.most_tokens = self.context = 10**6
keye.inference.answerer.Answerer.__init__ = patient
import keye.inference.http_server
keye.inference.http_server.Limits = lambda: limits.Limits(grace_seconds=1.0)
"""


EXIT = """
import os, sys
from keye.inference.answering import Answering
from keye.inference.chat import Chat, Sampling, load_model
Answering._ends = lambda self: [10**6]
for pieces_read in (1, 3, 6):
    if not (process := os.fork()):
        break
    if code := os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        sys.exit(f"after {{pieces_read}} pieces the program ends with code {{code}}")
else:
    sys.exit()
model, processor = load_model({!r}, "cpu", "float32")
chat = Chat(model, processor, sampling=Sampling(4000, temperature=1.0))
pieces = chat.ask("red")
for _ in range(pieces_read):
    next(pieces)
held = [pieces]  # the program ends while the model writes
import builtins; builtins.kept = held
"""


def test_a_program_that_ends_while_the_model_writes_ends_well(folder):
    """Each program is a fork of one that has imported all it needs and has no thread."""
    code = EXIT.format(str(folder / "model"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "terminate" not in done.stderr and "Traceback" not in done.stderr, done.stderr


# --- requests made of anything

LONE = "\ud800"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": [{"role": ["user"], "content": "x"}, {"role": "user", "content": "x"}]}, "messages"),
        ({"messages": [{"role": {}, "content": "x"}, {"role": "user", "content": "x"}]}, "messages"),
        (user(words("?"), temperature=10**400), "temperature"),
        (user(words("?"), max_tokens=10**400), "max_tokens"),
        (user(words("?"), top_k=-(10**400)), "top_k"),
        (user({"type": "video_url", "video_url": {"url": "data:,", "fps": 10**400}}), "messages"),
        (user(words(LONE)), "messages"),
        (user(words("?"), stop=["a", LONE]), "stop"),
        (user(words("?"), model=LONE), "model"),
        (user(words("?"), **{LONE: 1}), None),
        (user(words("?"), logit_bias={LONE: 1}), "logit_bias"),
        (user({"type": "image_url", "image_url": {"url": LONE}}), "messages"),
        (user(words("?"), stream=eval("[" * 90 + "]" * 90)), "stream"),
        (user(words("?"), temperature=1e-39), "temperature"),
        (user(words("?"), temperature=9e-5), "temperature"),
        (user(words("?"), temperature=-1), "temperature"),
        (user(words("?"), top_p=0), "top_p"),
        (user(words("?"), top_p=1.1), "top_p"),
        (user(words("?"), min_p=-0.1), "min_p"),
        (user(words("?"), top_k=1.5), "top_k"),
        (user(words("?"), max_tokens=-1), "max_tokens"),
        (user(words("?"), max_completion_tokens=0), "max_completion_tokens"),
        (user(words("?"), stop=["a", ""]), "stop"),
        (user(words("?"), presence_penalty=0.5), "presence_penalty"),
        (user(words("?"), repetition_penalty=math.inf), "repetition_penalty"),
    ],
)
def test_an_invalid_value_is_an_error_with_its_field(loaded, body, field):
    with serving(Answerer(*loaded, "tiny", most_tokens=8), Access()) as address:
        status, _, text = ask(address, body)
    assert status == 400 and json.loads(text)["error"]["param"] == field


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 1e-4},
        {"temperature": 100, "top_p": 1e-300},
        {"temperature": 100.0, "top_p": 1, "top_k": 0, "min_p": 0},
        {"temperature": 1, "min_p": 1, "top_k": 10**300},
        {"temperature": 1e-4, "min_p": 1, "top_p": 5e-324, "top_k": 1},
        {"temperature": -0.0, "presence_penalty": 0.0, "top_k": -1, "seed": -(2**63)},
        {"temperature": 0, "top_p": None, "seed": 2**63 - 1},
    ],
)
def test_the_ends_of_every_range_give_an_answer(loaded, asked):
    with serving(Answerer(*loaded, "tiny", most_tokens=3), Access()) as address:
        assert ask(address, user(words("red"), **asked))[0] == 200
    assert asked.get("temperature") != 1e-4 or Sampling(temperature=1e-4).options()["do_sample"]


WORD = st.sampled_from(["", "red", "user", "a.mp4", "data:video/mp4;base64,AAAA", "data:", "http://[::1", "file://x/y",
                        "file:///%00", "x" * 5000, "../..", "\0", LONE, "ü", "<|image_pad|>"])  # fmt: skip
LEAF = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), WORD,
                 st.sampled_from([10**400, -(10**400), 1e308, 5e-324, 2**63, 10**18]))  # fmt: skip
NAME = st.one_of(WORD, st.text(max_size=5), st.sampled_from([*READ, "role", "content", "type", "text", "url"]))
ANY = st.recursive(LEAF, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAME, inner, max_size=4)),
                   max_leaves=12)  # fmt: skip
PART = st.fixed_dictionaries(
    {"type": st.one_of(ANY, st.sampled_from(["text", "input_text", "image_url", "video_url", "input_image"]))},
    optional={name: ANY for name in ("text", "image_url", "video_url", "fps", "start", "end")},
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.one_of(st.sampled_from(list(ROLES)), ANY), "content": st.one_of(WORD, st.lists(PART, max_size=3), ANY)}
)
LAST = {"role": "user", "content": "x"}
BODY = st.one_of(
    ANY,
    st.fixed_dictionaries(
        {"messages": st.one_of(ANY, st.lists(MESSAGE, max_size=3).map(lambda m: [*m, LAST]))},
        optional={name: ANY for name in (*READ[2:], "n", "tools", "logit_bias", "response_format")},
    ),
)  # fmt: skip


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(BODY)
def test_any_json_is_understood_or_refused_with_a_message(folder, body):
    raw = json.dumps(body).encode()
    for access in (Access(), Access(folder, UrlRules(), 1000)):
        try:
            got = read_request(raw, access, 8)
        except RequestError as error:
            assert 400 <= error.status < 500 and json.dumps([str(error), error.param], ensure_ascii=False).encode()
        else:
            assert 1 <= got.sampling.max_new_tokens <= 8 and got.messages[-1]["role"] == "user"


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(BODY)
def test_any_json_over_the_wire_is_no_fault_of_the_server(served, body):
    status, _, text = ask(served, json.dumps(body).encode())
    assert 200 <= status < 500 and ("choices" in json.loads(text) if status == 200 else json.loads(text)["error"])


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode), st.just(b"\xff\xfe{}")))
def test_any_bytes_are_no_fault_of_the_parser(body):
    with contextlib.suppress(RequestError):
        read_request(body, Access(), 8)


@pytest.fixture(scope="module")
def served(folder, loaded):
    os.makedirs(folder / "media", exist_ok=True)
    with serving(Answerer(*loaded, "tiny", most_tokens=2), Access(folder / "media", max_bytes=1000)) as address:
        yield address
    assert not [thread for thread in threading.enumerate() if thread.name == "uvicorn"]
