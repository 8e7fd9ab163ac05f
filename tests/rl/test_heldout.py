"""The gain over RL, by hand."""

import pytest

from rl.heldout import Answered, compare, standard_error


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
