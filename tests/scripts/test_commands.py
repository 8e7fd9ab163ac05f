"""Every command of the installed `keye` is also a script of the checkout, and the other way round."""

import importlib
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from keye import cli

ROOT = Path(__file__).resolve().parents[2]
POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][cli.COMMANDS]


@pytest.mark.parametrize("name", POINTS)
def test_a_command_has_its_script_and_calls_the_same_function(name):
    module, _, function = POINTS[name].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert function == "main"
    assert f'run_command("{module}")' in (ROOT / "scripts" / f"{name}.py").read_text()


def test_a_script_runs_from_the_checkout_without_installation(tmp_path):
    """With -S Python sees no installed package: keye comes from the checkout, and its dependencies are missing."""
    command = [sys.executable, "-S", str(ROOT / "scripts" / "encode.py"), "--help"]
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr == "error: torch is not installed; run: pip install -e '.[train]'\n"


def test_keye_runs_a_further_command(monkeypatch, capsys):
    points = [EntryPoint(name, value, cli.COMMANDS) for name, value in POINTS.items()]
    monkeypatch.setattr(cli, "entry_points", lambda group: points)
    monkeypatch.setattr(sys, "argv", ["keye"])
    with pytest.raises(SystemExit) as left:
        cli.main(["pretrain", str(ROOT / "stages/recipes/tiny.toml"), "--print"])
    assert left.value.code == 0 and 'name = "tiny"' in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        cli.main(["ablate", "--threshold", "high", "--videos", "x.mp4"])
    assert left.value.code == 2 and "--threshold high is not" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert "further commands, each with --help:\n  ablate " in shown
    assert set(cli.SUMMARIES) == set(POINTS) and all(text in shown for text in cli.SUMMARIES.values())


def test_the_encoder_alone_imports_no_command():
    code = "import sys, keye.cli; print(sorted(m for m in sys.modules if m.split('.')[0] in ('stages', 'rl')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_a_script_shows_the_usage_of_its_command():
    done = subprocess.run([sys.executable, ROOT / "scripts/ablate.py", "--help"], capture_output=True, text=True)
    assert done.stdout.startswith("usage: keye ablate ")
