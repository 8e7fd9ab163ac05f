"""The guide to GSPO: its examples run on a model of a few thousand weights, and its tables name every key."""

import json
import re
import tomllib
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest

from rl.blindness import Blindness
from rl.questions.prompts import load_prompts
from rl.recipe import Gspo, HeldOut, load
from rl.rewards import RewardOptions, rewards_from
from rl.rewards.base import REGISTRY
from rl.rollout.config import Rollout
from tests.docs.examples import elsewhere, run_in, sections
from tests.rl.test_trainer import make_run

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "rl.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run as pre-training leaves it, with questions of a family that `tiny.toml` asks."""
    path = tmp_path_factory.mktemp("guide")
    run = make_run(path / "runs/mine")
    for name in ("train", "heldout"):
        manifest = run / f"world/{name}.jsonl"
        lines = [json.loads(line) | {"family": "read"} for line in manifest.read_text().splitlines()]
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "rl").symlink_to(ROOT / "rl")
    return path


def test_examples_run(folder):
    printed = run_in(folder, GUIDE)
    assert "on 5 questions" in printed and "of 2 steps had no gradient" in printed
    assert "1.1 {'accuracy': 1.0, 'brief': 1.0}" in printed
    assert re.search(r"\['.*'\] \[(True|False), ", run_in(folder, GUIDE.with_name("rollouts.md")))
    rows = [json.loads(line) for line in (folder / "runs/mine/gspo/metrics.jsonl").read_text().splitlines()]
    table = GUIDE.read_text(encoding="utf-8").partition("| in `metrics.jsonl`")[2].partition("\n\n")[0]
    named = {name.partition("<")[0] for name in re.findall(r"`([\w/<>]+)`", table)}
    written = {re.sub(r"^(reward|reward_failures|accuracy)/.*", r"\1/", key) for row in rows for key in row}
    assert written - {"step", "warnings"} == named - {"warnings", "max_new_tokens"}
    made = {path.name for path in (folder / "runs/mine/gspo").iterdir()}
    assert {"recipe.toml", "run.json", "before.jsonl", "after.jsonl", "eval.json", "model", "checkpoints"} <= made


def test_the_recipe_and_the_line_for_own_questions_are_valid(tmp_path):
    text = GUIDE.read_text(encoding="utf-8").partition("\n## Running\n")[2].partition("\n## ")[0]
    (tmp_path / "own.toml").write_text(re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1])
    recipe = load(tmp_path / "own.toml")
    assert recipe.gspo.start == "start" and recipe.heldout.manifest == "data/heldout.jsonl"
    (tmp_path / "train.jsonl").write_text(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    (prompt,) = load_prompts(tmp_path / "train.jsonl").prompts
    assert prompt.answer == "A" and prompt.options == ("bikes", "horses")
    table = text.partition("| TRL's `GRPOConfig`")[2].partition("\n\n")[0]
    keys = {key for key in re.findall(r"`gspo\.(\w+)", table)}
    assert keys <= {field.name for field in fields(Gspo)}


def test_tables_give_every_key_with_its_default():
    text = GUIDE.read_text(encoding="utf-8")
    for table, cls in (("gspo", Gspo), ("heldout", HeldOut), ("blindness", Blindness), ("rollout", Rollout)):
        rows = text.partition(f"| `[{table}]` |")[2].partition("\n\n")[0]
        documented = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", rows, re.MULTILINE))
        ours = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls)}
        assert documented.keys() == ours.keys()
        for key, value in ours.items():
            value = list(value) if isinstance(value, tuple) else value
            if value is None:
                assert documented[key] == "of the loss"
                continue
            assert documented[key] == "–" if value is MISSING else json.loads(documented[key]) == value, key


def test_what_is_not_run_is_written_right():
    assert len(sections(GUIDE)) == 6
    for language, code in elsewhere(GUIDE):
        assert language == "python"
        compile(code, str(GUIDE), "exec")
    text = GUIDE.read_text(encoding="utf-8")
    headings = set(re.findall(r"^## (.+)$", text, re.MULTILINE))
    assert set(re.findall(r"^\d+\. \[(.+?)\]", text, re.MULTILINE)) == headings


def test_the_guide_names_every_reward_and_option_and_its_recipe_is_valid(tmp_path):
    text = GUIDE.read_text(encoding="utf-8").partition("\n## Rewards\n")[2].partition("\n## ")[0]
    built_in = {name: cls for name, cls in REGISTRY.items() if cls.__module__.startswith("rl.")}
    rows = {row[0]: "".join(row) for row in re.findall(r"^\| `(\w+)` \|(.*)$", text, re.MULTILINE)}
    assert built_in.keys() <= rows.keys()
    assert {field.name for field in fields(RewardOptions)} <= rows.keys()
    for name, cls in built_in.items():
        for field in fields(cls) if is_dataclass(cls) else ():
            assert f"`{field.name}`" in (text if name == "judge" else rows[name]), (name, field.name)
    recipe = tomllib.loads(re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1])
    assert rewards_from(recipe["rewards"], tmp_path).terms.keys() == {"accuracy", "format", "number", "judge"}
