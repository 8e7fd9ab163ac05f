import io
import itertools
import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

import keye.inference.terminal
from keye.cli import main
from keye.errors import CheckpointError, KeyeError, VideoError
from keye.inference.answering import Answering, Piece, Sampling, StopTexts, ThoughtSplit, detokenize
from keye.inference.chat import Chat, load_model
from keye.inference.terminal import Screen, printable
from tests.keye.inference.talk import tiny_directory
from tests.keye.video.make import numbered, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("talk")
    tiny_directory(path / "model")
    write_video(path / "a.mp4", numbered(40))
    write_video(path / "b.mp4", numbered(75))
    Image.new("RGB", (90, 60), "red").save(path / "c.png")
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder / "model", "cpu", "float32")


def chat(loaded, tokens=6, **settings):
    return Chat(*loaded, sampling=Sampling(tokens), **settings)


def said(pieces):
    return "".join(piece.text for piece in pieces)


def test_a_conversation_with_its_cache_answers_like_a_new_one(folder, loaded):
    talk = chat(loaded, system="red or blue?", thinking=False)
    steps = [("video", "a.mp4", "How many?"), (None, "", "Which comes first?"), ("video", "b.mp4", "red or blue?")]
    steps += [("image", "c.png", "Which colour?"), (None, "", "How many?")]
    before = 0
    for kind, name, question in steps:
        if kind == "video":
            talk.add_video(folder / name)
        elif kind == "image":
            talk.add_image(folder / name)
        fresh = chat(loaded, system="red or blue?", thinking=False)
        fresh.messages, fresh._media = list(talk.messages), list(talk._media)
        answer = said(talk.ask(question))
        assert said(fresh.ask(question)) == answer and answer
        assert fresh.figures.cached_tokens == 0 and fresh.figures.new_tokens == talk.figures.new_tokens
        assert fresh.figures.prompt_tokens == talk.figures.prompt_tokens
        assert talk.figures.cached_tokens >= before
        before = talk.figures.prompt_tokens
    assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 5]
    assert [p.source for p in talk.plans] == [str(folder / "a.mp4"), str(folder / "b.mp4")]


