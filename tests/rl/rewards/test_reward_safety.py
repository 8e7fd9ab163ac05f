"""A reward that raises, hangs, crashes or is not a number costs its answer and not the run."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

from keye.errors import CheckpointError, KeyeError, RecipeError
from rl.losses import group_advantages
from rl.questions.prompts import Prompt
from rl.recipe import RlRecipe, load
from rl.rewards import Earned, Judgement, counted_advantages, register, rewards_from
from rl.run.identity import claim, identity
from rl.run.metrics import MOMENTS, Moments, failure_warnings, step_metrics, step_summary
from stages.distributed import engine
from stages.typed_toml import build, to_toml
from tests.distributed import run_distributed
from tests.rl.rewards import faulty
from tests.rl.test_identity import recipe_of
from tests.rl.test_trainer import GSPO, RECIPE, make_run

PROMPT = Prompt("q7", "count", [], "3", None, (), Path("."), "world/train.jsonl:8")


def judged(text: str, family: str = "count") -> Judgement:
    return Judgement(dataclasses.replace(PROMPT, family=family), text, True)


@pytest.mark.parametrize(
    ("text", "cause"),
    [("nan", "finite number"), ("inf", "finite number"), ("none", "TypeError"), ("text", "ValueError"),
     ("raise", "LookupError: no such rule"), ("exit", "SystemExit")],
)  # fmt: skip
def test_a_fault_is_a_zero_with_its_cause_and_stops_only_if_the_recipe_says_so(text, cause):
    earned = rewards_from({"faulty_here": 2.0, "accuracy": 1.0})(judged(text))
    assert (earned.total, earned.parts, earned.counts) == (0.0, {"faulty_here": 0.0, "accuracy": 0.0}, True)
    assert cause in earned.failures["faulty_here"] and earned.failures.keys() == {"faulty_here"}
    assert not rewards_from({"faulty_here": {"on_failure": "skip"}})(judged(text)).counts
    with pytest.raises(KeyeError, match=rf"reward 'faulty_here' .*q7.*world/train\.jsonl:8.*{cause}.*on_failure"):
        rewards_from({"faulty_here": {"on_failure": "stop"}})(judged(text))


def test_a_reward_that_hangs_or_crashes_is_ended_and_the_next_answers_are_judged():
    rewards = rewards_from({"faulty": {"time_limit": 1.0, "good": 0.5}})
    rewards(judged("warm up"))
    texts = ["a", "hang", "b", "hang in C", "crash", "c", "memory", "nan", "d"]
    began = time.monotonic()
    earned = rewards.all([judged(text) for text in texts])
    assert time.monotonic() - began < 20  # without an end, the two that hang take minutes
    assert [one.total for one in earned] == [0.5, 0, 0.5, 0, 0, 0.5, 0, 0, 0.5]
    causes = [one.failures.get("faulty", "") for one in earned]
    assert causes[1] == causes[3] == "it took longer than 1 s"
    assert "crashed" in causes[4] and "MemoryError" in causes[6] and "finite number" in causes[7]
    rewards.workers._process.kill()
    assert "ended" in rewards(judged("a")).failures["faulty"]
    assert rewards(judged("a")).total == 0.5
    rewards.workers.close()


def test_a_reward_that_no_process_can_import_runs_here_and_says_so(capsys):
    @register("local")
    class Local:
        def __call__(self, judgement: Judgement) -> float:
            return 1.0

    assert rewards_from({"local": 1.0})(judged("a")).total == 1.0
    assert "reward local runs without a time limit" in capsys.readouterr().err


def test_options_are_checked_and_written_back():
    table = {"weight": 0.5, "kind": "faulty_here", "families": ["count"], "good": 0.25}
    rewards = rewards_from({"accuracy": 1.0, "mine": table})
    assert rewards(judged("fine")).total == 0.125
    assert rewards(judged("fine", "order")).parts == {"accuracy": 0.0}
    for wrong, words in (
        ({"goood": 1}, "unknown key rewards.faulty.goood; did you mean rewards.faulty.good?"),
        ({"good": "x"}, "rewards.faulty.good is 'x'"),
        ({"on_failure": "ignore"}, "on_failure must be one of zero, skip, stop"),
        ({"time_limit": 0}, "time_limit must be above 0"),
        ({"weight": float("nan")}, "weight must be a finite number"),
        ({"kind": "nothing"}, "names 'nothing'"),
    ):
        with pytest.raises(RecipeError, match=words.replace("?", r"\?")):
            rewards_from({"faulty": wrong})
    with pytest.raises(RecipeError, match="names no reward"):
        rewards_from({})


def test_a_recipe_takes_weights_and_tables(tmp_path):
    path = Path("rl/recipes/tiny.toml")
    recipe = load(path, ["rewards.judge.weight=0.5", 'rewards.judge.url="http://a"', "rewards.format=0.2"])
    assert recipe.rewards == {"accuracy": 1.0, "format": 0.2, "judge": {"weight": 0.5, "url": "http://a"}}
    (tmp_path / "again.toml").write_text(to_toml(recipe))
    assert load(tmp_path / "again.toml") == recipe
    with pytest.raises(RecipeError, match="every weight of .rewards. must be a finite number"):
        load(path, ['rewards.judge.weight="much"'])
    assert build(RlRecipe, {"gspo": {"steps": 1, "learning_rate": 1}}, "").rewards == {"accuracy": 1.0}


def test_an_answer_that_does_not_count_leaves_the_group_as_if_it_was_not_there():
    def group(*totals: float | None) -> list[Earned]:
        return [Earned(total or 0.0, {}, {}, total is not None) for total in totals]

    rewards, advantages = counted_advantages([group(1, 0, None, 1), group(None, None, 1, None)], group_advantages)
    alone = group_advantages(torch.tensor([[1.0, 0.0, 1.0]]))[0]
    assert advantages[0].tolist() == [*alone[:2].tolist(), 0.0, alone[2].item()]
    assert advantages[1].tolist() == [0.0] * 4 and rewards.isfinite().all()
    full = [group(1, 0), group(0.5, 0.5)]
    assert counted_advantages(full, group_advantages)[1].tolist() == [[1.0, -1.0], [0.0, 0.0]]


def test_failures_are_counted_and_named_in_the_metrics():
    earned = [
        [Earned(1.0, {"a": 1.0, "b": 0.0}, {"b": "it broke"}), Earned(0.0, {"a": 0.0}, {"a": "x"}, counts=False)],
        [Earned(0.5, {"a": 0.5, "b": 1.0})] * 2,
    ]
    one = {"count": 1, "total": 1.0, "least": 1.0, "most": 1.0}
    rank = {
        "families": ["count", "order"], "earned": [[dataclasses.asdict(e) for e in group] for group in earned],
        "informative": [False, False], "lengths": [1] * 4, "finished": [True] * 4, "empty": [False] * 4,
        "visual_tokens": 0, "prompt_tokens": 5,
        "updates": [{"loss": 0.0, "grad_norm": 0.0} | {name: one for name in MOMENTS}],
        "rejected": 0,
    }  # fmt: skip
    metrics = step_metrics(1, [rank], {"rollout": 1.0, "update": 1.0})
    assert metrics["reward_mean"] == 0.75 and metrics["accuracy/count"] == 1.0
    unnamed = step_metrics(1, [rank | {"families": ["", "order"]}], {"rollout": 1.0, "update": 1.0})
    assert {name for name in unnamed if name.startswith("accuracy/")} == {"accuracy/no_family", "accuracy/order"}
    assert unnamed["accuracy/no_family"] == 1.0 and unnamed["accuracy/order"] == 0.5
    assert metrics["reward/a"] == metrics["reward/b"] == pytest.approx(2 / 3)
    assert metrics["reward_failures/a"] == metrics["reward_failures/b"] == 1
    assert metrics["failures"] == failure_warnings(rank["earned"])
    none = dataclasses.asdict(Moments())
    flat = rank | {"updates": [{"loss": 0.0, "grad_norm": 0.0} | {name: none for name in MOMENTS}]}
    flat = step_metrics(1, [flat], {"rollout": 1.0, "update": 1.0})
    assert metrics.keys() - flat.keys() >= {"entropy", "clip_fraction", "ratio_mean", "ratio_min", "ratio_max"}
    assert "no advantage" in step_summary(flat | {"eta_seconds": 1.0})
    assert "entropy" in step_summary(metrics | {"eta_seconds": 1.0})
    assert metrics["failures"]["reward/b"] == "the reward b failed for 1 of 4 answers, first because: it broke"
    rank["earned"] = [[dataclasses.asdict(Earned(0.0, {"a": 0.0}, {"a": "x"}, counts=False))] * 2] * 2
    assert step_metrics(1, [rank], {"rollout": 1.0, "update": 1.0})["reward_mean"] == 0.0


def with_a_fault(run: Path) -> None:
    from rl.trainer import GspoTrainer

    assert faulty  # registered in this process
    engine.start(threads=1)
    rewards = {"format": 1.0, "faulty_here": {"weight": 0.5, "good": float("nan")}}
    GspoTrainer(dataclasses.replace(recipe_of(1), rewards=rewards), run).train()


def test_a_run_with_a_reward_that_fails_trains_and_says_so(tmp_path):
    run = make_run(tmp_path)
    run_distributed(with_a_fault, 1, 120, run)
    row = json.loads((run / "gspo/metrics.jsonl").read_text())
    assert row["reward_failures/faulty_here"] == GSPO.prompts * GSPO.group_size
    assert row["reward_failures/format"] == 0 and "not a finite number" in row["warnings"][0]
    assert json.loads((run / "gspo/eval.json").read_text())["before"]["reward_failures/faulty_here"] == 4


def test_how_a_judge_is_reached_may_change_in_a_resumed_run(tmp_path):
    def now(**changes: object):
        rewards = {"judge": {"url": "http://a", "weight": 1.0} | changes}
        return identity(run, dataclasses.replace(RECIPE, rewards=rewards), {})

    run = make_run(tmp_path)
    claim(run / "gspo", run, now())
    (run / "gspo/checkpoints/step-1").mkdir(parents=True)
    claim(run / "gspo", run, now(url="http://b", concurrency=3))
    with pytest.raises(CheckpointError, match="rewards.judge.weight = 1.0, but the recipe says 2.0"):
        claim(run / "gspo", run, now(weight=2.0))
