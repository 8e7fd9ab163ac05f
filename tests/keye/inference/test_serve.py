"""The server over real HTTP requests, in the wire format of OpenAI's clients."""

import base64
import json
import socket
import threading
import time

import pytest
from PIL import Image

from keye.cli import main
from keye.errors import KeyeError
from keye.inference.answerer import Answerer
from keye.inference.answering import Answering
from keye.inference.batching import BatchEngine
from keye.inference.chat import Chat, Sampling, load_model
from keye.inference.http_server import Limits
from keye.inference.openai_format import Access, RequestError, read_request
from keye.inference.serve import for_transformers
from keye.video.fetch import UrlRules
from tests.keye.inference.served import POST, ask, head_of, serving, until, user, words
from tests.keye.inference.talk import tiny_directory
from tests.keye.video.make import numbered, write_video


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
def answerer(loaded):
    return Answerer(*loaded, "tiny", most_tokens=8, batch=4, waiting=2)


@pytest.fixture(scope="module")
def address(folder, answerer):
    """A server for the files below clips/."""
    with serving(answerer, Access(folder / "clips", max_bytes=200_000)) as address:
        yield address


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


def test_a_stream_is_the_complete_answer_in_pieces(address, folder, loaded):
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

    def submit(self, reader, inputs, sampling, ends, logprobs=None):
        ids = tokenizer("<think>red</think>blue", return_tensors="pt")["input_ids"][0]
        for token in ids.tolist():
            reader.emit(token)
        reader.done(ids, None)

    monkeypatch.setattr(BatchEngine, "submit", submit)
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
        (user(words("?"), n=2), 400, "n must be 1"),
        (user(words("?"), response_format={"type": "json_object"}), 400, "response_format must be"),
        (user(words("?"), min_tokens=3), 400, "min_tokens is not supported"),
        (user(words("?"), logit_bias={"1": 2}), 400, "logit_bias is not supported"),
        (user(words("?"), top_k=-3), 400, "top_k is -3"),
        (user(words("?"), min_p=2), 400, "min_p is 2"),
        (user(words("?"), temperature="hot"), 400, "temperature is 'hot'"),
        (user(words("?"), max_tokens=0), 400, "max_tokens is 0; give 1 or more"),
        (user(words("?"), seed=2**70), 400, "64 bits"),
        (user(words("?"), stop=[1]), 400, "stop must be a string"),
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
def test_errors_are_json_with_a_message(address, body, status, message, stream):
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
    for header, status in (("Content-Length: 999999999", 413), ("Content-Length: x", 400), ("X: y", 411)):
        with socket.create_connection(address, timeout=20) as line:
            line.sendall(f"POST {POST} HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode())
            assert line.recv(100).split()[1] == str(status).encode()


def tokens_of(address, **more):
    return json.loads(ask(address, user(words("red"), **more))[2])


def test_places_are_taken_before_a_body_is_read(folder, loaded):
    """Two places, both taken by requests whose bodies do not arrive: the third is refused before its body is read."""
    answerer = Answerer(*loaded, "tiny", most_tokens=8, batch=1, waiting=1)
    with serving(answerer, Access()) as address:
        head = head_of(99)
        held = [socket.create_connection(address, timeout=20) for _ in range(3)]
        for line in held:
            line.sendall(head)
            time.sleep(0.2)
        assert held[2].recv(100).split()[1] == b"429"
        for line in held:
            line.close()
        until(lambda: answerer._taken == 0)
        assert ask(address, user(words("?"), max_tokens=1))[0] == 200


def test_slow_requests_are_closed(loaded):
    limits = Limits(head_seconds=0.5, body_seconds=0.5, body_rate=1 << 20)
    with serving(Answerer(*loaded, "tiny", most_tokens=8), Access(), limits=limits) as address:
        for sent, answer in (
            (b"", b""),
            (b"POST /v1/chat/comp", b""),
            (head_of(50) + b"{", b"408"),
        ):
            with socket.create_connection(address, timeout=20) as line:
                line.sendall(sent)
                found = line.recv(200)
                assert found.split()[1:2] == ([answer] if answer else [])


def test_a_body_without_a_known_length_is_refused(address):
    head = head_of(10).replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n")
    with socket.create_connection(address, timeout=20) as line:
        line.sendall(head)
        assert line.recv(100).split()[1] == b"411"


def test_a_row_that_fails_ends_alone(address, monkeypatch):
    asked, found, draw = [{"seed": 666}, {}, {}], {}, BatchEngine._draw

    def failing(self, row, logits):
        if row.sampling.seed == 666:
            raise FloatingPointError("no number")
        return draw(self, row, logits)

    monkeypatch.setattr(BatchEngine, "_draw", failing)

    def one(place):
        found[place] = ask(address, user(words("red"), max_tokens=8, **asked[place]))[0]

    threads = [threading.Thread(target=one, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (found[1], found[2]) == (200, 200) and found[0] == 500


def test_a_key_is_required(loaded):
    with serving(Answerer(*loaded, "tiny", most_tokens=2), Access(), key="secret") as address:
        for header, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 401), ({"Authorization": "secret"}, 401),
                               ({"Authorization": "Bearer secret"}, 200)):  # fmt: skip
            assert ask(address, user(words("?")), header)[0] == status
            assert ask(address, None, header, "GET", "/v1/models")[0] == status
        assert ask(address, None, method="GET", path="/health")[0] == 200


def test_requests_are_answered_side_by_side_with_the_answers_they_get_alone(address, loaded):
    questions = [user(words("red " * n), max_tokens=8) for n in (1, 5, 2, 9)] + [user(video("a.mp4"), words("How?"))]
    alone = [json.loads(ask(address, question)[2])["choices"][0]["message"] for question in questions]
    forward, widths = loaded[0].forward, []

    def counted(*args, **kwargs):
        widths.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    together = {}

    def one(place):
        together[place] = json.loads(ask(address, questions[place])[2])["choices"][0]["message"]

    loaded[0].forward = counted
    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    del loaded[0].forward
    assert [together[place] for place in range(len(questions))] == alone
    assert max(widths) > 1, "several rows in one forward call"


def test_a_sampled_answer_depends_only_on_its_seed(address):
    asked = {"temperature": 1.5, "top_k": 20, "min_p": 0.01, "max_tokens": 8}
    one, two, other = (tokens_of(address, seed=seed, **asked)["choices"][0]["message"] for seed in (1, 1, 2))
    assert one == two != other
    greedy = tokens_of(address, max_tokens=8)["choices"][0]["message"]
    assert tokens_of(address, temperature=5.0, top_k=1, max_tokens=8)["choices"][0]["message"] == greedy
    assert tokens_of(address, temperature=5.0, min_p=1.0, max_tokens=8)["choices"][0]["message"] == greedy


def test_a_disconnected_client_ends_its_request(address, answerer, monkeypatch, capfd):
    monkeypatch.setattr(Answering, "_ends", lambda self: [10**6])
    monkeypatch.setattr(answerer, "most_tokens", 100_000)
    for stream in (True, False):
        body = json.dumps(user(words("?"), stream=stream, temperature=2)).encode()
        with socket.create_connection(address, timeout=20) as line:
            line.sendall(head_of(len(body)) + body)
            if stream:
                assert line.recv(12) == b"HTTP/1.1 200"
            else:
                time.sleep(0.3)
            assert answerer._taken == 1
        until(lambda: answerer._taken == 0)
    monkeypatch.undo()
    assert ask(address, user(words("?"), max_tokens=2))[0] == 200
    assert "Traceback" not in "".join(capfd.readouterr())


def test_the_client_of_openai_is_served(address):
    import openai

    client = openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none", max_retries=0)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "red"}], "max_tokens": 4}
    whole = client.chat.completions.create(**asked, response_format={"type": "text"})
    parts = client.chat.completions.create(**asked, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="response_format must be"):
        client.chat.completions.create(**asked, response_format={"type": "json_object"})
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.chat.completions.create(**asked | {"model": "gpt"})


def test_an_error_advises_what_a_request_can_change(address, folder):
    (folder / "clips" / "broken.mp4").write_bytes(b"no video")
    error = json.loads(ask(address, user(video("broken.mp4"), words("?")))[2])["error"]["message"]
    assert "not a readable video" in error and "SlowFastEncoder" not in error and "send another clip" in error


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


def test_the_fields_of_a_request_are_read():
    asked = {
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": None},
            {"role": "user", "content": [video("https://example.org/a.mp4", fps=1, start=2)]},
        ],
        **{"max_tokens": 50, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": "\n", "user": "x", "n": 1},
        **{"logit_bias": {}, "top_k": 40, "min_p": 0.1, "response_format": {"type": "text"}},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    got = read_request(json.dumps(asked).encode(), Access(urls=UrlRules()), 20)
    assert got.sampling == Sampling(20, 0.5, 0.9, 1, ("\n",), 40, 0.1) and got.thinking is False and not got.stream
    assert [message["role"] for message in got.messages] == ["system", "user", "assistant", "user"]
    source = {"type": "video", "video": "https://example.org/a.mp4", "fps": 1.0, "start": 2.0}
    assert got.messages[-1]["content"] == [source]
    with pytest.raises(RequestError, match="media-root"):
        Access(None).source("a.mp4")


def test_the_command_names_its_errors(folder, capsys):
    model = str(folder / "model")
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    wrong = {"--media-root nowhere": "not a folder", f"--port {port}": "cannot listen at", "--port 99999": "invalid"}
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


def test_fields_of_transformers_server_are_understood(folder, loaded):
    messages = [{"role": "user", "content": [{"type": "video", "url": str(folder / "clips" / "a.mp4")}, words("?")]}]
    beside = {"tools": None, "load_audio_from_video": False, "return_tensors": "pt", "return_dict": True}
    inputs = loaded[1].apply_chat_template(messages, tokenize=True, num_frames=3, **beside)
    assert len(inputs.plans[0][0]) == 3
    inputs = loaded[1].apply_chat_template(messages, tokenize=True, num_frames=3, videos_kwargs={"num_frames": 2})
    assert len(inputs.plans[0][0]) == 2
