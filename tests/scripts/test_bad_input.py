"""An invalid input gives one sentence with the remedy, exit code 2 and no traceback.

Each script runs in a process of its own in one test; its other mistakes are made in the process of the tests.
"""

import contextlib
import dataclasses
import io
import json
import os
import runpy
import subprocess
import sys
import unittest.mock
import warnings
from pathlib import Path

import pytest

from keye.checkpoint.shards import atomic_directory
from keye.errors import CheckpointError, KeyeError
from keye.evaluation import ablation
from scripts.clips import clip
from stages.report import page

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "stages/recipes/tiny.toml"


def script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def inside(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """The script run by this process, as `python scripts/name` runs it."""
    path, output, errors = ROOT / "scripts" / name, io.StringIO(), io.StringIO()
    words = [str(path), *map(str, arguments)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(unittest.mock.patch.object(sys, "argv", words))
        stack.enter_context(unittest.mock.patch.object(sys, "path", [str(path.parent), *sys.path]))
        stack.enter_context(unittest.mock.patch.object(warnings, "formatwarning"))
        stack.enter_context(unittest.mock.patch.dict(os.environ))
        stack.enter_context(contextlib.chdir(ROOT))
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(contextlib.redirect_stderr(errors))
        code: object = 0
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
    return subprocess.CompletedProcess(words, code, output.getvalue(), errors.getvalue())


def assert_one_sentence(result: subprocess.CompletedProcess, *words: str) -> None:
    message = result.stderr.strip()
    assert result.returncode == 2, result.stdout + message
    assert "Traceback" not in result.stdout + message
    assert message.startswith("error: ") and "\n" not in message
    for word in words:
        assert word in message


def test_missing_clip_is_named():
    assert_one_sentence(script("encode.py", "nowhere/clip.mp4"), "nowhere/clip.mp4")


def test_text_file_named_mp4_is_named(tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("these are notes, not a film\n" * 40)
    assert_one_sentence(inside("encode.py", path), "notes.mp4")


def test_truncated_clip_is_encoded_up_to_its_end_with_a_warning(tmp_path):
    whole = clip("bikes.mp4").read_bytes()
    path = tmp_path / "torn.mp4"
    path.write_bytes(whole[: len(whole) * 6 // 10])
    result = inside("encode.py", path, "--json", tmp_path / "plan.json")
    assert "Traceback" not in result.stderr
    if result.returncode:
        # The index of this clip is at its end, so no frame of a truncated copy can be located.
        assert_one_sentence(result, "torn.mp4")
    else:
        plan = json.loads((tmp_path / "plan.json").read_text())
        assert plan["frame_types"] and plan["warnings"]


@pytest.mark.parametrize(
    ("override", "wrong", "nearest"),
    [("annealing.stpes=3", "annealing.stpes", "annealing.steps"), ("alignmint.steps=3", "alignmint", "alignment")],
)
def test_unknown_recipe_key_names_the_nearest(tmp_path, override, wrong, nearest):
    result = inside("pretrain.py", TINY, "--run", tmp_path / "run", "--set", override)
    assert_one_sentence(result, wrong, nearest)


def test_recipe_that_is_not_there_is_named(tmp_path):
    assert_one_sentence(script("pretrain.py", tmp_path / "mine.toml", "--run", tmp_path / "run"), "mine.toml")


def test_demo_refuses_a_bad_clip_before_anything_is_trained(tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("not a film\n")
    assert_one_sentence(script("demo.py", path, "--run", tmp_path / "run"), "notes.mp4")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("threshold", ["0.9:0.1:0.1", "high", "0.1:0.9"])
def test_ablation_refuses_a_threshold_that_is_no_range(threshold):
    assert_one_sentence(inside("ablate.py", "--videos", "x.mp4", "--threshold", threshold), threshold)


def test_manifest_line_that_is_not_json_is_named_with_its_number(tmp_path):
    manifest = tmp_path / "mine.jsonl"
    manifest.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n{"messages": [\n')
    result = script("ablate.py", "--videos", "x.mp4", "--model", tmp_path, "--manifest", manifest)
    assert_one_sentence(result, "mine.jsonl:2", "not JSON")


def test_model_directory_that_is_not_there_is_named(tmp_path):
    manifest = tmp_path / "mine.jsonl"
    manifest.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    result = inside("ablate.py", "--videos", "x.mp4", "--model", tmp_path / "nowhere", "--manifest", manifest)
    assert_one_sentence(result, "nowhere")


@pytest.mark.parametrize("name", ["costs.bmp", "nowhere/below/null"])
def test_a_figure_of_costs_that_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "nowhere").write_text("a file")
    assert_one_sentence(inside("cost.py", TINY, "--gpus", 2, "--out", tmp_path / name), name, "cannot be written")


def test_an_ablation_figure_that_cannot_be_written_is_named(tmp_path):
    row = ablation.AblationRow(
        **{field.name: 0.5 for field in dataclasses.fields(ablation.AblationRow)} | {"families": {}}
    )
    with pytest.raises(KeyeError, match="the figure cannot be written to .*nowhere"):
        ablation.draw(tmp_path / "nowhere" / "ablation.png", [row], [{"clip": "a", **dataclasses.asdict(row)}])


def test_a_merged_model_and_a_report_that_cannot_be_written_are_named():
    with pytest.raises(CheckpointError, match="cannot be written to /dev/null/x "), atomic_directory("/dev/null/x"):
        pass
    with pytest.raises(KeyeError, match="the report cannot be written to /dev/null/report.html "):
        page.write("/dev/null")
