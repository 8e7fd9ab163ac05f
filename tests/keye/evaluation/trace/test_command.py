"""`keye trace` on a tiny model: its JSON against the measures it is made of, its page, and its errors."""

import json
import sys

import pytest

from keye.commands import trace as command
from keye.errors import KeyeError
from keye.evaluation.trace import Prompt, Tracer, knock_out
from keye.inference.chat import load_model
from keye.visualize.trace_page import trace_page
from tests.keye.evaluation.trace.parts import keye_parts, question, write_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("command")
    write_clip(root / "a.mp4")
    write_clip(root / "b.mp4", (220, 40, 40, 160), 1)
    model, processor = keye_parts()
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return root


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["keye trace", *map(str, arguments)])
    command.main()


def test_the_json_has_the_effects_and_the_page_shows_them(folder, monkeypatch, capsys):
    call(
        monkeypatch, folder / "model", folder / "a.mp4", "--ask", "Red or blue?", "--answer", "red",
        "--against", folder / "b.mp4", "--intended", "red", "--competing", "blue", "--map", 2, "--device", "cpu",
        "--json", folder / "t.json", "--out", folder / "t.html",
    )  # fmt: skip
    assert "answer      red" in capsys.readouterr().out
    found = json.loads((folder / "t.json").read_text())
    model, processor = load_model(folder / "model", "cpu")
    messages = question(str(folder / "a.mp4"), text="Red or blue?")
    prompt = Prompt.of_sample(model, processor, processor.sample(messages, add_generation_prompt=True))
    ids = processor.tokenizer("red", add_special_tokens=False)["input_ids"]
    expected = {effect.group.name: effect.nats for effect in knock_out(Tracer(model), prompt, ids)}
    assert {group["name"]: group["nats"] for group in found["groups"]} == pytest.approx(expected, abs=1e-4)
    own = Tracer(model).answer(prompt, [processor.tokenizer.eos_token_id])
    assert (found["commitment"] == {"by_cut": None, "by_lens": None}) == (own[0] != ids[0])
    assert len(found["windows"]) == found["depth"] and found["map"]["layer"] == 1
    page = (folder / "t.html").read_text()
    frames = [group for group in found["groups"] if group["kind"] == "frame"]
    assert page.count("<figure") == page.count("data:image/jpeg") == len(frames)
    for heading in ("Frames", "Parts of the prompt", "Blocks", "Lens", "Counterfactual", "Coherence", "Semantic map"):
        assert f"<h2>{heading}</h2>" in page
    hostile = found | {"question": "<script>x</script>", "answer": "<b>"}
    assert "<script" not in trace_page(hostile) and "<b>" not in trace_page(hostile)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--intended", "red"], "belong together"),
        (["--window", "0"], "--window 0 is too small"),
        (["--chat"], "for causal LMs"),
        (["--against", "b.mp4", "--against", "b.mp4"], "2 times for 1 clips"),
        (["--map", "9"], "block 9, does not exist"),
    ],
)
def test_errors_name_the_option(folder, monkeypatch, arguments, message):
    with pytest.raises(KeyeError, match=message):
        call(monkeypatch, folder / "model", folder / "a.mp4", "--ask", "Red?", "--device", "cpu", *arguments)