def test_the_reply_is_what_generate_gives(folder, loaded):
    model, processor = loaded
    talk = chat(loaded, tokens=12)
    talk.add_video(folder / "a.mp4")
    answer = said(talk.ask("How many?"))
    content = [{"type": "video", "video": str(folder / "a.mp4")}, {"type": "text", "text": "How many?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True
    )
    rows = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    new = rows[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert talk.figures.new_tokens == len(new)


def test_another_clip_of_the_same_size_is_not_taken_for_the_first(folder, loaded):
    talk = chat(loaded)
    talk.add_video(folder / "a.mp4")
    first = said(talk.ask("How many?"))
    talk.reset()
    black = torch.zeros(4, 3, 56, 56, dtype=torch.uint8)
    talk.add_video(black)
    assert talk.messages == [] and len(talk.plans) == 1
    said(talk.ask("How many?"))
    assert talk.figures.cached_tokens == 0 and first


def test_closing_stops_the_model_and_keeps_the_text(loaded):
    talk = chat(loaded, tokens=400)
    pieces = talk.ask("How many?")
    heard = "".join(piece.text for piece in itertools.islice(pieces, 3))
    pieces.close()
    assert talk.figures.finish == "interrupted" and talk.figures.new_tokens < 200
    assert talk.messages[-1]["content"].startswith(heard.strip()[:5])
    talk.sampling = Sampling(4)
    assert said(talk.ask("red?")) and talk.figures.finish in ("length", "stop")


def test_stopped_within_the_prompt_leaves_no_trace(loaded, monkeypatch):
    talk = chat(loaded)
    answering = []
    remember = Answering.__post_init__

    def stopped(self):
        remember(self)
        self._stop.set()  # before the first layer
        answering.append(self)

    monkeypatch.setattr(Answering, "__post_init__", stopped)
    assert said(talk.ask("How many?")) == "" and talk.messages == []
    assert answering[0].sequence is None and answering[0].figures.new_tokens == 0
    monkeypatch.undo()
    assert not [hooks for m in talk.model.modules() if (hooks := m._forward_pre_hooks)]
    assert said(talk.ask("How many?"))


def test_a_clip_too_long_for_the_context_is_thinned(folder, loaded):
    roomy, narrow = chat(loaded), chat(loaded, context=310)
    plans = [talk.add_video(folder / "b.mp4") for talk in (roomy, narrow)]
    assert plans[1].tokens < plans[0].tokens and "reduced from" in " ".join(plans[1].warnings)
    assert said(narrow.ask("How many?"))
    assert narrow.figures.prompt_tokens + narrow.figures.new_tokens <= 310
    with pytest.raises(KeyeError, match="the chat needs at least"):
        for _ in range(30):
            narrow.add_video(folder / "b.mp4")


def test_progress_reaches_one(folder, loaded):
    shares = []
    chat(loaded).add_video(folder / "b.mp4", shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_thought_is_split_off_for_any_chunks_of_text():
    text = "<think>\n a < b </think>\n\n<answer> 3 <thin </answer>"
    for size in range(1, len(text)):
        split = ThoughtSplit()
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        pieces = [piece for part in parts for piece in split.feed(part)] + list(split.close())
        assert said(p for p in pieces if p.thinking) == "a < b"
        assert said(p for p in pieces if not p.thinking) == "3 <thin"
    split = ThoughtSplit()
    assert [*split.feed("two  words"), *split.close()] == [Piece("two  words", False)]


def test_stop_texts_are_found_at_any_place():
    for size in range(1, 12):
        text = "one two STOP three"
        cut = StopTexts(("STOP", "zero"))
        assert "".join(cut(text[i : i + size] for i in range(0, len(text), size))) == "one two "
        assert cut.found
    assert "".join(StopTexts(("END",))(["no E", "N", "d"])) == "no ENd"


def test_detokenized_pieces_are_the_complete_text(loaded):
    tokenizer = loaded[1].tokenizer
    text = "red 🟥 or blaü?\n\nzwei\nRed"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(detokenize(tokenizer, ids))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces) and len(pieces) > 8
    assert "".join(detokenize(tokenizer, ids[:5])).startswith("red")


def test_a_stop_text_and_a_seed(loaded):
    talk = Chat(*loaded, sampling=Sampling(30, temperature=1.5, seed=3))
    whole = said(talk.ask("How many?"))
    again = Chat(*loaded, sampling=Sampling(30, temperature=1.5, seed=3))
    assert said(again.ask("How many?")) == whole
    stop = whole[len(whole) // 2 :][:3]
    cut = Chat(*loaded, sampling=Sampling(30, temperature=1.5, seed=3, stop=(stop,)))
    assert said(cut.ask("How many?")) == whole[: whole.index(stop)].rstrip() and cut.figures.finish == "stop"


def test_thoughts_are_not_carried_along(loaded):
    talk = chat(loaded, thinking=True)
    assert said(talk.ask("How many?"))
    assert talk.messages[0]["thinking"] is True
    prompt = loaded[1].apply_chat_template(talk.messages)
    assert "How many?/think" in prompt
    assert keye.inference.chat._reply_for_history("<think>why</think><answer>3</answer>") == "<answer>3</answer>"
    assert keye.inference.chat._reply_for_history("<think>cut off") == ""


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda f: load_model(f / "nothing"), "not a model directory"),
        (lambda f: load_model(f), "config.json"),
        (lambda f: load_model(f / "model", device="tpu9"), "'tpu9' cannot be used"),
        (lambda f: load_model(f / "model", dtype="int3"), "dtype 'int3'"),
        (lambda f: Sampling(0), "max_new_tokens is 0"),
        (lambda f: Sampling(temperature=-1), "temperature is -1"),
        (lambda f: Sampling(top_p=0), "top_p is 0"),
        (lambda f: Sampling(None), "max_new_tokens is None; give a whole number"),
        (lambda f: Sampling(top_k=1.5), "top_k is 1.5; give a whole number"),
        (lambda f: Sampling(seed=1.5), "seed is 1.5; give a whole number"),
        (lambda f: Sampling(temperature=None), "temperature is None"),
        (lambda f: Sampling(stop="end"), "stop is 'end'; give a tuple of texts"),
    ],
)
def test_errors_have_clear_messages(folder, make, message):
    with pytest.raises(KeyeError, match=message):
        make(folder)


def test_a_damaged_or_unrelated_directory_is_named(folder, tmp_path):
    foreign, released = {"model_type": "qwen3"}, {"model_type": "KeyeVL1_5", "hidden_size": 8}
    for name, config, message in (("foreign", foreign, "'qwen3'"), ("released", released, "with keye convert")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / name)
    tiny_directory(tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="torn cannot be loaded"):
        load_model(tmp_path / "torn")


def screen(loaded, tokens=5):
    out = io.StringIO()
    return Screen(chat(loaded, tokens), out), out


