"""Truncated answers: wrong, masked or penalised, by hand."""

from functools import partial

import pytest
import torch

from keye.processor.processor import Sample
from rl.losses import group_advantages
from rl.policy.scoring import Group
from rl.rewards import Earned, counted_advantages
from rl.rollout.truncated import Truncation

COMPARE = partial(group_advantages, standardise=True)


def group(lengths: list[int], finished: list[bool]) -> Group:
    ids = torch.tensor([1])
    sample = Sample(ids, ids, ids.expand(3, 1))
    return Group(sample, [torch.zeros(n, dtype=torch.long) for n in lengths], [], finished, [""] * len(lengths))


def test_wrong_changes_nothing():
    groups, earned = [group([10, 3], [False, True])], [[Earned(0.0, {}), Earned(1.0, {})]]
    assert Truncation("wrong", 10).treated(earned, groups) is earned
    assert counted_advantages(earned, COMPARE)[1].tolist() == [[-1.0, 1.0]]


def test_the_penalty_rises_over_the_buffer_as_in_dapo():
    lengths = [16, 17, 18, 20, 20]
    groups = [group(lengths, [True, True, True, True, False])]
    earned = [[Earned(1.0, {"accuracy": 1.0})] * 4 + [Earned(0.0, {"accuracy": 0.0})]]
    [charged] = Truncation("penalise", limit=20, buffer=4, penalty=2.0).treated(earned, groups)
    assert [e.parts["overlong"] for e in charged] == [0.0, -0.5, -1.0, -2.0, -2.0]
    assert [e.total for e in charged] == [1.0, 0.5, 0.0, -1.0, -2.0]
    assert [e.parts["accuracy"] for e in charged] == [1, 1, 1, 1, 0]
    [hard] = Truncation("penalise", limit=20, penalty=2.0).treated(earned, groups)
    assert [e.parts["overlong"] for e in hard] == [0.0, 0.0, 0.0, 0.0, -2.0]


def test_a_masked_answer_has_no_advantage_and_does_not_move_the_others():
    finished = [[True, False, True, True], [False, True, False, False], [True] * 4]
    groups = [group([1] * 4, row) for row in finished]
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]])
    earned = [[Earned(value, {}) for value in row] for row in rewards.tolist()]
    found = counted_advantages(Truncation("mask", 10).treated(earned, groups), COMPARE)[1]
    # 1, 0, 1: mean 2/3, population standard deviation sqrt(2)/3
    expected = [(1 - 2 / 3) / (2**0.5 / 3), 0.0, (0 - 2 / 3) / (2**0.5 / 3), (1 - 2 / 3) / (2**0.5 / 3)]
    assert found[0].tolist() == pytest.approx(expected)
    assert found[1].tolist() == [0.0] * 4
    assert found[2].tolist() == COMPARE(rewards[2:])[0].tolist()
