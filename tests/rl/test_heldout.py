"""The gain over RL, by hand."""

from pathlib import Path

import pytest
import torch

from rl.policy.scoring import Group
from rl.questions.heldout import Answered, Best, ask, compare, standard_error, write_answers
from rl.questions.prompts import Prompt
from rl.rewards import Outcome, RewardOptions, RewardSum, Term, rewards_from


def row(name: str, family: str, sampled: float, greedy: float) -> Answered:
    return Answered(name, family, sampled, greedy, sampled, greedy, "")


def test_gain_is_paired_by_question():
    before = [row("a", "count", 0.0, 0.0), row("b", "count", 0.5, 1.0), row("c", "order", 0.25, 0.0)]
    after = [row("c", "order", 0.5, 1.0), row("a", "count", 0.25, 0.0), row("b", "count", 0.75, 1.0)]
    result = compare(before, after)
    # every question gained exactly 0.25, so the paired error is 0 although the questions differ
    assert (result["gain"], result["gain_stderr"]) == (0.25, 0.0)
    assert result["greedy_gain"] == pytest.approx(1 / 3)
    assert result["greedy_gain_stderr"] == pytest.approx(1 / 3)  # 0, 0, 1: variance 1/3, over 3 questions
    assert result["before"]["reward_mean"] == 0.25 and result["after"]["reward_mean"] == 0.5
    assert result["after"]["families"]["count"]["n"] == 2 and result["after"]["families"]["count"]["reward_mean"] == 0.5


def test_standard_error():
    assert standard_error([0.0, 1.0, 1.0, 0.0]) == pytest.approx((1 / 3 / 4) ** 0.5)
    assert standard_error([1.0]) == 0.0


class Recited:
    """An engine that answers with texts of a list, and counts how often it is asked."""

    def __init__(self, sampled: list[list[str]], greedy: list[list[str]]) -> None:
        self.texts = {0.0: greedy, 1.0: sampled}

    def generate(self, samples, group_size, temperature, max_new_tokens, keys=None):
        tokens = [torch.tensor([1])] * group_size
        return [Group(sample, tokens, [], [True] * group_size, texts) for sample, texts in
                zip(samples, self.texts[temperature], strict=True)]  # fmt: skip


def test_every_answer_is_judged_for_its_own_question_and_all_in_one_call():
    questions = [Prompt(str(n), "count", [], str(n), None, (), Path(), f"a.jsonl:{n}") for n in range(3)]
    engine = Recited([["0", "1"], ["1", "1"], ["skip", "2"]], [["0"], ["2"], ["2"]])
    calls = []

    class Judge:
        def score(self, judgements):
            calls.append(len(judgements))
            return [Outcome(None, "down") if one.text == "skip" else Outcome(1.0) for one in judgements]

    accuracy = rewards_from({"accuracy": 1.0}).terms["accuracy"]
    terms = {"accuracy": accuracy, "judge": Term(Judge(), RewardOptions(weight=0.5, on_failure="skip"))}
    answered, rejected = ask(engine, questions, lambda prompt: prompt, RewardSum(terms), 2, 1.0, 4)
    assert calls == [9] and not rejected
    assert [one.sampled for one in answered] == [1.0, 1.5, 1.5]  # of the last question one answer counts
    assert [one.greedy for one in answered] == [1.5, 0.5, 1.5]
    assert [one.failures for one in answered] == [{}, {}, {"judge": "down"}]


def questions_of(names: str) -> list[Prompt]:
    return [Prompt(name, "count", [], name, None, (), Path(), name) for name in names]


def test_the_best_model_is_found_on_the_questions_that_were_judged_for_both(tmp_path):
    """b is hard: without its judgement the mean of the later model is higher, although it is worse on a and c."""
    best, questions = Best(2, 0.5), questions_of("abc")
    write_answers(
        tmp_path / "heldout/step-2.jsonl", [row("a", "", 0.75, 0), row("b", "", 0.0, 0), row("c", "", 0.75, 0)]
    )
    worse, better = [row("a", "", 0.625, 0), row("c", "", 0.75, 0)], [row("a", "", 0.875, 0), row("b", "", 0.0, 0)]
    assert sum(one.sampled for one in worse) / 2 > best.reward > sum(one.sampled for one in better) / 2
    assert not best.beaten_by(worse, tmp_path, questions) and best.beaten_by(better, tmp_path, questions)
    assert not best.beaten_by([row("d", "", 1.0, 0)], tmp_path, questions_of("abcd"))
    assert Best().beaten_by(worse, tmp_path, questions)
    (tmp_path / "heldout/step-2.jsonl").unlink()  # of a run of an earlier version
    assert best.beaten_by(worse, tmp_path, questions)


def test_the_former_best_model_stays_until_the_new_one_is_complete(tmp_path):
    for step in (1, 2):
        new = tmp_path / "model-best.new"
        new.mkdir()
        (new / "config.json").write_text(str(step))
        if step == 2:
            assert (tmp_path / "model-best/config.json").read_text() == "1"
        Best(step, 0.5).write(tmp_path, [row("a", "", 0.5, 0)])
        assert (tmp_path / "model-best/config.json").read_text() == str(step)
    assert Best.read(tmp_path, 2) == Best(2, 0.5) and Best.read(tmp_path, 1) is None
    assert {path.name for path in tmp_path.iterdir()} == {"model-best", "model-best.json", "heldout"}
