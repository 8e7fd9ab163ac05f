"""The pathways against the published numbers, numpy's linspace and poolings written as loops."""

import math

import numpy as np
import pytest
import torch

from keye.aggregation import (
    Pooling,
    SlowFastAggregation,
    aggregate,
    block_tokens,
    make_blocks,
    sample_frames,
    slow_indices,
)
from keye.errors import KeyeError

LITERAL = {
    1: [0] * 10,
    4: [0, 0, 0, 1, 1, 2, 2, 2, 3, 3],
    9: [0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
    12: [0, 1, 2, 3, 4, 6, 7, 8, 9, 10],
    49: [0, 4, 9, 14, 19, 24, 29, 34, 39, 44],
    50: [0, 5, 10, 15, 20, 25, 30, 35, 40, 45],
}


@pytest.mark.parametrize("frames", LITERAL)
def test_slow_indices_are_the_published_ones(frames):
    assert slow_indices(frames) == LITERAL[frames]


@pytest.mark.parametrize("slow", [1, 3, 8, 10, 32])
def test_slow_indices_are_linspace_truncated(slow):
    for frames in range(1, 300):
        exact = [math.floor(value + 1e-9) for value in np.linspace(0, frames, slow + 1)[:-1]]
        assert slow_indices(frames, slow) == exact


def test_frames_are_sampled_at_the_middle_of_segments():
    found = sample_frames(1500)
    assert found[:2] == [15, 45] and found[-1] == 1484 and len(found) == 50
    for total in (1, 7, 50, 333):
        bounds = [round(value) for value in np.linspace(0, total - 1, 51)]
        middles = [(a + b) // 2 for a, b in zip(bounds, bounds[1:], strict=False)]
        assert sample_frames(total) == middles and max(middles) < total


@pytest.mark.parametrize(("frames", "tokens"), [(50, 3680), (1, 2896), (4, 2944), (12, 3072)])
def test_released_tokens(frames, tokens):
    assert SlowFastAggregation.released().tokens(frames, 24, 24) == tokens


def test_trained_tokens():
    assert SlowFastAggregation.trained().tokens(128, 24, 24) == 9216


def test_released_pooling_equals_a_computation_by_hand():
    features = torch.randn(50, 24, 24, 8, generator=torch.Generator().manual_seed(0))
    found = SlowFastAggregation.released()(features)
    tokens = features.numpy().reshape(50, 576, 8)
    slow = [np.maximum(tokens[i, 0::2], tokens[i, 1::2]) for i in LITERAL[50]]
    fast = [
        features.numpy()[t, 6 * r : 6 * r + 6, 6 * c : 6 * c + 6].reshape(36, 8).astype(np.float64).mean(0)
        for t in range(50)
        for r in range(4)
        for c in range(4)
    ]
    expected = np.concatenate([*slow, np.stack(fast)])
    assert found.shape == (3680, 8)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_list_pooling_straddles_rows_of_an_odd_grid_and_grid_pooling_does_not():
    features = torch.arange(15.0).view(1, 3, 5, 1)
    straddled = SlowFastAggregation(slow=1, slow_pool=Pooling("list", factor=(1, 2)), fast_pool=None)(features)
    assert straddled[:, 0].tolist() == [1, 3, 5, 7, 9, 11, 13]  # 5 = max(4, 5): the end of row 0 and row 1
    whole = SlowFastAggregation(slow=1, slow_pool=Pooling("max", factor=(1, 2)), fast_pool=None)(features)
    assert whole[:, 0].tolist() == [1, 3, 4, 6, 8, 9, 11, 13, 14]


def bins(length: int, parts: int) -> list[slice]:
    return [slice(i * length // parts, -(-(i + 1) * length // parts)) for i in range(parts)]


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_any_grid_and_aspect_equals_loops_over_bins(kind):
    generator = np.random.default_rng(1)
    for _ in range(30):
        height, width = (int(n) for n in generator.integers(1, 12, 2))
        rows, columns = int(generator.integers(1, height + 1)), int(generator.integers(1, width + 1))
        features = torch.tensor(generator.normal(size=(2, height, width, 3)), dtype=torch.float32)
        made = SlowFastAggregation(slow=0, slow_pool=None, fast_pool=Pooling(kind, size=(rows, columns)))
        reduce = np.mean if kind == "mean" else np.max
        expected = [
            reduce(features[t, r, c].numpy().reshape(-1, 3), axis=0)
            for t in range(2)
            for r in bins(height, rows)
            for c in bins(width, columns)
        ]
        np.testing.assert_allclose(made(features).numpy(), np.stack(expected), atol=1e-6)


def test_time_layout_has_the_tokens_of_the_other_in_another_order():
    features = torch.randn(7, 4, 6, 5, generator=torch.Generator().manual_seed(2))
    both = SlowFastAggregation(slow=3, slow_pool=None, fast_pool=Pooling(size=(2, 2)))
    by_time = SlowFastAggregation(slow=3, slow_pool=None, fast_pool=Pooling(size=(2, 2)), layout="time")
    slow, fast = both(features).split([3 * 24, 7 * 4])
    slow, fast = dict(zip(slow_indices(7, 3), slow.split(24), strict=True)), fast.split(4)
    expected = [part for t in range(7) for part in ([slow[t]] if t in slow else []) + [fast[t]]]
    assert torch.equal(by_time(features), torch.cat(expected))


def test_never_over_budget():
    generator = np.random.default_rng(3)
    for _ in range(200):
        frames, height, width, budget = (int(generator.integers(1, most)) for most in (60, 20, 20, 400))
        pools = [None, Pooling("list", factor=(1, 2)), Pooling("max", factor=(2, 3)), Pooling(size=(3, 4))]
        slow = int(generator.integers(1, 12))
        slow_pool, fast_pool = pools[generator.integers(4)], pools[generator.integers(1, 4)]
        fast_pool = None if generator.random() < 0.2 else fast_pool
        made = SlowFastAggregation(slow, slow_pool, fast_pool, max_tokens=budget)
        blocks = made.blocks(frames, height, width)
        assert 1 <= int(block_tokens(blocks).sum()) <= budget
        assert len(made(torch.randn(frames, height, width, 2))) == int(block_tokens(blocks).sum())


def test_a_budget_that_does_not_bind_changes_nothing():
    free, bound = SlowFastAggregation.released(), SlowFastAggregation.released(max_tokens=3680)
    assert torch.equal(free.blocks(50, 24, 24), bound.blocks(50, 24, 24))
    assert SlowFastAggregation.released(max_tokens=3679).tokens(50, 24, 24) <= 3679


def test_means_of_bfloat16_are_summed_in_float32():
    features = torch.full((1, 40, 40, 1), 1.0).bfloat16()
    features[0, 0, 0] = 257.0  # bfloat16 cannot count above 256 in ones
    found = SlowFastAggregation(slow=0, slow_pool=None, fast_pool=Pooling(size=(1, 1)))(features)
    assert found.dtype == torch.bfloat16
    exact = features.double().mean()
    assert abs(float(found) - float(exact)) <= 2**-8 * float(exact)


def test_gradients_reach_each_frame_once_per_use():
    features = torch.randn(4, 4, 4, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    features.requires_grad_()
    made = SlowFastAggregation(slow=2, slow_pool=None, fast_pool=Pooling(size=(1, 1)))
    made(features).sum().backward()
    expected = torch.full_like(features, 1 / 16)
    expected[[0, 2]] += 1  # the slow frames are read twice
    torch.testing.assert_close(features.grad, expected, atol=1e-6, rtol=0)


def test_blocks_of_several_videos_join():
    generator = torch.Generator().manual_seed(5)
    videos = [torch.randn(t, h, w, 3, generator=generator) for t, h, w in ((3, 4, 6), (2, 5, 2))]
    made = SlowFastAggregation(slow=2, slow_pool=Pooling("max", factor=(1, 2)), fast_pool=Pooling(size=(2, 2)))
    blocks = torch.cat([made.blocks(*video.shape[:3]) for video in videos])
    grids = torch.tensor([[4, 6]] * 3 + [[5, 2]] * 2)
    together = aggregate(torch.cat([video.flatten(0, 2) for video in videos]), grids, blocks)
    assert torch.equal(together, torch.cat([made(video) for video in videos]))


def test_mistakes_are_named():
    with pytest.raises(KeyeError, match="factor or a size"):
        Pooling()
    for value in (2, (2, 2, 2)):
        with pytest.raises(KeyeError, match=r"two whole numbers, \(rows, columns\)"):
            Pooling("mean", factor=value)
    with pytest.raises(KeyeError, match="slow_pool is 'max'; give a Pooling"):
        SlowFastAggregation(slow_pool="max")
    with pytest.raises(KeyeError, match="frames, rows, columns, channels"):
        SlowFastAggregation()(torch.zeros(5, 576, 8))
    with pytest.raises(KeyeError, match="use mean, max or list"):
        Pooling("median", size=(1, 1))
    with pytest.raises(KeyeError, match="fast_pool"):
        SlowFastAggregation(slow=0, fast_pool=None)
    with pytest.raises(KeyeError, match="frame 3 of a video of 3"):
        make_blocks(3, [(3, 1, 1, 0)])
    blocks = make_blocks(2, [(0, 5, 5, 0)])
    with pytest.raises(KeyeError, match="describe 2 encoded frames and 1"):
        aggregate(torch.zeros(16, 2), torch.tensor([[4, 4]]), blocks)
    with pytest.raises(KeyeError, match="cannot be pooled to 5x5"):
        aggregate(torch.zeros(32, 2), torch.tensor([[4, 4]] * 2), blocks)
