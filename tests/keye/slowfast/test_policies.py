import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.encoder import SlowFastEncoder
from keye.errors import KeyeError
from keye.slowfast.frame_classifier import FrameClassifier
from keye.slowfast.measures import get_measure
from keye.slowfast.policies import (
    Adaptive,
    AdaptiveBudget,
    AllSlow,
    Ladder,
    Limits,
    Policy,
    Random,
    Strided,
    TwoStream,
    Uniform,
    get_policy,
    known_policies,
)

# 720 slow and 209 fast tokens at full size (20x36 and 11x19, see test_budget.py)
LIMITS = Limits(size=(720, 1280), ratio=0.3, min_tokens=48, max_tokens_per_frame=768, max_tokens=65_536)


class Brightness:
    """1 - |difference of brightness| in steps of 1/64, which floats hold exactly; frames are [T, 3, 1, 1]."""

    name, threshold = "brightness", 0.9
    compared = 0

    def prepare(self, frames):
        return frames.float().mean((1, 2, 3)) / 64

    def compare(self, reference, features):
        self.compared += len(features)
        return 1 - (features - reference).abs()


def frames_of(levels: list[int]) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)


def decide(levels, policy, limits=LIMITS, step=8, measure=None):
    walk = FrameClassifier(measure or Brightness(), policy, limits)
    for start in range(0, len(levels), step):
        walk.step(frames_of(levels[start : start + step]))
    return walk.finish()


def like(one: int, other: int) -> float:
    return 1 - abs(one - other) / 64


def naive(levels, threshold, max_gap, min_gap, hysteresis, cut):
    """The rules of `Adaptive`, implemented again over complete lists."""
    types = [0]
    calm_since = [True]  # whether the picture was at rest on the way up to each frame, itself included
    for index in range(1, len(levels)):
        latest = max(i for i in range(index) if types[i] == 0)
        score = like(levels[latest], levels[index])
        resting = any(calm_since[latest:index])
        differs = score < (threshold if resting else threshold - hysteresis)
        slow = differs and index - latest >= min_gap
        slow = slow or (max_gap is not None and index - latest >= max_gap)
        slow = slow or (cut is not None and like(levels[index - 1], levels[index]) < cut)
        types.append(0 if slow else 1)
        calm_since.append(score >= threshold)
    return types


clips = st.lists(st.integers(0, 64), min_size=1, max_size=40)
steps = st.integers(1, 9)
grades = st.integers(0, 64).map(lambda grade: grade / 64)


def test_each_frame_is_compared_with_the_latest_slow_one():
    # Threshold 58/64: 0 slow; 3 fast; 6 fast; 10 slow (54/64 to 0); 13 fast (61/64 to 10, though 51/64 to 0); 0 slow.
    types, scores = FrameClassifier(Brightness(), Adaptive(58 / 64)).step(frames_of([0, 3, 6, 10, 13, 0]))
    assert types == [0, 1, 1, 0, 1, 0]
    assert math.isnan(scores[0])
    assert scores[1:] == [61 / 64, 58 / 64, 54 / 64, 61 / 64, 54 / 64]


@settings(max_examples=300, deadline=None)
@given(clips, steps, grades, st.integers(1, 6), st.none() | st.integers(6, 12), grades, st.none() | grades.filter(bool))
def test_options_and_batches(levels, step, threshold, min_gap, max_gap, hysteresis, cut):
    policy = Adaptive(threshold, max_gap, min_gap, hysteresis, cut)
    decisions = decide(levels, policy, step=step)
    assert decisions.types == naive(levels, threshold, max_gap, min_gap, hysteresis, cut)
    assert decisions.positions == list(range(len(levels)))
    assert [decisions.warnings, decisions.threshold, decisions.max_tokens] == [[], None, None]


