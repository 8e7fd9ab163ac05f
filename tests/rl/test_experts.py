"""Experts on different families: their merged weights by hand, and the comparison of all models."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keye.errors import CheckpointError, RecipeError
from rl.experts import Expert, parse_experts, table, train_experts
from rl.rewards import Judgement, register
from stages.distributed import engine
from tests.distributed import run_distributed
from tests.rl.test_trainer import GSPO, RECIPE, make_run


@register("letters")
class Letters:
    """Different letters of an answer, so that almost any group has an advantage."""

    in_process = True

    def __call__(self, judgement: Judgement) -> float:
        return len(set(judgement.text)) + len(judgement.text) / 100


def trained(run: Path) -> list:
    engine.start(threads=1)
    gspo = dataclasses.replace(GSPO, steps=1, learning_rate=1e-2)
    recipe = dataclasses.replace(RECIPE, gspo=gspo, rewards={"letters": 1.0})
    experts, names = parse_experts(["even=even", "odd=odd"]), []
    results = train_experts(recipe, run, experts, (0.5,), lambda name, _: names.append(name))
    times = {path: path.stat().st_mtime_ns for path in (run / "experts").rglob("*.safetensors")}
    assert train_experts(recipe, run, experts, (0.5,)) == results
    assert times == {path: path.stat().st_mtime_ns for path in (run / "experts").rglob("*.safetensors")}
    changed = dataclasses.replace(recipe, gspo=dataclasses.replace(gspo, learning_rate=1e-3))
    with pytest.raises(CheckpointError, match="gspo.learning_rate = 0.01, but the recipe says 0.001"):
        train_experts(changed, run, experts, (0.5,))
    # An expert that is trained further is merged and measured again.
    longer = dataclasses.replace(recipe, gspo=dataclasses.replace(gspo, steps=2))
    later = train_experts(longer, run, experts, (0.5,))
    assert [name for name in later if later[name] == results[name]] == ["start"]
    return [later, names]


def test_experts_are_merged_and_compared(tmp_path):
    run = make_run(tmp_path / "run")
    for split in ("train", "heldout"):
        path = run / f"world/{split}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(json.dumps(line | {"family": ("even", "odd")[i % 2]}) + "\n" for i, line in enumerate(lines))
        )
    [(results, names)] = run_distributed(trained, 1, 280, run)
    assert names == ["experts/even/gspo", "experts/odd/gspo"]
    assert list(results) == ["start", "even", "odd", "average", "sum-0.5"]
    assert all(set(row["families"]) == {"even", "odd"} and row["n"] == 5 for row in results.values())
    folders = (
        "annealing/model",
        "experts/even/gspo/model",
        "experts/odd/gspo/model",
        "experts/average",
        "experts/sum-0.5",
    )
    start, even, odd, average, added = (load_file(run / name / "model.safetensors") for name in folders)
    assert any(not torch.equal(even[name], odd[name]) for name in even)
    for name, value in start.items():
        torch.testing.assert_close(average[name], (even[name] + odd[name]) / 2)
        torch.testing.assert_close(added[name], value + 0.5 * (even[name] - value) + 0.5 * (odd[name] - value))
    gain = results["average"]["reward_mean"] - results["start"]["reward_mean"]
    assert results["average"]["gain"] == pytest.approx(gain)
    assert len(table(results).splitlines()) == 6 and json.loads((run / "experts/experts.json").read_text()) == results


@pytest.mark.parametrize("texts", [["a=x"], ["a=x", "a=y"], ["a", "b=y"], ["a=", "b=y"], ["../a=x", "b=y"]])
def test_wrong_experts_are_refused(texts):
    with pytest.raises(RecipeError, match="--expert"):
        parse_experts(texts)
    assert parse_experts(["a=x, y", "b-2=z"]) == [Expert("a", ("x", "y")), Expert("b-2", ("z",))]
