"""Packs are assigned to ranks so that a round costs each rank about the same."""

from stages.data.packing.balance import TowerCost, assign_parts, assign_rounds, assign_sums
from tests.stages import small


def test_rounds_are_of_packs_that_cost_the_same():
    # 9 and 5 make a round, 2 and 1 the next, where the rank that had 9 gets 1.
    assert assign_rounds([5, 1, 9, 2], 2) == [[[2], [1]], [[0], [3]]]


def test_sums_are_similar_with_equally_many_samples():
    # 9 | 5 · 5, 4 → 9 | 9 · 4 → the first · 3 has to go to the second, 1 to the first: 9 + 4 + 1 | 5 + 4 + 3.
    assert assign_sums([9, 5, 4, 4, 3, 1], 2) == [[0, 3, 5], [1, 2, 4]]


def test_parts_of_a_round_cost_the_same():
    # Four groups of two: 9 + 1, 8 + 2, 7 + 3, 6 + 4; 1,000 and 900 share a round.
    assert assign_parts([9, 8, 7, 6, 4, 3, 2, 1], 2, 2) == [[[0, 7], [2, 5]], [[1, 6], [3, 4]]]
    first, second = assign_parts([1000, 900, 8, 7, 1, 1, 1, 1], 2, 2)
    assert {first[0][0], second[0][0]} == {0, 1} and len(first) == len(second) == 2
    assert sorted(i for share in (first, second) for part in share for i in part) == list(range(8))


def test_cost_of_a_tower_alone_is_the_frames():
    vision = small.model().config.vision_config
    cost = TowerCost(vision)
    assert cost.per_token == 0 and cost.excess(9, 5, []) == 0
    assert cost.excess(9, 5, [(2, 4)] * 2) == 2 * cost.excess(100, 1, [(2, 4)])
