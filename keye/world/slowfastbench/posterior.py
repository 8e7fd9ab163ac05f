"""How probable what happened is, given log-likelihoods of lit lamps in half seconds, under the rules of the schedules.

Events are intervals of `length` half seconds with at least `gap` free ones between them, from half second 1 on. All
placements are equally likely. `gains` are the log-likelihoods of events by their start, which `gains_of` sums.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from keye.world.slowfastbench.schedules import PERIODS, RATES, RING

NEVER = -np.inf


def log_sum(values: np.ndarray, axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    """The logarithm of the sum of exponentials."""
    top = values.max(axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        found = np.log(np.exp(values - top).sum(axis=axis, keepdims=True)) + top
    return found.reshape(()) if axis is None else np.squeeze(found, axis)


def gains_of(lit: np.ndarray, length: int) -> np.ndarray:
    """Log-likelihoods [..., cells] of an event of `length` cells by its start; `NEVER` where it has no room.

    Args:
        lit: log-likelihood ratio of a lit to a dark lamp, [..., cells].
    """
    total = np.concatenate([np.zeros((*lit.shape[:-1], 1)), lit.cumsum(-1)], -1)
    found = np.full(lit.shape, NEVER)
    last = lit.shape[-1] - length
    if last >= 1:
        found[..., 1 : last + 1] = total[..., 1 + length :] - total[..., 1 : last + 1]
    return found


def one_event(lit: np.ndarray, length: int) -> np.ndarray:
    """Log-likelihoods [...] of one event of `length` cells anywhere in [..., cells]."""
    gains = gains_of(lit, length)
    return log_sum(gains, -1) - math.log(max(1, int(np.isfinite(gains.reshape(-1, gains.shape[-1])[0]).sum())))


def _until(gains: np.ndarray, step: int) -> np.ndarray:
    """Log-sums over starts of an event: place t has the starts of at most t - step, so that the next may begin at t."""
    found = np.full(len(gains), NEVER)
    found[step:] = np.logaddexp.accumulate(gains)[: len(gains) - step]
    return found


def numbers_of_events(lit: np.ndarray, most: int, length: int, gap: int) -> np.ndarray:
    """Log-likelihoods [most] of 1 to `most` events in the cells of one lamp, summed over their placements."""
    gains = gains_of(lit, length)
    before, found = np.zeros(len(lit)), []
    for _ in range(most):
        found.append(float(log_sum(before + gains)))
        before = _until(before + gains, length + gap)
    return np.array(found)


def nth_event(gains: Sequence[np.ndarray], length: int, gap: int, nth: int) -> np.ndarray:
    """Log-likelihoods [places] that event `nth` is that of each place, where every place has one event.

    Args:
        gains: of every place, [cells] each.
        nth: 0 for the first event.
    """
    step, places = length + gap, range(len(gains))
    backwards = [row[::-1] for row in gains]

    @functools.cache
    def before(events: frozenset[int], reverse: bool) -> np.ndarray:
        """Log-sums over the placements of `events` before an event that starts at t (after one, if reversed)."""
        rows = backwards if reverse else gains
        if not events:
            return np.zeros(len(rows[0]))
        parts = [_until(before(events - {place}, reverse) + rows[place], step) for place in events]
        return functools.reduce(np.logaddexp, parts)

    found = np.full(len(gains), NEVER)
    for place in places:
        others = [other for other in places if other != place]
        for first in itertools.combinations(others, nth):
            after = before(frozenset(others) - frozenset(first), True)[::-1]
            found[place] = np.logaddexp(found[place], log_sum(before(frozenset(first), False) + gains[place] + after))
    return found


def nth_text(gains: np.ndarray, length: int, gap: int, events: int, nth: int) -> np.ndarray:
    """Log-likelihoods [texts] of the text of event `nth` of `events`; gains: [texts, cells]."""
    step, any_text = length + gap, log_sum(gains, 0)
    before, after = np.zeros(gains.shape[1]), np.zeros(gains.shape[1])
    for _ in range(nth):
        before = _until(before + any_text, step)
    for _ in range(events - 1 - nth):
        after = _until(after + any_text[::-1], step)
    return log_sum(gains + before + after[::-1], 1)


def assignments(table: np.ndarray) -> Iterator[tuple[tuple[int, ...], float]]:
    """All assignments of places to columns with their log-likelihoods; table: [places, columns]."""
    places = range(len(table))
    for columns in itertools.permutations(range(table.shape[1]), len(table)):
        yield columns, float(sum(table[place, column] for place, column in zip(places, columns, strict=True)))


def assigned(table: np.ndarray) -> np.ndarray:
    """Log-likelihoods [places, columns] that a place has a column, where every place has another; table: the same."""
    found = np.full(table.shape, NEVER)
    for columns, value in assignments(table):
        for place, column in enumerate(columns):
            found[place, column] = np.logaddexp(found[place, column], value)
    return found


def across_cut(lit: np.ndarray, states: Sequence[tuple[int, int]]) -> np.ndarray:
    """Log-likelihoods [places, kinds] that a lamp has the states of a kind before and after the cut; lit: [P, cells].

    The cut is anywhere in the middle half, at one time for all places, and every place has another kind.
    """
    cells = lit.shape[1]
    total = np.concatenate([np.zeros((len(lit), 1)), lit.cumsum(1)], 1)
    cuts = np.arange(cells // 4, cells - cells // 4 + 1)
    table = np.stack(
        [before * total[:, cuts] + after * (total[:, -1:] - total[:, cuts]) for before, after in states], 1
    )
    return _jointly(table)


def _jointly(table: np.ndarray) -> np.ndarray:
    """Log-likelihoods [places, kinds] summed over what all places have in common; table: [places, kinds, N]."""
    found = np.full(table.shape[:2], NEVER)
    for kinds in itertools.permutations(range(table.shape[1])):
        value = log_sum(sum(table[place, kind] for place, kind in enumerate(kinds)))
        for place, kind in enumerate(kinds):
            found[place, kind] = np.logaddexp(found[place, kind], value)
    return found


def blinking(lit: np.ndarray) -> np.ndarray:
    """Log-likelihoods [places, periods] of the period with which each lamp blinks; lit: [places, cells]."""
    cells, tables = lit.shape[1], []
    for length in sorted({min(length, cells - 1) for length in range(16, 25)}):
        steps = np.arange(length)
        masks = [(steps % period < period // 2).astype(float) for period in PERIODS.values()]
        tables.append([[np.correlate(row[1:], mask, "valid") for mask in masks] for row in lit])
    return _jointly(np.concatenate([np.array(table) for table in tables], -1))


def turning(states: np.ndarray) -> np.ndarray:
    """Log-likelihoods [places, rates] of the rate at which each dial turns; states: [places, cells, 8]."""
    cells = states.shape[1]
    total = np.concatenate([np.zeros_like(states[:, :1]), states.cumsum(1)], 1)
    tables = []
    lengths = sorted({min(length, cells - 1) for length in range(8, 17)})
    for rate in RATES.values():
        # Column j of the turned states is the path that is in state j at cell 0 if it turned all the time.
        path = (np.arange(8)[None] + rate * np.arange(cells)[:, None]) % 8
        turned = np.take_along_axis(states, path[None].repeat(len(states), 0), 2)
        turned = np.concatenate([np.zeros_like(turned[:, :1]), turned.cumsum(1)], 1)
        columns = []
        for length in lengths:
            start = np.arange(1, cells - length + 1)
            first = np.arange(8)[:, None]
            begun = (first - rate * (start - 1)) % 8  # the path that is in state `first` before the first step
            during = turned[:, start + length, begun] - turned[:, start, begun]
            after = (first + rate * length) % 8
            value = total[:, start, first] + during + total[:, cells, after] - total[:, start + length, after]
            columns.append(log_sum(value, 1))
        tables.append(np.concatenate(columns, 1))
    return _jointly(np.stack(tables, 1))


def going_round(states: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Log-likelihoods [places, 2] that each disc goes round clockwise or counter-clockwise; both do so at one time.

    Args:
        states: [places, cells, 6].
        lengths: cells for which a disc may stay at a place of its ring.
    """
    cells = states.shape[1]
    total = np.concatenate([np.zeros_like(states[:, :1]), states.cumsum(1)], 1)
    ways = []
    for way in (1, -1):
        parts = []
        for length in lengths:
            start = np.arange(1, cells - RING * length + 2)
            value = total[:, start, 0] + total[:, -1:, 0] - total[:, start + (RING - 1) * length, 0]
            for step in range(1, RING):
                ends = start + step * length
                value = value + total[:, ends, way * step % RING] - total[:, ends - length, way * step % RING]
            parts.append(value)
        ways.append(np.concatenate(parts, 1))
    return _jointly(np.stack(ways, 1))
