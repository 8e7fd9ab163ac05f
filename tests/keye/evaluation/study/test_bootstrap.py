"""Intervals against scipy's bootstrap, and against all resamples of a small case."""

import itertools

import numpy as np
import pytest
from scipy import stats

from keye.evaluation.study.bootstrap import interval


def test_with_one_seed_the_interval_is_scipys():
    rng = np.random.default_rng(3)
    count = rng.integers(1, 5, 60)
    total = rng.binomial(count, 0.6)
    mean, low, high = interval(total, count, draws=20_000)
    expected = stats.bootstrap(
        (total, count), lambda top, bottom, axis: top.sum(axis) / bottom.sum(axis), paired=True, vectorized=True,
        n_resamples=20_000, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert mean == total.sum() / count.sum()
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.004)


def test_seeds_and_groups_are_resampled_together():
    """All 2^2 x 3^3 resamples of two seeds and three groups, enumerated."""
    total = np.array([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
    count = np.array([[2.0, 2.0, 4.0], [2.0, 2.0, 4.0]])
    ratios = [
        sum(total[s, g] for s in seeds for g in groups) / sum(count[s, g] for s in seeds for g in groups)
        for seeds in itertools.product(range(2), repeat=2)
        for groups in itertools.product(range(3), repeat=3)
    ]
    mean, low, high = interval(total, count, draws=40_000)
    assert mean == 7 / 16
    assert low == pytest.approx(np.percentile(ratios, 2.5), abs=0.02)
    assert high == pytest.approx(np.percentile(ratios, 97.5), abs=0.02)


def test_a_paired_interval_is_narrow_where_settings_differ_in_few_questions():
    rng = np.random.default_rng(0)
    one = rng.integers(0, 2, 200)
    other = one.copy()
    other[:4] = 1 - other[:4]
    difference, low, high = interval(one - other, np.ones(200))
    assert difference == (one - other).mean() and high - low < 0.05
    assert interval(np.ones(1), np.ones(1))[0] == 1 and np.isnan(interval(np.ones(1), np.ones(1))[1])
