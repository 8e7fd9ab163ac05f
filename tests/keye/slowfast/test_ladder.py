"""The policy `ladder`: sizes on the convex hull, detail of a frame's own pixels, one pass, plans with many sizes."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.adapters.keye_vl_utils import process_vision_info
from keye.adapters.qwen import clip_frames, visual_tokens
from keye.encoder import SlowFastEncoder
from keye.errors import KeyeError, VideoError
from keye.slowfast.frame_classifier import FrameClassifier
from keye.slowfast.measures import get_measure
from keye.slowfast.plan import VideoPlan
from keye.slowfast.policies import Ladder, Limits
from keye.slowfast.policies.detail import OCTAVES, kept_detail, octave_energies, octaves_between
from keye.slowfast.policies.ladder import Steps
from keye.slowfast.policies.rate_distortion import best_levels, hull
from scripts.clips import clip

SMALL = {"max_tokens": 400, "min_tokens_per_frame": 8, "max_tokens_per_frame": 64, "measure": "patch_l1"}


def textured(height: int, width: int, draw: torch.Generator) -> torch.Tensor:
    """A picture with about equal detail in all octaves: float32 [3, height, width]."""
    picture = torch.full((3, height, width), 128.0)
    for side in (1, 2, 4, 8, 16, 32):
        noise = torch.randn(3, -(-height // side), -(-width // side), generator=draw)
        picture += 1.5 * side * noise.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :height, :width]
    return picture


def moving(count: int, seed: int = 0) -> torch.Tensor:
    """Frames of which parts of different heights are replaced: uint8 [count, 3, 168, 224]."""
    draw = torch.Generator().manual_seed(seed)
    frames = textured(168, 224, draw).clamp(0, 255).byte().repeat(count, 1, 1, 1)
    for index in range(1, count):
        frames[index] = frames[index - 1]
        part = int(torch.randint(0, 169, (1,), generator=draw)) if index % 3 == 0 else index % 5
        frames[index, :, :part] = textured(168, 224, draw).clamp(0, 255).byte()[:, :part]
    return frames


# --- sizes that keep the most information ---------------------------------------------------------------------------

options = st.integers(1, 4).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(1, 12), min_size=count, max_size=count),
        st.lists(st.lists(st.integers(0, 20), min_size=count, max_size=count), min_size=1, max_size=5),
        st.integers(0, 60),
    )
)


@settings(max_examples=400, deadline=None)
@given(options)
def test_never_over_and_optimal_within_one_step(drawn):
    steps, gains, budget = drawn
    tokens = list(itertools.accumulate(steps))
    information = [list(itertools.accumulate(row)) for row in gains]
    levels = best_levels(tokens, information, budget)
    spent = sum(tokens[level] for level in levels if level >= 0)
    kept = sum(row[level] for row, level in zip(information, levels, strict=True) if level >= 0)
    assert spent <= budget
    best, largest = 0, 0
    for choice in itertools.product(range(-1, len(tokens)), repeat=len(information)):
        if sum(tokens[level] for level in choice if level >= 0) <= budget:
            best = max(best, sum(row[level] for row, level in zip(information, choice, strict=True) if level >= 0))
    for row in information:
        chain = [0, *(row[place] for place in hull(tokens, row))]
        largest = max([largest, *(later - earlier for earlier, later in itertools.pairwise(chain))])
    assert kept <= best <= kept + largest
    if len(information) == 1 and budget in tokens and hull(tokens, information[0]) == list(range(len(tokens))):
        assert kept == best


@given(options)
def test_the_hull_is_above_all_options_and_concave(drawn):
    steps, gains, _ = drawn
    tokens, row = list(itertools.accumulate(steps)), list(itertools.accumulate(gains[0]))
    places = hull(tokens, row)
    xs, ys = [0, *(tokens[place] for place in places)], [0, *(row[place] for place in places)]
    assert all(information <= np.interp(count, xs, ys) + 1e-9 for count, information in zip(tokens, row, strict=True))
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.pairwise(zip(xs, ys, strict=True))]
    assert slopes == sorted(slopes, reverse=True) and len(set(slopes)) == len(slopes)


def test_two_sizes_are_the_rule_of_slow_and_fast_frames():
    """With the sizes of a slow and a fast frame only, novel frames are slow and similar ones fast, as in `adaptive`."""
    novelty = [1.0, 0.02, 0.01, 0.6, 0.03, 0.01, 0.02, 0.9, 0.02]
    information = [[new * 0.1, new * 0.6] for new in novelty]
    slow = [new >= 0.15 for new in novelty]
    budget = 85 * sum(slow) + 6 * (len(slow) - sum(slow))
    assert best_levels((6, 85), information, budget) == [int(kind) for kind in slow]
    # With less, the most similar frames are left out first, as in `keye.slowfast.concessions`.
    assert best_levels((6, 85), information, budget - 12) == [1, 0, -1, 1, 0, -1, 0, 1, 0]


def test_price_number_and_first_frame_are_kept():
    information = [[0.1, 0.2], [5.0, 6.0], [4.0, 8.0]]
    assert best_levels((2, 4), information, 100) == [1, 1, 1]
    assert best_levels((2, 4), information, 100, price=1.0) == [-1, 0, 1]
    assert best_levels((2, 4), information, 100, most=2) == [-1, 1, 1]
    assert best_levels((2, 4), information, 100, most=2, first=1) == [1, 1, -1]  # by information per token
    with pytest.raises(ValueError, match="the first frame has 4 tokens"):
        best_levels((2, 4), information, 3, first=1)


# --- detail ---------------------------------------------------------------------------------------------------------


def test_octaves_are_those_of_repeated_averages():
    frames = torch.randint(0, 256, (3, 3, 64, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    energies = octave_energies(frames, (64, 128))
    weights = np.array([77, 150, 29])[:, None, None]
    for frame, found in zip(frames.numpy().astype(np.int64), energies.numpy(), strict=True):
        grey = ((frame * weights).sum(0) >> 8).astype(np.float64)
        for octave in range(6):
            means = grey.reshape(grey.shape[0] // 2, 2, grey.shape[1] // 2, 2).mean((1, 3))
            lost = ((grey - means.repeat(2, 0).repeat(2, 1)) ** 2).sum() * 4**octave  # per pixel of the frame
            assert found[octave] == pytest.approx(4 * lost / 4**octave, rel=1e-9)
            grey = means
    assert torch.equal(energies, torch.cat([octave_energies(frame[None], (64, 128)) for frame in frames]))


def test_detail_falls_with_the_size_as_the_pixels_do():
    full, half = (112, 112), (56, 56)
    coarse = torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8).repeat_interleave(2, 2).repeat_interleave(2, 3)
    fine = torch.randint(0, 256, (1, 3, 112, 112), dtype=torch.uint8)
    flat = torch.full((1, 3, 112, 112), 9, dtype=torch.uint8)
    octaves = [octaves_between(size, full) for size in (full, half, (28, 28))]
    assert octaves == [0, 1, 2]
    kept = kept_detail(octave_energies(torch.cat([coarse, fine, flat]), full), octaves)
    assert kept[0, :2].tolist() == [1, 1] and kept[0, 2] < 0.5  # nothing is finer than two pixels
    assert kept[1, 0] == 1 and kept[1, 1] < 0.2 and kept[2].tolist() == [1, 1, 1]
    every = kept_detail(octave_energies(fine, full), np.linspace(0, OCTAVES, 50).tolist())[0]
    assert bool((every.diff() <= 1e-12).all()) and every[-1] == pytest.approx(0, abs=1e-9)


@given(
    st.integers(20, 3000), st.integers(20, 3000), st.integers(1, 60), st.integers(0, 800), st.integers(1, 2000),
    st.sampled_from([0.0, 1.0, 4.0, 9.5]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_every_slow_size_is_a_multiple_of_every_fast_one(height, width, low, more, budget, multiple):
    limits = Limits((height, width), 0.3, low, low + more, max(budget, low), multiple=multiple)
    steps = Steps.of(limits)
    tokens = [rows // 28 * (columns // 28) for rows, columns in steps.sizes]
    assert tokens == list(steps.tokens) == sorted(set(tokens)) and steps.slow < len(tokens)
    assert tokens[-1] <= max(budget, low) and tokens[steps.slow] >= min(low, tokens[-1])
    if steps.slow and multiple:
        assert tokens[steps.slow] >= multiple * tokens[steps.slow - 1] or tokens[steps.slow - 1] == 1


# --- plans ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 14),
    height=st.integers(1, 130),
    width=st.integers(1, 130),
    low=st.integers(1, 12),
    more=st.integers(0, 40),
    budget=st.integers(1, 250),
    multiple=st.sampled_from([0, 1, 4]),
    price=st.sampled_from([1e-6, 2e-4, 0.01]),
)
def test_plans_are_exact_and_never_over_the_budget(count, height, width, low, more, budget, multiple, price):
    encoder = SlowFastEncoder(
        policy=f"ladder:price={price}",
        threshold=0.9,
        min_tokens_per_frame=low,
        max_tokens_per_frame=low + more,
        max_tokens=max(budget, low),
        slow_multiple=multiple,
    )
    frames = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
    encoded = encoder(frames, source_fps=2)
    plan = encoded.plan
    assert plan.frame_types[0] == 0 and 1 <= len(plan) <= min(count, max(1, encoder.max_tokens // low))
    assert plan.tokens == len(encoded.pixel_values) // 4 == int(plan.tokens_per_frame.sum()) <= encoder.max_tokens
    assert encoded.grid_thw.tolist() == [[1, h // 14, w // 14] for h, w in plan.frame_sizes]
    assert VideoPlan.from_json(plan.to_json()) == plan and plan == encoder.plan(frames, source_fps=2)


def test_sizes_follow_what_frames_add():
    plan = SlowFastEncoder(**SMALL, policy="ladder").plan(moving(40), source_fps=2)
    adds = 1 - plan.similarity[1:]
    tokens = plan.tokens_per_frame[1:].double()
    assert len(plan.tokens_per_frame.unique()) > 2 and len(plan) < 40 and plan.tokens > 0.95 * 400
    assert float(np.corrcoef(adds.numpy(), tokens.numpy())[0, 1]) > 0.5
    assert re.search(r"\d+ of \d+ frames are left out and others have fewer tokens", plan.warnings[-1])
    slow, fast = (plan.tokens_per_frame[plan.frame_types == kind] for kind in (0, 1))
    assert int(slow.min()) >= 4 * int(fast.max())


def test_a_still_clip_costs_one_frame():
    plan = SlowFastEncoder(policy="ladder").plan(moving(1).repeat(30, 1, 1, 1), source_fps=2)
    assert plan.frame_indices.tolist() == [0] and not plan.warnings
    assert plan.span == (0.0, 15.0) and plan.frame_ends.tolist() == [15.0]  # the frame lasts to the end of the clip
    assert VideoPlan.from_json(plan.to_json()).span == plan.span


@pytest.mark.parametrize("step", [1, 3, 8])
def test_decisions_do_not_depend_on_batches(step):
    limits = Limits((168, 224), 0.3, 8, 64, 400, multiple=4)
    found = []
    for size in (step, 40):
        classifier = FrameClassifier(get_measure("patch_l1"), Ladder(0.6), limits, frames=40)
        for batch in moving(40).split(size):
            assert classifier.step(batch) == ([], [])
        found.append(classifier.finish())
    assert found[0].levels == found[1].levels and found[0].positions == found[1].positions
    assert found[0].scores[1:] == found[1].scores[1:]


def test_a_stream_keeps_to_the_budget_and_near_the_plan():
    frames = moving(50)
    encoder = SlowFastEncoder(**SMALL, policy="ladder")
    count = encoder.max_tokens // encoder.min_tokens_per_frame  # over which the budget is spread
    decisions = list(encoder.stream(frames))
    assert len(decisions) == 50 and decisions[0].frame_type == 0 and math.isnan(decisions[0].similarity)
    tokens = [height * width // 784 for height, width in (decision.size for decision in decisions)]
    assert [decision.shown for decision in decisions] == [count > 0 for count in tokens]
    assert sum(tokens[:count]) <= 400 and sum(tokens) <= 400
    assert sum(tokens) > 0.7 * 400 and len({count for count in tokens if count}) > 2

    # At what the stream spends, the plan keeps the most; the stream keeps nearly as much of it.
    limits = Limits((168, 224), 0.3, 8, 64, 400, multiple=4)
    walk = Ladder(0.6).walk(get_measure("patch_l1"), limits, 50)
    walk.step(frames)
    information = [[new * share for share in kept] for new, kept in zip(walk.novelty, walk.details, strict=True)]
    places = {count: place for place, count in enumerate(walk.steps.tokens)}
    kept = sum(row[places[count]] for row, count in zip(information, tokens, strict=True) if count)
    levels = best_levels(walk.steps.tokens, information, sum(tokens), first=walk.steps.slow)
    best = sum(row[level] for row, level in zip(information, levels, strict=True) if level >= 0)
    assert 0.6 * best <= kept <= 1.02 * best


def test_a_stream_keeps_two_frames(monkeypatch):
    walk = Ladder(0.6).walk(
        get_measure("patch_l1"), Limits((168, 224), 0.3, 8, 64, 400, multiple=4), 50, remember=False
    )
    for frame in moving(20):
        walk.step(frame[None])
    assert walk.novelty == walk.scores == walk.details == []


# --- plans with many sizes in all places that read plans ------------------------------------------------------------


@pytest.fixture(scope="module")
def laddered():
    encoder = SlowFastEncoder(policy="ladder", max_tokens=1_000, fps=5)
    return encoder, encoder(clip("bikes.mp4"))


def test_two_level_plans_are_written_as_before():
    values = SlowFastEncoder().plan(moving(3), source_fps=2).to_dict()
    assert list(values) == [
        "source", "frame_types", "timestamps", "frame_indices", "similarity", "source_size", "slow_size", "fast_size",
        "max_tokens", "duration", "settings", "warnings",
    ]  # fmt: skip


def test_many_sizes_are_read_back_and_checked(laddered, tmp_path):
    _, video = laddered
    plan = video.plan
    plan.save(tmp_path / "plan.json")
    again = VideoPlan.load(tmp_path / "plan.json")
    assert again == plan and again.frame_sizes == plan.frame_sizes and hash(again) == hash(plan)
    assert len(set(plan.frame_sizes)) > 2 and set(plan.frame_sizes) == set(plan.sizes)
    values = plan.to_dict()
    for wrong, said in (
        ({"levels": values["levels"][1:]}, "levels"),
        ({"levels": [len(plan.sizes), *values["levels"][1:]]}, r"levels\[0\]"),
        ({"sizes": [[1, 2], *values["sizes"][1:]]}, r"sizes\[0\]"),
        ({"sizes": []}, "sizes"),
    ):
        with pytest.raises(VideoError, match=said):
            VideoPlan.from_dict({**json.loads(json.dumps(values)), **wrong})
    del values["sizes"]
    with pytest.raises(VideoError, match="sizes are missing or unknown"):
        VideoPlan.from_dict(values)


def test_pixels_and_frames_have_the_sizes_of_the_plan(laddered):
    encoder, video = laddered
    plan = video.plan
    assert [tuple(picture.shape[1:]) for picture in video.pictures()] == plan.frame_sizes
    chosen = encoder.frames(clip("bikes.mp4"))
    assert all(map(torch.equal, chosen.in_order(), video.pictures())) and "many sizes" in repr(chosen)
    resized = encoder.frames(clip("bikes.mp4"), size=84, fast_size=56)
    assert resized.slow.shape[1:] == (3, 84, 84) and resized.fast.shape[1:] == (3, 56, 56)
    assert (len(resized.slow), len(resized.fast)) == plan.counts


def test_a_large_clip_is_read_twice_with_the_same_result(laddered, monkeypatch):
    encoder, video = laddered
    monkeypatch.setattr("keye.slowfast.frame_buffer.FULL_SIZE_BYTES", 0)
    again = encoder(clip("bikes.mp4"))
    assert again.plan == video.plan and torch.equal(again.pixel_values, video.pixel_values)


def test_pages_figures_and_tables_show_the_sizes(laddered, tmp_path):
    _, video = laddered
    plan = video.plan
    slow = plan.tokens_per_frame[plan.frame_types == 0]
    words = f"{int(slow.min())} to {int(slow.max())} tokens"
    assert words in plan.summary() and words in plan.to_html() and words in video._repr_html_()
    assert [row[5] for row in plan.frame_rows()] == [str(count) for count in plan.tokens_per_frame.tolist()]
    plan.plot(tmp_path / "plan.png", video.pictures())
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_adapters_use_the_sizes_or_say_that_they_cannot(laddered):
    encoder, video = laddered
    frames = clip_frames(video, encoder)
    assert [tuple(run.frames.shape[2:]) for run in frames.runs for _ in run.times] == video.plan.frame_sizes
    assert visual_tokens(video.plan, "images") == video.plan.tokens >= visual_tokens(video.plan)
    messages = [{"role": "user", "content": [{"type": "video", "video": clip("bikes.mp4")}]}]
    with pytest.raises(KeyeError, match="more than two sizes"):
        process_vision_info(messages, encoder=encoder)


def test_workers_and_caches_return_the_same_plans(laddered, tmp_path):
    encoder, video = laddered
    for _ in range(2):
        (found,) = encoder.encode_many([clip("bikes.mp4")], workers=1, cache=tmp_path, pixels=True)
        assert found.plan == video.plan and torch.equal(found.pixel_values, video.pixel_values)


def test_impossible_options():
    for spec in ("ladder:price=0", "ladder:price=1", "ladder:step=2"):
        with pytest.raises(KeyeError, match="ladder"):
            SlowFastEncoder(policy=spec)
    assert SlowFastEncoder(policy="ladder:price=0.001").settings["policy"] == "ladder:price=0.001"
    assert SlowFastEncoder(policy="ladder").with_settings(threshold=0.5).policy.threshold == 0.5
