"""The server by real HTTP requests, in the wire format of OpenAI's clients, written by hand."""

import base64
import http.client
import json
import socket
import threading
import time

import pytest
from PIL import Image

from keye.answering import Answering
from keye.chat import Chat, Sampling, load_model
from keye.cli import main
from keye.errors import KeyeError
from keye.openai_format import Access, RequestError, read_request
from keye.serve import Answerer, Line, for_transformers, make_server
from keye.slowfast.fetch import UrlRules
from tests.keye.slowfast.make import numbered, write_video
from tests.keye.talk import tiny_directory

POST = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve")
    tiny_directory(path / "model")
    (path / "clips" / "more").mkdir(parents=True)
    write_video(path / "clips" / "a.mp4", numbered(40))
    write_video(path / "secret.mp4", numbered(30))
    Image.new("RGB", (90, 60), "red").save(path / "clips" / "c.png")
    (path / "clips" / "link.mp4").symlink_to(path / "secret.mp4")
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder / "model", "cpu", "float32")


@pytest.fixture(scope="module")
def address(folder, loaded):
    """A server for the files below clips/."""
    answerer = Answerer(*loaded, "tiny", most_tokens=8, longest_line=2)
    with make_server(answerer, Access(folder / "clips", max_bytes=200_000)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address
        server.shutdown()


def ask(address, body, headers=None, method="POST", path=POST):
    """(status, headers, text) of one request."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    body = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, dict(response.getheaders()), text


def user(*parts, **more):
    return {"model": "tiny", "messages": [{"role": "user", "content": list(parts)}], **more}


def words(text):
    return {"type": "text", "text": text}


def video(url, **more):
    return {"type": "video_url", "video_url": {"url": url}, **more}


def data(path, kind):
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def expected(loaded, folder, question="How many?", tokens=8):
    talk = Chat(*loaded, sampling=Sampling(tokens))
    talk.add_video(folder / "clips" / "a.mp4")
    talk.add_image(folder / "clips" / "c.png")
    return "".join(piece.text for piece in talk.ask(question)), talk.figures


def test_models_and_health(address):
    status, _, text = ask(address, None, method="GET", path="/v1/models")
    assert status == 200 and [model["id"] for model in json.loads(text)["data"]] == ["tiny"]
    assert json.loads(ask(address, None, method="GET", path="/v1/models/tiny")[2])["object"] == "model"
    assert ask(address, None, method="GET", path="/health")[0] == 200
    assert ask(address, None, method="GET", path="/etc/passwd")[0] == 404


def test_a_clip_and_an_image_as_data_and_as_files(address, folder, loaded):
    answer, figures = expected(loaded, folder)
    clips = folder / "clips"
    for clip, image in (
        (data(clips / "a.mp4", "video/mp4"), data(clips / "c.png", "image/png")),
        ("a.mp4", "more/../c.png"),
        (f"file://{clips / 'a.mp4'}", str(clips / "c.png")),
    ):
        picture = {"type": "image_url", "image_url": {"url": image, "detail": "high"}}
        status, _, text = ask(address, user(video(clip), picture, words("How many?"), max_tokens=8))
        reply = json.loads(text)
        assert status == 200, text
        assert reply["object"] == "chat.completion" and reply["choices"][0]["message"]["content"] == answer
        assert reply["usage"]["prompt_tokens"] == figures.prompt_tokens
        assert reply["usage"]["total_tokens"] == figures.prompt_tokens + figures.new_tokens
        assert reply["choices"][0]["finish_reason"] == figures.finish


def events(text):
    parts = text.split("\n\n")
    assert parts.pop() == "" and parts.pop() == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_a_stream_is_the_whole_answer_in_pieces(address, folder, loaded):
    question = user(video("a.mp4"), words("How many?"), max_completion_tokens=8)
    whole = json.loads(ask(address, question)[2])
    status, headers, text = ask(address, {**question, "stream": True, "stream_options": {"include_usage": True}})
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    chunks = events(text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert len(deltas) > 3
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all("usage" not in chunk for chunk in events(ask(address, {**question, "stream": True})[2]))


def test_thoughts_have_a_field_of_their_own(address, loaded, monkeypatch):
    tokenizer = loaded[1].tokenizer

    def generate(streamer, input_ids, **_):
        ids = tokenizer("<think>red</think>blue", return_tensors="pt")["input_ids"]
        streamer.put(input_ids)
        for token in ids[0]:
            streamer.put(token)
        return ids

    monkeypatch.setattr(loaded[0], "generate", generate)
    message = json.loads(ask(address, user(words("?"), reasoning_effort="high"))[2])["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("red", "blue")
    deltas = [c["choices"][0]["delta"] for c in events(ask(address, user(words("?"), stream=True))[2])]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "red"
    assert "".join(delta.get("content", "") for delta in deltas) == "blue"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body, status, message",
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[]", 400, "not a JSON object"),
        (user(words("?"), model="gpt"), 404, "no model 'gpt'"),
        ({"messages": []}, 400, "messages is missing"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "must be the user's"),
        ({"messages": ["x", {"role": "user", "content": "x"}]}, 400, "needs a role"),
        (user(words("?"), tools=[{}]), 400, "tools is not supported"),
        (user(words("?"), n=2), 400, "n can only be 1"),
        (user(words("?"), temperature="hot"), 400, "temperature is 'hot'"),
        (user(words("?"), max_tokens=0), 400, "max_new_tokens is 0"),
        (user(words("?"), seed=2**70), 400, "64 bits"),
        (user(words("?"), stop=[1]), 400, "stop is neither"),
        (user({"type": "input_audio"}), 400, "must be text or one of"),
        (user(video("")), 400, "needs a URL"),
        (user(video("a.mp4", fps="x"), words("?")), 400, "fps is 'x'"),
        (user(video("nothing.mp4"), words("?")), 404, "nothing.mp4 does not exist"),
        (user(video("../secret.mp4"), words("?")), 403, "--media-root"),
        (user(video("link.mp4"), words("?")), 403, "--media-root"),
        (user(video("file:///etc/passwd"), words("?")), 403, "--media-root"),
        (user(video("ftp://x/a.mp4"), words("?")), 403, "--media-root"),
        (user(video("http://127.0.0.1/a.mp4"), words("?")), 403, "--url"),
        (user(video("data:video/mp4;base64,AAAA"), words("?")), 400, "not a readable video"),
        (user(video("data:video/mp4;base64," + "A" * 300_000), words("?")), 413, "larger than 200,000"),
    ],
)
def test_mistakes_are_json_with_a_sentence(address, body, status, message, stream):
    if isinstance(body, dict):
        body = {**body, "stream": stream}
    found, headers, text = ask(address, body)
    error = json.loads(text)["error"]
    assert (found, headers["Content-Type"]) == (status, "application/json") and message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_other_pages_and_endless_bodies_are_refused(address):
    body = user(words("?"))
    assert ask(address, body, {"Content-Type": "text/plain"})[0] == 415
    assert ask(address, body, {"Host": "evil.example"})[0] == 403
    assert ask(address, None, {"Host": "evil.example:80"}, "GET", "/v1/models")[0] == 403
    assert ask(address, body, {"Host": "localhost:1"})[0] == 200
    for header, status in (("Content-Length: 999999999", 413), ("Content-Length: x", 411), ("X: y", 411)):
        with socket.create_connection(address, timeout=20) as line:
            line.sendall(f"POST {POST} HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode())
            assert line.recv(100).split()[1] == str(status).encode()


def test_requests_wait_in_line_and_too_many_are_sent_away(address, monkeypatch):
    inside, go, order = threading.Event(), threading.Event(), []
    run = Answering.__iter__

    def slowly(self):
        order.append(self.inputs["input_ids"].shape[1])
        inside.set()
        assert go.wait(30)
        return run(self)

    monkeypatch.setattr(Answering, "__iter__", slowly)
    results = {}

    def one(name):
        results[name] = ask(address, user(words("red " * name), max_tokens=1))[0]

    threads = [threading.Thread(target=one, args=(name,)) for name in (1, 2, 3)]
    for thread in threads:
        thread.start()
        assert inside.wait(30)
        time.sleep(0.2)  # the next one stands behind it
    assert ask(address, user(words("one more")))[0] == 429
    assert len(order) == 1
    go.set()
    for thread in threads:
        thread.join(30)
    assert results == {1: 200, 2: 200, 3: 200} and order == sorted(order)


def test_who_leaves_takes_the_request_along(address, loaded, monkeypatch):
    stopped = threading.Event()
    run = Answering.__iter__

    def endless(self):
        self.sampling = Sampling(100_000, temperature=2.0)
        try:
            yield from run(self)
        finally:
            stopped.set()

    monkeypatch.setattr(Answering, "__iter__", endless)
    monkeypatch.setattr(Answering, "_ends", lambda self: [10**6])
    for stream in (True, False):
        stopped.clear()
        body = json.dumps(user(words("?"), stream=stream)).encode()
        head = f"POST {POST} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json"
        with socket.create_connection(address, timeout=20) as line:
            line.sendall(head.encode() + b"\r\n\r\n" + body)
            if stream:
                assert line.recv(12) == b"HTTP/1.1 200"
            else:
                time.sleep(0.2)
        assert stopped.wait(30)
    monkeypatch.undo()
    assert ask(address, user(words("?"), max_tokens=2))[0] == 200


def test_a_line_is_first_come_first_served():
    line, order = Line(5), []
    with line.turn(lambda: True):
        threads = []
        for name in range(4):
            def wait(name=name):
                with line.turn(lambda: True):
                    order.append(name)

            threads.append(threading.Thread(target=wait))
            threads[-1].start()
            while len(line._waiting) < name + 2:
                time.sleep(0.001)
        with pytest.raises(ConnectionError), line.turn(lambda: False):
            pass
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3] and not line._waiting


def test_a_question_longer_than_the_context_is_refused(loaded):
    answerer = Answerer(*loaded, "tiny", most_tokens=8)
    answerer.context = 24
    access = Access()
    asked = read_request(json.dumps(user(words("red " * 40))).encode(), access, 8)
    with pytest.raises(KeyeError, match="raise max_length"):
        answerer.start(asked)
    asked = read_request(json.dumps(user(words("red"))).encode(), access, 8)
    answering = answerer.start(asked)
    assert answering.figures.prompt_tokens + answering.sampling.max_new_tokens <= 24


def test_what_a_request_says_is_understood():
    asked = {
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": None},
            {"role": "user", "content": [video("https://example.org/a.mp4", fps=1, start=2)]},
        ],
        **{"max_tokens": 50, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": "\n", "user": "x", "n": 1},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    got = read_request(json.dumps(asked).encode(), Access(urls=UrlRules()), 20)
    assert got.sampling == Sampling(20, 0.5, 0.9, 1, ("\n",)) and got.thinking is False and not got.stream
    assert [message["role"] for message in got.messages] == ["system", "user", "assistant", "user"]
    source = {"type": "video", "video": "https://example.org/a.mp4", "fps": 1.0, "start": 2.0}
    assert got.messages[-1]["content"] == [source]
    with pytest.raises(RequestError, match="media-root"):
        Access(None).source("a.mp4")


def test_the_command_names_its_mistakes(folder, capsys):
    model = str(folder / "model")
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    wrong = {"--media-root nowhere": "is no folder", f"--port {port}": "cannot be listened at", "--port 99999": "none;"}
    for words_, message in wrong.items():
        assert main(["serve", model, *words_.split()]) == 2
        assert message in capsys.readouterr().err
    taken.close()


def test_transformers_finds_the_class_by_the_names_its_server_uses(folder):
    from transformers import AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto

    for_transformers()
    model = AutoModelForMultimodalLM.from_pretrained(folder / "model")
    assert type(model).__name__ == "KeyeForConditionalGeneration"
    hears, sees = (
        getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES") for kind in ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT")
    )
    assert model.config.model_type in hears and type(model).__name__ not in hears.values()
    assert type(model).__name__ in sees.values()


def test_what_the_server_of_transformers_says_beside_the_chat_is_understood(folder, loaded):
    messages = [{"role": "user", "content": [{"type": "video", "url": str(folder / "clips" / "a.mp4")}, words("?")]}]
    beside = {"tools": None, "load_audio_from_video": False, "return_tensors": "pt", "return_dict": True}
    inputs = loaded[1].apply_chat_template(messages, tokenize=True, num_frames=3, **beside)
    assert len(inputs.plans[0][0]) == 3
    inputs = loaded[1].apply_chat_template(messages, tokenize=True, num_frames=3, videos_kwargs={"num_frames": 2})
    assert len(inputs.plans[0][0]) == 2