def test_options_by_hand():
    def slow(levels, policy):
        return [index for index, kind in enumerate(decide(levels, policy).types) if kind == 0]

    still = [0] * 10
    assert slow(still, Adaptive(0.9)) == [0]
    assert slow(still, Adaptive(0.9, max_gap=4)) == [0, 4, 8]
    flicker = [0, 32, 0, 32, 0, 32, 0]
    assert slow(flicker, Adaptive(0.9)) == [0, 1, 2, 3, 4, 5, 6]
    assert slow(flicker, Adaptive(0.9, min_gap=3)) == [0, 3, 6]
    pan = [0, 8, 16, 24, 32, 40, 48, 48, 64]  # 1/8 a frame, then rest, then 1/4
    assert slow(pan, Adaptive(0.9)) == [0, 1, 2, 3, 4, 5, 6, 8]
    # 16 differs by 1/8 from 8 while changing, needs more than 0.1 + 0.1: 24 has 1/4. Rest at 48, so 64 needs 0.1 only.
    assert slow(pan, Adaptive(0.9, hysteresis=0.1)) == [0, 1, 3, 5, 8]
    cut = [0, 8, 64, 64]
    assert slow(cut, Adaptive(0.9, min_gap=3)) == [0, 3]
    assert slow(cut, Adaptive(0.9, min_gap=3, cut=0.3)) == [0, 2]


def test_the_frame_before_is_compared_only_with_looks_back():
    plain, back = Brightness(), Brightness()
    levels = list(range(30))
    decide(levels, Adaptive(0.5), measure=plain)
    decide(levels, Adaptive(0.5, cut=0.1), measure=back)
    assert plain.compared == 29  # nothing turns up below 0.5, and so nothing is compared twice
    assert back.compared == 29 + 28  # at the second frame the frame before is the latest slow one


def test_fixed_patterns():
    frames = frames_of([0] * 9)
    assert FrameClassifier(Brightness(), AllSlow()).step(frames)[0] == [0] * 9
    assert FrameClassifier(Brightness(), Uniform(4)).step(frames)[0] == [0, 1, 1, 1, 0, 1, 1, 1, 0]
    assert FrameClassifier(Brightness(), Strided()).step(frames)[0] == [0, 1, 1, 1, 1, 1, 1, 1, 0]
    assert Strided() != Uniform(8)


def test_scores_of_a_real_measure_do_not_depend_on_batches():
    pictures = torch.randint(0, 256, (13, 3, 61, 83), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    pictures[1:6] = pictures[0]
    pictures[3, :, 10:30] //= 2
    for policy in (Adaptive(0.9, cut=0.3), AdaptiveBudget(0.9, share=0.5), TwoStream(4, 16)):
        answers = []
        for step in (1, 5, 13):
            walk = FrameClassifier(get_measure("patch_l1"), policy, LIMITS)
            for start in range(0, 13, step):
                walk.step(pictures[start : start + step])
            answers.append(walk.finish())
        assert answers[0].types == answers[1].types == answers[2].types
        for one, other in zip(answers[0].scores[1:], answers[2].scores[1:], strict=True):
            assert one == pytest.approx(other, abs=1e-6)


@settings(max_examples=150, deadline=None)
@given(clips, steps, st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_share_is_not_exceeded_and_monotone(levels, step, one, other):
    small, large = (decide(levels, AdaptiveBudget(0.9, share=share), step=step) for share in sorted((one, other)))
    for decisions, share in ((small, min(one, other)), (large, max(one, other))):
        # The first frame is always slow, even where that is more than the share.
        assert 1 <= decisions.types.count(0) <= max(1, share * len(levels))
        assert decisions.types == naive(levels, decisions.threshold, None, 1, 0, None)
        wanted = max(1, int(share * len(levels)))
        assert bool(decisions.warnings) == (decisions.types.count(0) != wanted or share * len(levels) < 1)
    assert small.types.count(0) <= large.types.count(0) and small.threshold <= large.threshold


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 63), min_size=1, max_size=20), st.floats(0.05, 1.0))
def test_share_finds_the_most_where_counts_are_monotone(jumps, share):
    # 0 and back, again and again: a jump makes two slow frames at every threshold above 1 - jump / 64, none below.
    levels = [0, *itertools.chain.from_iterable((jump, 0) for jump in jumps)]
    counts = {1 + 2 * sum(jump > least for jump in jumps) for least in range(65)}
    best = max(count for count in counts if count <= max(1, int(share * len(levels))))
    assert decide(levels, AdaptiveBudget(0.9, share=share)).types.count(0) == best


