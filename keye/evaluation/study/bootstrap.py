"""95 % intervals by bootstrap over groups of questions, and over seeds of a model at the same time.

scipy.stats.bootstrap resamples one axis; here groups and seeds are crossed. With one seed the results are equal
(tests/keye/evaluation/study/test_bootstrap.py).
"""

import functools

import numpy as np

DRAWS = 4000
LEVEL = 0.95


def interval(total: np.ndarray, count: np.ndarray, draws: int = DRAWS, seed: int = 0) -> tuple[float, float, float]:
    """The mean of a quantity of questions with its percentile interval.

    A draw takes groups with replacement, and seeds with replacement, and divides the sum by the number of questions.

    Args:
        total: the sum over the questions of a group under a seed, float64 [S, G]: correct answers, or the difference of
            two settings' correct answers, which makes the interval a paired one.
        count: questions of a group under a seed, [S, G].
        draws: resamples.
        seed: of the resamples.

    Returns:
        (mean, lower end, upper end); the ends are NaN if there is only one group.
    """
    total, count = np.atleast_2d(np.asarray(total, float)), np.atleast_2d(np.asarray(count, float))
    seeds, groups = total.shape
    mean = float(total.sum() / count.sum())
    if groups < 2:
        return mean, float("nan"), float("nan")
    of_groups, of_seeds = _weights(groups, draws, seed), _weights(seeds, draws, seed + 1)
    tops, bottoms = (np.einsum("ds,ds->d", of_seeds, of_groups @ part.T) for part in (total, count))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(tops / bottoms, [tail, 100 - tail])
    return mean, float(low), float(high)


@functools.lru_cache(maxsize=32)
def _weights(number: int, draws: int, seed: int) -> np.ndarray:
    """How often each of `number` is drawn, float64 [draws, number]."""
    return np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=draws).astype(float)
