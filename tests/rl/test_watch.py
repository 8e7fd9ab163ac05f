"""A run that cannot learn says so: constant rewards, empty answers, answers that are cut off."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from rl.rewards import Earned, Judgement, register
from rl.run.metrics import MOMENTS, step_metrics
from rl.run.watch import warnings_of
from tests.distributed import run_distributed
from tests.rl.test_identity import recipe_of, train
from tests.rl.test_trainer import make_run


@register("same")
class Same:
    """The same for every answer."""

    in_process = True

    def __call__(self, judgement: Judgement) -> float:
        return 0.25


def metrics(rewards: list[float], texts: list[str], finished: list[bool]) -> dict:
    """Of one rank with one group."""
    one = {"count": 1, "total": 1.0, "least": 1.0, "most": 1.0}
    update = {"loss": 0.0, "grad_norm": 0.0} | {name: one for name in MOMENTS} | {"clipped": one | {"total": 0.0}}
    rank = {
        "families": ["count"],
        "informative": [len(set(rewards)) > 1],
        "earned": [[asdict(Earned(reward, {"same": reward})) for reward in rewards]],
        "lengths": [1] * len(texts),
        "finished": finished,
        "empty": [not text.strip() for text in texts],
        "visual_tokens": 0,
        "prompt_tokens": 5,
        "updates": [update],
        "rejected": 0,
    }
    return step_metrics(1, [rank], {"rollout": 1.0, "update": 1.0})


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_a_step_that_is_not_finite_is_named(key):
    found = metrics([0.0, 1.0], ["a", "b"], [True, True])
    assert "nonfinite" not in warnings_of(found, 7)
    for value in (float("nan"), float("inf")):
        assert "optimizer steps are skipped" in warnings_of(found | {key: value}, 7)["nonfinite"]


@pytest.mark.parametrize(
    ("rewards", "texts", "finished", "kinds"),
    [
        ([0.0, 1.0], ["a", "b"], [True, False], {}),
        ([0.5, 0.5], ["a", "b"], [True, True], {"constant": "earned the same (mean reward 0.500)"}),
        ([0.0, 0.0], ["", " "], [True, True], {"empty": "every answer is empty", "constant": "gspo.group_size"}),
        ([0.0, 0.0], ["a", "b"], [False, False], {"unfinished": "gspo.max_new_tokens = 7", "constant": "zero"}),
        ([0.0, 1.0], ["", "b"], [True, True], {}),
    ],
)
def test_each_kind_of_a_step_that_teaches_nothing_is_named(rewards, texts, finished, kinds):
    said = warnings_of(metrics(rewards, texts, finished), 7)
    assert said.keys() == kinds.keys()
    assert all(words in said[kind] for kind, words in kinds.items())


def with_the_same_reward(run: Path) -> None:
    train(run, recipe_of(2, "same"))


def test_a_run_whose_rewards_are_constant_says_so_and_counts_the_steps(tmp_path):
    run = make_run(tmp_path)
    run_distributed(with_the_same_reward, 2, 120, run)
    rows = [json.loads(line) for line in (run / "gspo/metrics.jsonl").read_text().splitlines()]
    assert [any("every advantage is zero" in text for text in row["warnings"]) for row in rows] == [True, True]
    result = json.loads((run / "gspo/eval.json").read_text())
    assert (result["steps"], result["steps_without_advantage"]) == (2, 2)