@settings(max_examples=150, deadline=None)
@given(clips, st.integers(1, 60_000), st.integers(1, 60_000), grades)
def test_tokens_are_not_exceeded_and_monotone(levels, one, other, threshold):
    found = []
    for tokens in sorted((one, other)):
        policy = AdaptiveBudget(threshold, tokens=tokens)
        if len(levels) > policy.most_frames(LIMITS.max_tokens, LIMITS.min_tokens) or tokens < LIMITS.min_tokens:
            continue
        decisions = decide(levels, policy)
        slow = decisions.types.count(0)
        allocation = LIMITS.allocate(slow, len(levels) - slow, max_tokens=decisions.max_tokens)
        assert decisions.max_tokens == tokens and allocation.tokens <= tokens
        assert decisions.threshold >= threshold
        found.append((decisions.threshold, slow))
    assert found == sorted(found)


def test_tokens_by_hand():
    levels = [0, 30, 0, 20, 0, 10, 0, 1, 0, 0]  # rests at 0 between jumps of 30, 20, 10 and 1 of 64
    # Full size: 720 and 209 tokens, so 10 frames cost 2090 + 511 a slow frame: 7 of them are 5667.
    decisions = decide(levels, AdaptiveBudget(0.0, tokens=5_700))
    assert decisions.types == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert 1 - 10 / 64 < decisions.threshold <= 1 - 1 / 64
    assert decisions.warnings == []
    # 3 slow frames cost 3623 and 5 cost 4645; no threshold gives 4.
    between = decide(levels, AdaptiveBudget(0.0, tokens=4_600))
    assert between.types.count(0) == 3
    assert between.warnings == [
        "3623 tokens of 4600 are spent with 3 slow frames of 10: the next threshold tried would cost more"
    ]
    # The threshold is not lowered below one's own: smaller frames make room instead.
    small = decide(levels, AdaptiveBudget(0.9, tokens=2_000))
    assert small.threshold == 0.9 and small.types.count(0) == 7
    assert LIMITS.allocate(7, 3, max_tokens=small.max_tokens).tokens > 0.98 * 2_000
    # Nothing is made slow that is exactly as before, however much may be spent.
    rich = decide(levels, AdaptiveBudget(0.9, tokens=60_000))
    assert rich.types.count(0) == 9 and rich.threshold == 1
    assert rich.warnings == ["6689 tokens of 60000 are spent with 9 slow frames of 10: no more frames differ"]
    every = decide([0, 60] * 5, AdaptiveBudget(0.9, tokens=60_000))
    assert every.warnings == ["7200 tokens of 60000 are spent with 10 slow frames of 10: all frames are slow"]
    assert "above max_tokens=65536" in decide(levels, AdaptiveBudget(0.9, tokens=70_000)).warnings[0]


def test_options_apply_while_the_threshold_is_searched():
    decisions = decide([0, 60] * 20, AdaptiveBudget(0.9, min_gap=3, share=1.0))
    assert decisions.types == [0, 1, 1] * 13 + [0]
    assert "14 of 40 frames are slow where share=1.0 allows 40" in decisions.warnings[0]
    forced = decide([0] * 40, AdaptiveBudget(0.9, max_gap=4, share=0.1))
    assert forced.types.count(0) == 10
    assert "10 of 40 frames are slow, more than share=0.1" in forced.warnings[0]


def test_random_ignores_the_picture_and_follows_its_seed():
    still, noise = [decide(frames, Random(4, seed=1)).types for frames in ([7] * 2000, list(range(250)) * 8)]
    assert still == noise != decide([7] * 2000, Random(4, seed=2)).types
    assert still[0] == 0 and 440 < still.count(0) < 560  # four standard deviations of a draw of 1 in 4


def test_two_stream_by_hand():
    decisions = decide([0, 8, 16, 24, 32], TwoStream(slow=2, fast_tokens=16))
    # Slow are frames 0 and 2, each followed by itself in the fast path.
    assert decisions.positions == [0, 0, 1, 2, 2, 3, 4]
    assert decisions.types == [0, 1, 1, 0, 1, 1, 1]
    assert math.isnan(decisions.scores[0])
    assert decisions.scores[1:] == [1, 7 / 8, 6 / 8, 1, 7 / 8, 6 / 8]
    short = decide([5, 6], TwoStream())
    assert short.types == [0, 1, 0, 1]
    assert short.warnings == ["all 2 frames are slow, fewer than slow=10"]


