"""The command that adds hints, with a real HTTP server as the language model."""

import json

import pytest

from keye.errors import ManifestError
from keye.world.manifest import read_manifest
from rl.commands import posttrain
from rl.questions.writing_hints import parse_hints
from tests.rl.endpoint.fake_server import completion, served, text_of
from tests.rl.test_hints import drawn_lines

GOOD = ["Look at the sky.", "Compare the days.", "Days have hours.", "Begin with Monday.", "It rained on Tuesday: red."]


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (json.dumps(GOOD), True),
        (f"<think>[no]</think>Here they are:\n```json\n{json.dumps(GOOD)}\n```", True),
        (json.dumps(GOOD[:4]), False),
        (json.dumps(["It is red.", *GOOD[1:]]), False),
        (json.dumps(["The reddest.", *GOOD[1:]]), True),
        (json.dumps([*GOOD[:4], " "]), False),
        (json.dumps([*GOOD[:4], 3]), False),
        ("no list", False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_only_five_hints_that_do_not_give_the_answer_away_are_used(text, valid):
    found = parse_hints(text, "red")
    assert (found is not None) == valid and (found is None or found[1:] == GOOD[1:])


def chats(path):
    world = next(line for line in drawn_lines(1) if line["family"] == "count")
    other = [{"id": n, "answer": "red", "messages": [{"role": "user", "content": f"Which colour {n}?"}]} for n in "abc"]
    kept = other[0] | {"id": "k", "hints": ["mine"]}
    path.write_text("".join(json.dumps(line) + "\n" for line in [world, *other, kept]))
    return path


def test_hints_are_written_once_and_continued(tmp_path, monkeypatch, capsys):
    def answer(request, handler):
        asked = text_of(request)
        assert "Correct answer: red" in asked
        return completion(json.dumps(["red", *GOOD[1:]] if "colour b" in asked else GOOD))

    source, out = chats(tmp_path / "q.jsonl"), tmp_path / "hinted.jsonl"
    with served(answer) as server:
        for name, value in (("URL", server.url), ("MODEL", "m"), ("KEY", "k")):
            monkeypatch.setenv(f"KEYE_HINTS_{name}", value)
        for _ in range(2):
            monkeypatch.setattr("sys.argv", ["posttrain", "hints", str(source), "--out", str(out), "--write"])
            posttrain.main()
            first = out.read_bytes()
        assert len(server.requests) == 2 + 3  # a and c once, b three times, and nothing in the second call
    assert out.read_bytes() == first
    world, a, b, c, kept = read_manifest(out)
    assert len(world["hints"]) == 5 and world["trusted"] is True
    assert a["hints"] == c["hints"] == GOOD and "hints" not in b and "trusted" not in a and kept["hints"] == ["mine"]
    assert "5 lines, 1 kept, 1 world, 2 written, 1 without" in capsys.readouterr().out.replace("\n", " ")


def test_without_a_model_other_lines_are_copied(tmp_path, monkeypatch):
    source, out = chats(tmp_path / "q.jsonl"), tmp_path / "sub/hinted.jsonl"
    monkeypatch.setattr("sys.argv", ["posttrain", "hints", str(source), "--out", str(out)])
    posttrain.main()
    assert ["hints" in line for line in read_manifest(out)] == [True, False, False, False, True]
    monkeypatch.setattr("sys.argv", ["posttrain", "hints", str(source), "--out", str(source)])
    with pytest.raises(ManifestError, match="is the manifest itself"):
        posttrain.main()
