"""The guide to post-training: its examples run, and its numbers are those of the code."""

import json
import re
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from rl.alignment import KINDS, read_constraints
from rl.hints import Hints
from rl.preference.recipe import Mpo, Sampling, Sft
from rl.rewards import rewards_from
from stages.recipe import StageRecipe
from tests.docs.examples import run_in
from tests.docs.test_documented_commands import blocks
from tests.rl.test_trainer import make_run

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "post-training.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = make_run(tmp_path_factory.mktemp("guide"))
    make_run(path / "runs/mine")
    (path / "rl").symlink_to(ROOT / "rl")
    return path


def test_examples_run(folder):
    printed = run_in(folder, GUIDE)
    assert "wrote world/constraints.jsonl with 18 prompts" in printed and "[False, True]" in printed
    counts = [json.loads(line) for line in printed.splitlines() if line.startswith('{"questions"')]
    assert [found["questions"] for found in counts] == [9, 9] and set(counts[0]) >= {"kept", "easy", "hard"}


def test_constraints_and_recipes_are_valid():
    text = GUIDE.read_text(encoding="utf-8")
    for block in blocks(GUIDE, "json"):
        read_constraints(json.loads(block).get("constraints", []), "docs/post-training.md")
    for block in blocks(GUIDE, "toml"):
        rewards_from(tomllib.loads(block).get("rewards", {"accuracy": 1.0}))
    assert int(re.search(r"the (\d+) kinds", text)[1]) == len(KINDS)


def test_tables_give_every_key_with_its_default():
    text = GUIDE.read_text(encoding="utf-8")
    of_stages = {f.name for f in fields(StageRecipe)}
    for table, cls in (("sft", Sft), ("mpo", Mpo), ("mpo.sampling", Sampling), ("hints", Hints)):
        rows = text.partition(f"| `[{table}]` |")[2].partition("\n\n")[0]
        documented = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", rows, re.MULTILINE))
        ours = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls)}
        hidden = of_stages if cls is Sft else {"sampling"}  # described elsewhere: in docs/stages.md, by its own table
        ours = {key: value for key, value in ours.items() if key not in hidden}
        assert documented.keys() == ours.keys(), table
        for key, value in ours.items():
            value = list(value) if isinstance(value, tuple) else value
            assert documented[key] == "–" if value is MISSING else json.loads(documented[key]) == value, key