def test_tokens_where_all_frames_cost_the_same():
    same = replace(LIMITS, ratio=1.0)
    assert decide([0, 30, 60], AdaptiveBudget(0.0, tokens=160), same).types == [0, 1, 1]  # 53 tokens each
    assert decide([0, 30, 60], AdaptiveBudget(0.0, tokens=9_000), same).types == [0, 0, 0]


def test_two_stream_says_that_the_budget_does_not_hold_one_frame():
    encoder = SlowFastEncoder(policy="two_stream", max_tokens=63, slow_multiple=0)
    message = r"two_stream: max_tokens=63 does not hold one frame of 48 and 16 tokens; give max_tokens=64 or more"
    with pytest.raises(KeyeError, match=message):
        encoder.plan(torch.zeros(3, 3, 56, 56, dtype=torch.uint8))
    frames = torch.zeros(3, 3, 280, 280, dtype=torch.uint8)
    assert encoder.with_settings(max_tokens=64).plan(frames).tokens <= 64
    assert encoder.with_settings(slow_multiple=4).plan(frames).tokens <= 63


def test_two_stream_as_in_the_paper():
    limits = Limits(size=(672, 672), ratio=0.3, min_tokens=48, max_tokens_per_frame=288, max_tokens=65_536)
    decisions = decide([1] * 50, TwoStream(), limits)
    slow = decisions.types.count(0)
    allocation = limits.allocate(slow, len(decisions.types) - slow, fast_tokens=TwoStream().fast_tokens)
    assert (slow, len(decisions.types) - slow) == (10, 50)
    assert allocation.fast_size == (112, 112)  # 4 x 4


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 60), st.integers(0, 4000))
def test_two_stream_frames_fit(slow, fast_tokens, low, more):
    policy, budget = TwoStream(slow, fast_tokens), low + fast_tokens + more

    def cost(count):
        return min(slow, count) * low + count * fast_tokens

    count = policy.most_frames(budget, low)
    assert cost(count) <= budget < cost(count + 1)


@pytest.mark.parametrize("spec", ["adaptive", "adaptive_budget:share=0.3", "adaptive_budget:tokens=9000", "all_slow",
                                  "uniform", "strided", "random", "two_stream"])  # fmt: skip
@pytest.mark.parametrize("measure", ["patch_l1", "patch_cosine", "ssim"])
def test_clips_without_change(spec, measure):
    for value, count in itertools.product((0, 128), (1, 2, 11)):
        walk = FrameClassifier(get_measure(measure), get_policy(spec, 0.9), LIMITS)
        walk.step(torch.full((count, 3, 56, 70), value, dtype=torch.uint8))
        decisions = walk.finish()
        assert decisions.types[0] == 0 and set(decisions.positions) == set(range(count))
        assert len(decisions.types) == len(decisions.scores) == len(decisions.positions)
        assert all(score == pytest.approx(1, abs=1e-5) for score in decisions.scores[1:])
        if spec.startswith("adaptive"):
            assert decisions.types == [0] + [1] * (count - 1)


def test_a_stream_keeps_nothing():
    walk = FrameClassifier(Brightness(), Adaptive(0.9), remember=False)
    for level in (0, 0, 60, 60):
        types, _ = walk.step(frames_of([level]))
    assert types == [1]
    with pytest.raises(ValueError, match="finish.. needs"):
        walk.finish()
    with pytest.raises(KeyeError, match="needs all frames of a clip to decide"):
        FrameClassifier(Brightness(), TwoStream(), LIMITS, remember=False)


def test_no_frames_give_no_decisions():
    for policy in (Adaptive(0.9), TwoStream()):
        walk = FrameClassifier(Brightness(), policy, LIMITS)
        assert walk.step(frames_of([])) == ([], [])
        assert walk.finish().types == []


def test_your_own_policy():
    class EveryOther(Policy):
        name, spec = "every_other", "every_other"

        def is_slow(self, seen):
            return seen.index % 2 == 0

    assert decide([0] * 5, EveryOther()).types == [0, 1, 0, 1, 0]
    assert EveryOther().most_frames(100, 30) == 3


