"""What a video gives up where its budget binds: exact integers, in the stated order, the most similar frames first."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keye.encoder import SlowFastEncoder
from keye.errors import KeyeError
from keye.slowfast.budget import size_tokens
from keye.slowfast.concessions import concede
from keye.slowfast.policies import Adaptive, Decisions, Limits, Uniform

DEFAULTS = {"ratio": 0.3, "min_tokens": 48, "max_tokens_per_frame": 768, "max_tokens": 65_536}
HD = Limits((720, 1280), **DEFAULTS, multiple=4)
ADAPTIVE = Adaptive(0.85)


def decisions(slow: int, fast: int, similar: float = 0.95) -> Decisions:
    """A slow frame first, then slow and fast ones, spread evenly; slow frames ever more similar, from 0 to 0.85."""
    total = slow + fast
    kinds = [0 if (i + 1) * slow // total > i * slow // total else 1 for i in range(total)]
    kinds.sort(key=lambda kind: kind) if kinds[0] else None
    place, scores = 0, []
    for kind in kinds:
        place += kind == 0
        scores.append(similar if kind else 0.85 * place / (slow + 1))
    return Decisions(kinds, [math.nan, *scores[1:]], list(range(total)))


def test_a_film_by_hand():
    """743 slow and 457 fast frames: at full size 743 * 720 + 457 * 209 tokens, with slow frames of 85 about 65,536."""
    decided, allocation = concede(decisions(743, 457), HD, ADAPTIVE)
    assert allocation.fast_size == (56, 84)  # 2 x 3, the smallest with 4 to 8 tokens in about 9 : 16
    assert decided.types.count(0) == 743 and decided.types.count(1) == 457
    slow = size_tokens(allocation.slow_size)
    assert (65_536 - 457 * 6) // 743 * 0.98 <= slow <= 84  # 84.5 tokens fit
    assert allocation.tokens == 743 * slow + 457 * 6 <= 65_536
    assert decided.warnings == [
        "the budget of 65536 tokens does not hold 743 slow frames of 720 tokens and 457 fast frames of 209:"
        f" fast frames have 6 tokens; slow frames have {slow} tokens"
    ]


def test_fast_frames_shrink_first():
    decided, allocation = concede(decisions(60, 1100), HD, ADAPTIVE)
    assert allocation.slow_size == (560, 1008) and len(decided.types) == 1160  # slow frames keep 20 x 36
    assert 6 < size_tokens(allocation.fast_size) <= (65_536 - 60 * 720) // 1100 == 20


def test_then_fast_frames_are_left_out_the_most_similar_first():
    made = decisions(88, 1100)
    scores = [
        0.86 + 0.0001 * i if kind else score
        for i, (kind, score) in enumerate(zip(made.types, made.scores, strict=True))
    ]
    decided, allocation = concede(Decisions(made.types, scores, made.positions), HD, ADAPTIVE)
    assert allocation.slow_size == (560, 1008) and decided.types.count(0) == 88
    shown = [position for position, kind in zip(decided.positions, decided.types, strict=True) if kind]
    fast = [position for position, kind in enumerate(made.types) if kind]
    assert shown == fast[: (65_536 - 88 * 720) // 6]  # 2176 tokens are left: 362 frames of 6
    assert "738 frames are left out, the most similar first" in decided.warnings[0]


def test_equally_similar_frames_are_left_out_evenly():
    decided, _ = concede(decisions(88, 1100), HD, ADAPTIVE)
    shown = [position for position, kind in zip(decided.positions, decided.types, strict=True) if kind]
    gaps = [later - earlier for earlier, later in zip(shown, shown[1:], strict=False)]
    assert 362 == len(shown) and max(gaps) <= 5 and min(gaps) >= 2


def test_slow_frames_get_smaller_than_the_least_before_one_is_given_up():
    """2,000 slow frames of 48 tokens exceed the budget; 32 tokens, 4 x 8 in about 9 : 16, fit."""
    decided, allocation = concede(decisions(2000, 600), HD, ADAPTIVE)
    assert allocation.slow_size == (112, 224) and decided.types == [0] * 2000
    assert "slow frames have 32 tokens; 600 frames are left out, the most similar first" in decided.warnings[0]


def test_at_last_the_most_similar_slow_frames_are_left_out():
    """Of an hour, 4,458 frames of 7,200 are slow: 3,640 of 18 tokens fit, 3 x 6 in about 9 : 16."""
    made = decisions(4458, 2742)
    decided, allocation = concede(made, HD, ADAPTIVE)
    assert allocation.slow_size == (84, 168) and decided.types == [0] * 3640 and allocation.tokens == 65_520
    stays = set(decided.positions)
    similarity = {position: score for position, score in enumerate(made.scores) if made.types[position] == 0}
    given = set(similarity) - stays
    assert max(similarity[position] for position in stays - {0}) < min(similarity[position] for position in given)
    assert (
        "3640 of 4458 slow frames stay slow, the least similar first; 3560 frames are left out" in decided.warnings[0]
    )


def test_a_policy_that_does_not_look_at_frames_gives_up_evenly():
    made = Decisions([0, 1, 1, 1] * 1000, [math.nan, *[0.5] * 3999], list(range(4000)))
    decided, _ = concede(made, HD, Uniform(4))
    slow = [position for position, kind in zip(decided.positions, decided.types, strict=True) if kind == 0]
    assert slow == sorted(slow) and len(slow) == 1000
    some = Limits((720, 1280), **{**DEFAULTS, "max_tokens": 6_000}, multiple=4)
    decided, _ = concede(made, some, Uniform(4))
    slow = [position for position, kind in zip(decided.positions, decided.types, strict=True) if kind == 0]
    gaps = {later - earlier for earlier, later in zip(slow, slow[1:], strict=False)}
    assert len(slow) == 107 and gaps == {36, 40}


@settings(max_examples=300, deadline=None)
@given(
    st.integers(30, 4000),
    st.integers(30, 4000),
    st.integers(1, 300),
    st.integers(0, 900),
    st.floats(0.05, 1.0),
    st.integers(1, 60),
    st.integers(0, 800),
    st.integers(1, 60_000),
    st.floats(1, 12),
    st.sampled_from([28, 32]),
    st.integers(0, 10),
)
@example(height=30, width=73, slow=2, fast=0, ratio=1.0, low=6, more=4, budget=10, multiple=1.0, side=28, seed=0)
def test_exact_within_the_budget_and_in_the_stated_order(
    height, width, slow, fast, ratio, low, more, budget, multiple, side, seed
):
    budget = max(budget, low)
    limits = Limits((height, width), ratio, low, low + more, budget, side, multiple)
    scores = torch.rand(slow + fast, generator=torch.Generator().manual_seed(seed)).tolist()
    made = Decisions([0] * slow + [1] * fast, [math.nan, *scores[1:]], list(range(slow + fast)))
    decided, allocation = concede(made, limits, ADAPTIVE)
    kept, shown = decided.types.count(0), decided.types.count(1)
    slow_tokens, fast_tokens = (size_tokens(size, side) for size in (allocation.slow_size, allocation.fast_size))
    assert allocation.tokens == kept * slow_tokens + shown * fast_tokens <= budget and kept >= 1
    free = limits.allocate(slow, fast, max_tokens=10**12)
    full = size_tokens(free.slow_size, side)
    if free.tokens <= budget and slow + fast <= budget // low:
        assert decided is made and allocation == free
        return
    most, lowest = budget // low, low
    if slow > most:
        lowest = min(low, math.ceil(4 * multiple))
        lowest = size_tokens(replace(limits, min_tokens=lowest).least_slow_size, side)
        most = min(slow, budget // lowest)
    assert len(decided.types) <= most and len(decided.warnings) == 1
    assert slow_tokens <= full and fast_tokens <= size_tokens(free.fast_size, side)
    if shown:
        assert slow_tokens >= multiple * fast_tokens or fast_tokens == 1
    # Slow frames lose tokens only where as many fast as slow frames do not fit beside them, and their number last.
    least = min(8, fast_tokens)
    if slow_tokens < full and fast:
        assert slow * full + min(slow, fast) * least > budget or slow + fast > budget // low
    if kept < slow:
        floor = size_tokens(replace(limits, min_tokens=lowest).least_slow_size, side)
        assert slow * floor + min(slow, fast) * least > budget or slow > most
        stays = {decided.positions[i] for i, kind in enumerate(decided.types) if kind == 0}
        left = [scores[i] for i in range(slow) if i not in stays]
        assert max((scores[i] for i in stays if i), default=-1.0) <= min(left)


def test_a_binding_budget_restores_the_difference():
    """Frames of noise: all slow. Half of the frames repeat: fast. The old rule gives both the least of tokens."""
    noise = torch.randint(0, 256, (20, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames = noise.repeat_interleave(2, 0)
    settings_ = {"max_tokens": 700, "min_tokens_per_frame": 16, "max_tokens_per_frame": 64, "measure": "patch_l1"}
    old = SlowFastEncoder(**settings_, slow_multiple=0).plan(frames, source_fps=2)
    new = SlowFastEncoder(**settings_).plan(frames, source_fps=2)
    assert torch.equal(old.frame_types, new.frame_types) and old.counts == (20, 20)
    assert (old.slow_tokens, old.fast_tokens) == (16, 16) and (new.slow_tokens, new.fast_tokens) == (30, 4)
    assert new.tokens <= 700 and "fast frames have 4 tokens; slow frames have 30 tokens" in new.warnings[0]


def test_frames_are_compared_beyond_those_that_fit():
    """36 frames, of which five differ: nine fit at the least size, and the changes are among them."""
    frames, changes = torch.zeros(36, 3, 112, 112, dtype=torch.uint8), [0, 7, 13, 14, 30]
    for level, index in enumerate(changes):
        frames[index:] = 40 * level
    settings_ = {"max_tokens": 144, "min_tokens_per_frame": 16, "max_tokens_per_frame": 16, "measure": "patch_l1"}
    encoder = SlowFastEncoder(**settings_, threshold=0.9)
    assert encoder.most_frames == 36
    plan = encoder.plan(frames, source_fps=2)
    assert plan.frame_indices[plan.frame_types == 0].tolist() == changes
    assert len(plan) == 9 and plan.tokens == 5 * 16 + 4 * 4
    assert plan.span == (0.0, 18.0) and plan.frame_ends.max() == 18  # frames that are left out belong to the clip
    old = encoder.with_settings(slow_multiple=0).plan(frames, source_fps=2)
    assert old.frame_indices.tolist() == list(range(0, 36, 4))


def test_the_rule_is_checked_and_can_be_off():
    for wrong in (0.5, -1, math.nan, "4", True):
        with pytest.raises(KeyeError, match="slow_multiple is"):
            SlowFastEncoder(slow_multiple=wrong)
    assert SlowFastEncoder(slow_multiple=0).most_frames == 65_536 // 48
    assert SlowFastEncoder().most_frames == 65_536 // 4 and SlowFastEncoder(policy="all_slow").most_frames == 1365


def test_settings_of_an_older_version_have_no_rule(tmp_path):
    from keye.encoder_config import EncoderConfig

    saved = SlowFastEncoder(max_tokens=900).settings
    assert EncoderConfig.saved(json.loads(json.dumps(saved))) == saved
    del saved["slow_multiple"]
    assert SlowFastEncoder(**EncoderConfig.saved(saved)).slow_multiple == 0
