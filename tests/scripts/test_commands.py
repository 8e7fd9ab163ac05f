"""Every command of the installed `keye` is also a script of the checkout, and the other way round."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from keye import cli
from keye.errors import missing_package

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


FAILURES = {
    "import deepspeed_of_ours": ("ModuleNotFoundError: No module named 'deepspeed_of_ours'", 1),
    "from keye.errors import nothing": ("ImportError: cannot import name 'nothing' from 'keye.errors'", 1),
    "import keye.nothing": ("ModuleNotFoundError: No module named 'keye.nothing'", 1),
    "import torch.nothing": ("ModuleNotFoundError: No module named 'torch.nothing'", 1),
    "raise ModuleNotFoundError('a backend is missing')": ("ModuleNotFoundError: a backend is missing", 1),
    "import deepspeed": ("error: deepspeed is not installed; run: pip install -e '.[train]'", 2),
    "import uvicorn": ("error: uvicorn is not installed; run: pip install -e '.[serve]'", 2),
}


@pytest.mark.parametrize("line", FAILURES)
def test_a_module_that_is_missing_in_a_run_is_named_with_its_extra_and_a_fault_of_the_code_is_shown(line, tmp_path):
    said, code = FAILURES[line]
    (tmp_path / "command.py").write_text(f"def main():\n    {line}\n")
    program = (
        "import sys; sys.modules.update(deepspeed=None, uvicorn=None); from checkout import run_command; "
        "run_command('command')"
    )
    places = f"{tmp_path}:{ROOT / 'scripts'}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": places}
    )
    assert done.returncode == code and done.stderr.strip().splitlines()[-1].startswith(said), done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


def test_every_dependency_has_the_extra_that_brings_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    modules = {"scikit-image": "skimage", "pillow": "PIL"}
    modules |= {"math-verify": "math_verify", "markdown-it-py": "markdown_it"}
    extras = {"": project["dependencies"]} | project["optional-dependencies"]
    for extra in ("", "model", "train", "gguf", "lora", "trl", "serve", "rewards"):
        for requirement in extras[extra]:
            name = re.match(r"[\w-]+", requirement)[0]
            if name == "keye":
                continue
            found = missing_package(ModuleNotFoundError("", name=modules.get(name, name)))
            brought = re.search(r"keye\[(\w+)\]", str(found))[1]
            assert any(text.startswith(name) for text in (*extras[brought], *extras[""])), requirement


def test_keye_names_the_extra_of_a_command_that_cannot_be_imported(monkeypatch, capsys):
    point = EntryPoint("pretrain", "command_without_package:main", cli.COMMANDS)
    monkeypatch.setattr(cli, "entry_points", lambda group: [point])
    monkeypatch.setattr(sys, "argv", ["keye"])

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name == "command_without_package":
                raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(SystemExit) as left:
        cli.main(["pretrain"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: datasets is not installed; run: pip install 'keye[train]'\n"


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
