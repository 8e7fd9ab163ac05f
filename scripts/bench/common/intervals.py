"""Intervals of paired differences by bootstrap."""

from collections.abc import Sequence

import numpy as np

DRAWS = 10_000


def paired_interval(
    difference: np.ndarray, units: Sequence[str] | None = None, counts: np.ndarray | None = None, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences [n], by bootstrap.

    Args:
        difference: one minus the other, of every item.
        units: the unit that is drawn for each item; items that depend on each other have one unit (default: each item
            is its own).
        counts: how many each item counts for in the denominator (default 1); `difference` is then their sum.
        seed: of the draws.
    """
    difference = np.asarray(difference, dtype=float)
    counts = np.ones(len(difference)) if counts is None else np.asarray(counts, dtype=float)
    of = np.arange(len(difference)) if units is None else np.unique(np.asarray(units), return_inverse=True)[1]
    sums, sizes = (np.bincount(of, weights=values) for values in (difference, counts))
    picks = np.random.default_rng(seed).integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[picks].sum(1) / np.maximum(sizes[picks].sum(1), 1e-9)
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))
