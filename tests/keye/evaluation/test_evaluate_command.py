"""`keye evaluate` on a manifest: settings of the encoder, several controls, and mistakes found before a model loads."""

import json
import sys

import pytest

import keye.cli
from keye.world import generate
from tests.keye.inference.talk import tiny_directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    return generate(out, "heldout", {"count": 3}, duration=3, size=(56, 56), workers=1, progress=False)


def run(monkeypatch, *arguments):
    """The exit code of `keye evaluate …`."""
    monkeypatch.setattr(sys, "argv", ["keye", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        keye.cli.main()
    return ended.value.code


def test_settings_of_the_encoder_apply_to_a_manifest_and_are_recorded(directory, world, tmp_path, monkeypatch, capsys):
    for name, options in {"small": ["--max-tokens", 8], "large": ["--max-tokens", 60, "--policy", "all_slow"]}.items():
        options += ["--min-tokens-per-frame", 1, "--max-tokens-per-frame", 4, "--max-new-tokens", 2]
        assert run(monkeypatch, directory, world, "--out", tmp_path / f"{name}.json", *options) == 0
    reports = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("small", "large")}
    assert reports["small"]["settings"]["encoder"]["max_tokens"] == 8
    assert reports["large"]["settings"]["encoder"]["policy"] == "all_slow"


def test_a_control_may_be_repeated(directory, world, tmp_path, monkeypatch, capsys):
    command = [directory, world, "--max-new-tokens", 2, "--out", tmp_path / "a.json"]
    assert run(monkeypatch, *command, "--control", "blind", "--control", "zeroed") == 0
    head = capsys.readouterr().out.splitlines()[-2].split()
    assert head == ["family", "chance", "majority", "none", "blind", "zeroed"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a_blind.json", "a_zeroed.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "{0} is a folder; give a manifest in it, such as {0}/heldout.jsonl"),
        (["--families", "find"], "{0}/heldout.jsonl has no family 'find'; it has count"),
        (["--limit", "1", "--control", "all"], "'other' needs two clips of the family count; raise --limit"),
        (["--limit", "0"], "limit 0 is too small; give at least 1"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(world, options, message, tmp_path, monkeypatch, capsys):
    manifest = world if options else world.parent
    # The model does not exist: its error would come first if it were loaded first.
    assert run(monkeypatch, tmp_path / "gone", manifest, *options) == 2
    assert message.format(world.parent) in capsys.readouterr().err


def test_a_table_of_another_format_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "q.csv").write_text("video,question,answer\na.mp4,what,yes\n")
    assert run(monkeypatch, tmp_path / "gone", tmp_path / "q.csv") == 2
    assert "a manifest is JSON Lines (.jsonl)" in capsys.readouterr().err


def test_the_help_names_every_measure_and_policy(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert "MEASURES" not in shown and "POLICIES" not in shown and "two_stream" in shown and "patch_cosine" in shown