def test_policy_specs():
    expected = {
        "adaptive": Adaptive(0.8),
        "adaptive:max_gap=16,min_gap=2": Adaptive(0.8, max_gap=16, min_gap=2),
        "adaptive: cut=0.3 , hysteresis = .05": Adaptive(0.8, cut=0.3, hysteresis=0.05),
        "adaptive_budget:share=0.25": AdaptiveBudget(0.8, share=0.25),
        "adaptive_budget:max_gap=9,tokens=8000": AdaptiveBudget(0.8, max_gap=9, tokens=8000),
        "all_slow": AllSlow(),
        "ladder": Ladder(0.8),
        "ladder:price=0.001": Ladder(0.8, price=0.001),
        "uniform": Uniform(4),
        "uniform:8": Uniform(8),
        "uniform:every=8": Uniform(8),
        "random": Random(4, 0),
        "random:every=8,seed=3": Random(8, 3),
        "strided": Strided(8),
        "strided:4": Strided(4),
        "two_stream": TwoStream(10, 16),
        "two_stream:slow=5,fast_tokens=9": TwoStream(5, 9),
    }
    for spec, policy in expected.items():
        assert get_policy(spec, 0.8) == policy
        assert get_policy(policy.spec, 0.8) == policy
    assert get_policy("uniform:every=8", 0.8).spec == "uniform:8"
    assert get_policy("adaptive:min_gap=1,max_gap=3", 0.8).spec == "adaptive:max_gap=3"
    assert {spec.partition(":")[0] for spec in expected} == set(known_policies())
    assert [policy.online for policy in map(lambda spec: get_policy(spec, 1), ("adaptive", "two_stream"))] == [1, 0]


@given(
    st.floats(0, 1),
    st.none() | st.integers(50, 10**6),
    st.integers(1, 50),
    st.floats(0, 1),
    st.none() | st.floats(0, 1, exclude_min=True),
    st.floats(0, 1, exclude_min=True) | st.integers(1, 10**9),
)
def test_specs_build_the_same_policy(threshold, max_gap, min_gap, hysteresis, cut, target):
    options = (threshold, max_gap, min_gap, hysteresis, cut)
    budget = {"share": target} if isinstance(target, float) else {"tokens": target}
    for policy in (Adaptive(*options), AdaptiveBudget(*options, **budget)):
        assert get_policy(policy.spec, threshold) == policy


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fast", "use one of adaptive, adaptive_budget, all_slow, ladder, random, strided, two_stream, uniform"),
        ("", "use one of adaptive"),
        ("uniform:0", "every is 0; give a whole number of 1 or more"),
        ("uniform:x", "every is 'x'; give a whole number"),
        ("uniform:4,8", "every is given twice"),
        ("uniform:n=4", "'n=4' is not an option of uniform; use every="),
        ("adaptive:3", "'3' is not an option of adaptive; use max_gap=, min_gap=, hysteresis=, cut="),
        ("adaptive:", "'' is not an option of adaptive"),
        ("adaptive:threshold=0.5", "'threshold=0.5' is not an option of adaptive"),
        ("adaptive:max_gap=2.5", "max_gap is '2.5'; give a whole number"),
        ("adaptive:max_gap=2,min_gap=3", "min_gap is 3; give at most max_gap=2"),
        ("adaptive:cut=0", "cut is 0.0; give a similarity above 0"),
        ("adaptive:hysteresis=nan", "hysteresis is nan; give a difference"),
        ("adaptive_budget", "give one of tokens=N and share=S"),
        ("adaptive_budget:share=0.5,tokens=9", "give one of tokens=N and share=S"),
        ("adaptive_budget:share=1.5", "share is 1.5; give a number above 0 and at most 1"),
        ("adaptive_budget:tokens=-1", "tokens is -1; give a whole number of 1 or more"),
        ("all_slow:2", "'2' is not an option of all_slow; it has none"),
        ("random:seed=-1", "seed is -1; give a whole number of 0 or more"),
        ("two_stream:slow=0", "slow is 0; give a whole number of 1 or more"),
    ],
)
def test_wrong_specs(spec, message):
    with pytest.raises(KeyeError) as error:
        get_policy(spec, 0.8)
    assert message in str(error.value) and "\n" not in str(error.value)