def test_commands_of_the_conversation(folder, loaded, capsys):
    shown, out = screen(loaded)
    assert shown.execute(f"/video '{folder / 'a.mp4'}'") and "slow and" in out.getvalue()
    assert shown.execute(f"/image {folder / 'c.png'}") and shown.execute("")
    assert shown.execute("/think") and shown.chat.thinking is True
    assert shown.execute("/auto") and shown.chat.thinking is None
    assert shown.execute("/no_think") and shown.chat.thinking is False
    assert shown.execute("How many?") and len(shown.chat.messages) == 2
    assert [part["type"] for part in shown.chat.messages[0]["content"]] == ["video", "image", "text"]
    assert re.search(r"\d+ tokens read in .* written", capsys.readouterr().err)
    shown.execute("/plan")
    assert shown.chat.plans[0].frame_table().split()[6] in capsys.readouterr().out
    assert shown.execute("/help") and "/reset" in out.getvalue()
    assert shown.execute("/reset") and shown.chat.messages == []
    assert not shown.execute("/quit")
    wrong = {"/bogus": "is not a command", "/video": "needs a path", "/plan": "no clip", "/video x": "exist"}
    for line, error in wrong.items():
        with pytest.raises(KeyeError, match=error):
            shown.execute(line)


def test_an_interrupted_answer_leaves_the_conversation_going(loaded, monkeypatch, capsys):
    shown, out = screen(loaded, tokens=300)
    lines = iter(["How many?", "/bogus", "red?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    seen = []

    def impatient(text):
        seen.append(text)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return text

    monkeypatch.setattr(keye.inference.terminal, "printable", impatient)
    shown.chat.sampling = Sampling(40)
    assert shown.converse() == 0
    assert len(shown.chat.messages) == 4
    assert "/bogus is not a command" in capsys.readouterr().err


def test_a_thought_is_dim_and_nothing_moves_the_cursor(loaded, monkeypatch):
    shown, out = screen(loaded)
    shown.styled = True
    pieces = [Piece("why\x1b[2J", True), Piece("3", False)]
    monkeypatch.setattr(shown.chat, "ask", lambda question: (piece for piece in pieces))
    shown.ask("How many?")
    assert out.getvalue().startswith("\x1b[0m\x1b[2mwhy[2J\x1b[0m\n\n\x1b[0m3\x1b[0m\n")
    assert printable("a\x1b[31m\r\u202eb\tc\n") == "a[31mb\tc\n"


def test_remaining_time_is_shown_only_for_long_tasks(monkeypatch, capsys):
    now = itertools.count(100.0, 4.0)
    monkeypatch.setattr(keye.inference.terminal.time, "monotonic", lambda: next(now))
    with keye.inference.terminal.busy("reading") as progress:
        progress(0.1)
        progress(0.5)
        progress(0.9)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(r"reading: \d+%, \d+ s left", line) for line in lines)
    with keye.inference.terminal.busy("reading") as progress:
        pass
    assert capsys.readouterr().err == ""


def test_the_command_answers_and_gives_json(folder, capsys):
    command = ["chat", str(folder / "model"), str(folder / "a.mp4"), str(folder / "c.png"), "--ask", "How many?"]
    assert main([*command, "--ask", "red?", "--json", "--max-new-tokens", "4", "--no-think"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["question"] == "How many?"
    assert second["figures"]["cached_tokens"] >= first["figures"]["prompt_tokens"]
    assert first["videos"][0]["tokens"] > 0 and first["figures"]["new_tokens"] <= 4
    assert main([*command, "--max-new-tokens", "4", "--no-think"]) == 0
    assert capsys.readouterr().out.strip() == first["answer"].strip()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "not a model directory"),
        (["MODEL", "missing.mp4"], "missing.mp4 does not exist"),
        (["MODEL", "https://example.org/a.mp4"], "--url"),
        (["MODEL", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["MODEL", "--ask", " "], "question is empty"),
    ],
)
def test_errors_of_the_command_are_one_line(folder, capsys, arguments, message):
    arguments = [str(folder / "model") if word == "MODEL" else word for word in arguments]
    assert main(["chat", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_without_transformers_it_is_one_line(folder):
    code = "import sys; sys.modules['transformers'] = None; from keye.cli import main; sys.exit(main(['chat', 'm']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "pip install 'keye[model]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_failing_model_gives_a_clear_message(folder, loaded, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("device-side assert\nlong story")

    talk = chat(loaded)
    monkeypatch.setattr(talk.model, "encode_vision", fail)
    talk.add_video(folder / "a.mp4")
    with pytest.raises(KeyeError, match="RuntimeError: device-side assert;|assert\\)"):
        said(talk.ask("How many?"))
    assert talk.messages == []
    with pytest.raises(VideoError):
        talk.add_image(folder / "nothing.png")
