"""The bound in bytes, and rows that leave."""

import random

import pytest

from keye.errors import KeyeError
from rl.rollout.cache import compaction, room_for


def test_rows_and_prompts_in_flight_fit_into_the_budget():
    generator = random.Random(0)
    for _ in range(300):
        longest, group, new = generator.randint(1, 500), generator.randint(1, 9), generator.randint(1, 90)
        rows, budget = generator.randint(1, 64), generator.randint(1, 9000)
        if budget < longest + new:
            with pytest.raises(KeyeError, match=r"rollout\.cache_mb"):
                room_for(longest, group, new, rows, budget * 10, 10)
            continue
        room = room_for(longest, group, new, rows, budget * 10, 10)
        assert 1 <= room.rows <= rows
        assert longest <= room.prompt_tokens
        assert room.rows * new + room.prompt_tokens <= budget


def test_a_full_budget_holds_complete_groups():
    # 100 + 4 · 50 = 300 tokens for a prompt with its group: three of them in 1,000 tokens.
    room = room_for(100, 4, 50, 256, 1000, 1)
    assert (room.rows, room.prompt_tokens) == (12, 400)


def test_remaining_rows_become_the_first_ones_with_the_fewest_moves():
    generator = random.Random(1)
    for _ in range(200):
        ended = [generator.random() < 0.4 for _ in range(generator.randint(1, 12))]
        rows = list(range(len(ended)))
        order, sources, targets = compaction(ended)
        for source, target in zip(sources, targets, strict=True):
            rows[target] = source
        assert rows[: len(order)] == order
        assert sorted(order) == [place for place, end in enumerate(ended) if not end]
        assert len(sources) == sum(place >= len(order) for place in order)
