"""Every command of the README, the guides, the help texts and the recipes is accepted by the parser of its program.

The `main` of the command builds the parser, and the test stops it after parsing. Recipes and keys of a command are
loaded; launchers are parsed by the parsers of torchrun and DeepSpeed. The other files of this folder run the examples
that can run in a test.
"""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keye import cli
from keye.encoder_config import EncoderConfig
from keye.errors import KeyeError
from stages import recipe_checks
from stages.recipe import Recipe
from stages.typed_toml import build

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "scripts/bench/README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS = {name: value.partition(":")[0] for name, value in PROJECT["entry-points"][cli.COMMANDS].items()}
OURS = re.compile(r"^(?:#|\w+=\S+)?\s*((?:keye|python scripts/\S+|python -m scripts\.\S+|torchrun|deepspeed) .*)")


class Parsed(BaseException):
    """Raised in place of what the command does once its arguments are parsed."""


def blocks(document: Path, language: str) -> list[str]:
    """The texts of the document's blocks of a language, including those marked `elsewhere`."""
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^ *```{language}\b[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def lines(text: str) -> list[str]:
    """The commands of a shell block; a command with an open quote continues on the next line."""
    found: list[str] = []
    for line in text.splitlines():
        if found and found[-1].count("'") % 2:
            found[-1] += "\n" + line
        elif line.strip() and not line.strip().startswith("#"):
            found.append(line.strip())
    return found


def in_documents() -> Iterator[tuple[str, str]]:
    for document in DOCUMENTS:
        for block in blocks(document, "bash"):
            yield from ((document.name, line) for line in lines(block))


def in_help_and_recipes() -> Iterator[tuple[str, str]]:
    """Lines of docstrings, examples and recipes' comments that call this project."""
    files = [*ROOT.glob("*/commands/*.py"), ROOT / "keye/cli.py", *ROOT.glob("*/recipes/*.toml")]
    for file in [*files, *(ROOT / "scripts/bench").rglob("*.py")]:
        for line in file.read_text(encoding="utf-8").splitlines():
            if (found := OURS.match(line.strip())) and not re.search(r"[\"'`]{1,3}$|\\$", line.strip()):
                # The command's description follows after two spaces or more.
                yield str(file.relative_to(ROOT)), re.split(r"\s{2,}(?=\S)", found[1])[0]


def in_results() -> Iterator[tuple[str, str]]:
    for document in sorted((ROOT / "docs/results").glob("*.md")):
        for line in re.findall(r"`(python -m scripts\.bench[^`\n]*)`", document.read_text(encoding="utf-8")):
            yield document.name, line


