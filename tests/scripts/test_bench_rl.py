"""The benches of post-training compare equal work and count it correctly."""

import json

import pytest
import torch

from keye.errors import KeyeError
from rl.questions.prompts import Prompt
from rl.rewards import Judgement, rewards_from
from scripts.bench.rl import group_price, judges, trl
from scripts.bench.rl.cost import BASE, Case, estimated


@pytest.fixture(scope="module")
def case() -> group_price.Setting:
    return group_price.setting(prompt=30, answer=5, group=3, layers=2)


def test_every_way_of_the_update_has_the_same_gradients(case):
    shared = group_price.gradients(case.model, lambda: group_price.update_once(case))
    for way in (group_price.update_separately, group_price.update_packed):
        assert group_price.deviation(shared, group_price.gradients(case.model, lambda way=way: way(case))) < 1e-5
    theirs = group_price.gradients(case.plain, lambda: group_price.update_transformers(case))
    assert group_price.deviation(shared, theirs) < 1e-5


def test_the_update_reads_the_prompt_once(case):
    assert group_price.read(case) == 30 + 3 * 5


def test_rollouts_have_as_many_tokens_on_both_sides(case):
    group_price.rollout_ours(case)  # each asserts the length of its answers
    for cache in (None, "static"):
        group_price.rollout_transformers(case, cache)


def test_a_paused_measurement_continues_with_what_it_has(tmp_path):
    calls: list[str] = []
    ways = {name: lambda name=name: calls.append(name) for name in ("ours", "slow", "fast")}
    file = tmp_path / "found.json"
    with pytest.raises(KeyeError, match="paused before update, round 0: ours"):
        group_price.alternate("update", ways, 2, group_price.Progress(file, ends=0.0))
    saved = {
        f"update, round 0: {name}": {"wall": t, "cpu": t} for name, t in (("ours", 1.0), ("slow", 9.0), ("fast", 5.0))
    }
    made = group_price.alternate("update", ways, 2, group_price.Progress(file, float("inf"), dict(saved)))
    assert calls == ["fast", "ours"]  # the second round: in the other order, without the slower way
    assert [len(times) for times in made.values()] == [2, 1, 2]
    assert set(json.loads(file.read_text())) > set(saved)


def test_the_speed_is_that_of_the_fastest_other_way():
    times = {"ours": [2.0, 2.0], "slow": [30.0], "fast": [12.0, 10.0]}
    given = {name: [{"wall": 2 * t, "cpu": t} for t in ts] for name, ts in times.items()}
    claim, table = group_price.speed("update", given, 5.0, dict.fromkeys(times, 1))
    assert claim.ratio.startswith("5.5 ×") and claim.met and "(fast)" in claim.figure
    assert [row[-1] for row in table.rows] == ["1.00", "15.00", "6.00"]


def test_the_sums_of_the_comparison_with_trl_have_one_right_answer():
    rows = trl.questions()
    assert len({row["id"] for row in rows}) == len(rows) == 400
    assert all(sum(map(int, row["id"].split("+"))) == int(row["answer"]) for row in rows)


def test_an_estimate_follows_its_case():
    base, more = estimated(BASE), estimated(Case("more", answer=2 * BASE.answer))
    assert more["update"] > base["update"] and more["rollout"] > base["rollout"]
    fixed = estimated(Case("fixed", freeze=("visual",)))
    assert fixed["update"] < base["update"]
    assert torch.stack([s.input_ids for s in BASE.samples()]).shape == (BASE.prompts, BASE.prompt)


def test_the_judge_of_the_bench_scores_by_the_distance_and_misbehaves_as_asked(tmp_path):
    said = iter(["verdict", "lie", "429", "slow", "verdict"])
    server = judges.Judge(lambda number: next(said))
    try:
        table = {"url": server.url, "model": "judge", "timeout": 5.0, "patience": 20.0, "wait": 0.01}
        rewards = rewards_from({"judge": table}, tmp_path)
        prompt = Prompt("1+2", "", [{"role": "user", "content": "1+2="}], "3", None, (), tmp_path)
        found = [rewards(Judgement(prompt, text, finished=True)).total for text in ("3", "5", "x")]
    finally:
        server.close()
    assert found == [1.0, 0.8, 0.0] and server.counts["requests"] == 5
