"""The guide to post-training: its examples run, and its numbers are those of the code."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from rl.alignment import KINDS, read_constraints
from rl.rewards import rewards_from
from tests.docs.examples import run_in
from tests.docs.test_documented_commands import blocks
from tests.rl.test_trainer import make_run

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "post-training.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = make_run(tmp_path_factory.mktemp("guide"))
    (path / "rl").symlink_to(ROOT / "rl")
    return path


def test_examples_run(folder):
    printed = run_in(folder, GUIDE)
    assert "wrote world/constraints.jsonl with 18 prompts" in printed and "[False, True]" in printed


def test_constraints_and_recipes_are_valid():
    text = GUIDE.read_text(encoding="utf-8")
    for block in blocks(GUIDE, "json"):
        read_constraints(json.loads(block).get("constraints", []), "docs/post-training.md")
    for block in blocks(GUIDE, "toml"):
        rewards_from(tomllib.loads(block).get("rewards", {"accuracy": 1.0}))
    assert int(re.search(r"the (\d+) kinds", text)[1]) == len(KINDS)
