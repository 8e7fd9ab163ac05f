"""Rank correlations with intervals."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

DRAWS = 2000


def spearman(one: np.ndarray, other: np.ndarray, parts: Sequence[str] | None = None) -> float:
    """Rank correlation with mean ranks of ties; NaN if one is constant.

    parts: the part of each pair; the means of parts are removed from the ranks, so that only differences within parts
        count.
    """
    ranks = [rankdata(np.asarray(values, dtype=float)) for values in (one, other)]
    if parts is not None:
        _, of = np.unique(np.asarray(parts), return_inverse=True)
        sizes = np.bincount(of)
        ranks = [rank - (np.bincount(of, weights=rank) / sizes)[of] for rank in ranks]
    return float(np.corrcoef(*ranks)[0, 1]) if all(rank.std() > 1e-9 for rank in ranks) else float("nan")


def spearman_interval(
    one: np.ndarray, other: np.ndarray, parts: Sequence[str] | None = None, draws: int = DRAWS
) -> tuple[float, float]:
    """The 95 % interval of `spearman` by bootstrap over pairs."""
    generator = np.random.default_rng(0)
    names = None if parts is None else np.asarray(parts)
    found = [
        spearman(one[at], other[at], None if names is None else names[at])
        for at in generator.integers(0, len(one), (draws, len(one)))
    ]
    valid = [value for value in found if value == value]  # a draw may have no wrong answer
    low, high = np.percentile(valid, [2.5, 97.5]) if valid else (float("nan"), float("nan"))
    return float(low), float(high)


def deciles(score: np.ndarray, wrong: np.ndarray, bins: int = 10) -> float:
    """Rank correlation of the mean score and the error rate of ten groups of equal size, ordered by score."""
    parts = np.array_split(np.argsort(score, kind="stable"), bins)
    return spearman(*(np.array([array[part].mean() for part in parts]) for array in (score, wrong)))
