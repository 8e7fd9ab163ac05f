"""The command of the guide to tracing runs on a model and gives the values that the guide names."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from keye.commands import trace
from tests.docs.examples import ROOT, check_contents, elsewhere
from tests.keye.evaluation.trace.parts import keye_parts, write_clip

GUIDE = ROOT / "docs" / "five-systems" / "trace.md"


def test_the_command_gives_the_named_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = keye_parts()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    write_clip(tmp_path / "clip.mp4")
    write_clip(tmp_path / "other.mp4", levels=(200, 200, 30, 30, 90, 90), seed=1)
    words = shlex.split(next(line for language, line in elsewhere(GUIDE) if language == "bash"))
    assert words[:2] == ["keye", "trace"]
    words[2] = "model"
    more = ["--against", "other.mp4", "--intended", "red", "--competing", "blue", "--map", "1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["keye trace", *words[2:], *more, "--device", "cpu", "--dtype", "float32"])
    trace.main()
    found = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    named = {name for row in GUIDE.read_text().splitlines() if row.startswith("| `") for name in
             re.findall(r"`(\w+)`", row.split("|")[1])}  # fmt: skip
    assert named == set(found)
    frames = [group for group in found["groups"] if group["kind"] == "frame"]
    assert len(frames) == found["clips"][0]["frames"]
    assert found["lens"]["answer_log_prob"][-1] >= found["answer_log_prob"] - 1e-4  # the first of the answer's tokens
    page = (tmp_path / "trace.html").read_text(encoding="utf-8")
    assert page.count("data:image") >= len(frames)


def test_contents_are_true() -> None:
    check_contents(GUIDE)