def check(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse one command line.

    Raises:
        AssertionError: an unknown command, option, recipe, key or extra.
    """
    words = shlex.split(line, comments=True)
    while "=" in words[0] and not words[0].startswith("-"):  # environment variables
        words.pop(0)
    program, *words = words
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(words)
        if launch.module:
            check_parsed(launch.training_script, launch.training_script_args, monkeypatch)
        else:
            check_script([launch.training_script, *launch.training_script_args], monkeypatch)
    elif program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        launch = parse_args(words)
        check_script([launch.user_script, *launch.user_args], monkeypatch)
    elif program == "keye":
        module = COMMANDS.get(words[0], "keye.cli")
        check_parsed(module, words[1:] if words[0] in COMMANDS else words, monkeypatch)
    elif program == "python" and words[0].startswith("scripts/"):
        check_script(words, monkeypatch)
    elif program == "python" and words[0] == "-m" and words[1].startswith("scripts."):
        package = words[1] + (".__main__" if (ROOT / words[1].replace(".", "/")).is_dir() else "")
        check_parsed(package, words[2:], monkeypatch)
    elif program == "bash" and words[0] == "gpu/run.sh":  # of the archive of scripts.bench.gpu.pack
        check_parsed("scripts.bench.gpu.__main__", ["--part", *words[2].split(), *words[3:]], monkeypatch)
    elif program == "bash":
        assert (ROOT / words[0]).is_file(), line
        if words[0] == "scripts/demo":
            check_parsed("scripts.demo", words[1:], monkeypatch)
    elif program == "pip":
        extras = [extra for word in words for extra in re.findall(r"^\.?\[(.+)\]$", word)]
        assert set(extras) <= PROJECT["optional-dependencies"].keys(), line
    elif program == "lmms-eval":
        check_lmms_eval(words)
    else:
        assert program in ("curl", "python", "tar", "uv"), f"{line}: a kind of command that this test does not know"


def check_lmms_eval(words: list[str]) -> None:
    """The options of lmms-eval that name this project: its model and the model's arguments."""
    options = dict(zip(words[::1], words[1:], strict=False))
    given = {argument.partition("=")[0] for argument in options["--model_args"].split(",")}
    known = {"pretrained", "dtype", "device", "system_prompt", "thinking", *EncoderConfig.names()}
    assert options["--model"] in PROJECT["entry-points"]["lmms_eval.models"] and given <= known


def check_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(words[0])
    assert (ROOT / path).is_file(), f"{path} does not exist"
    if path == Path("scripts/encode.py"):
        check_parsed("keye.cli", ["encode", *words[1:]], monkeypatch)
        return
    module = COMMANDS.get(path.stem) if path.parent == Path("scripts") else None
    check_parsed(module or ".".join(path.with_suffix("").parts), words[1:], monkeypatch)


def check_parsed(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the module's `main` with these words up to the end of parsing, then load the recipe that they name."""
    parse, given = argparse.ArgumentParser.parse_args, {}

    def stop(parser: argparse.ArgumentParser, *arguments: object) -> None:
        given.update(vars(parse(parser, *arguments)))
        raise Parsed

    main = importlib.import_module(module).main
    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", stop)
        patched.setattr(sys, "argv", [module, *words])
        with pytest.raises(Parsed):
            main()
    recipes = [str(given[key]) for key in ("recipe", "what") if str(given.get(key, "")).endswith(".toml")]
    for recipe in recipes:
        load = importlib.import_module("rl.recipe" if recipe.startswith("rl/") else "stages.recipe").load
        load(ROOT / recipe, given.get("set") or [])


def check_all(found: Iterator[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, at_least: int) -> None:
    failures, count = [], 0
    for place, line in found:
        count += 1
        try:
            check(line, monkeypatch)
        except (AssertionError, KeyeError, SystemExit, ImportError, pytest.fail.Exception) as error:
            if isinstance(error, SystemExit) and error.code == 0:
                continue  # --help
            failures.append(f"{place}: {line}: {type(error).__name__} {error}")
    assert not failures, "\n".join(failures)
    assert count >= at_least


def test_commands_of_the_documents_are_accepted(monkeypatch):
    check_all(in_documents(), monkeypatch, 50)


def test_commands_of_help_texts_and_recipes_are_accepted(monkeypatch):
    check_all(in_help_and_recipes(), monkeypatch, 40)


def test_commands_of_the_results_are_accepted(monkeypatch):
    check_all(in_results(), monkeypatch, 20)


@pytest.mark.parametrize(
    "line",
    [
        "keye encode clip.mp4 --no-such-option",
        "keye no-such-command",
        "python scripts/nothing.py",
        "torchrun --nproc_per_node 2 scripts/pretrain.py stages/recipes/nothing.toml",
        "deepspeed --num_gpus 8 scripts/pretrain.py stages/recipes/keye_8b.toml --set annealing.stpes=3",
        "python -m scripts.bench.encoder.nothing",
        "pip install '.[nothing]'",
        "lmms-eval --model keye --model_args pretrained=model,max_token=9 --tasks videomme",
        "make all",
    ],
)
def test_a_wrong_command_is_found(line, monkeypatch):
    with pytest.raises(AssertionError):
        check_all(iter([("README.md", line)]), monkeypatch, 1)


def test_every_recipe_in_the_guide_to_the_stages_is_one():
    """Each TOML block replaces keys of the recipe `keye_8b.toml`; the result is typed and checked."""
    whole = tomllib.loads((ROOT / "stages/recipes/keye_8b.toml").read_text(encoding="utf-8"))
    found = blocks(ROOT / "docs/stages.md", "toml")
    for block in found:
        recipe = build(Recipe, merged(whole, tomllib.loads(block)), "docs/stages.md")
        recipe_checks.check(recipe, "docs/stages.md")
    assert len(found) >= 6


def merged(table: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    nested = {
        key: merged(table[key], value) for key, value in changes.items() if isinstance(value, dict) and key in table
    }
    return {**table, **changes, **nested}


def test_every_shell_block_is_shell():
    for document in DOCUMENTS:
        for block in blocks(document, "bash"):
            done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
            assert done.returncode == 0, f"{document.name}: {block}{done.stderr}"
