"""Sizes of slow and fast frames under a token budget; the total after rounding never exceeds the budget.

A token is a square of pixels, 28x28 in Keye-VL (2x2 vision patches of 14). Sizes follow the usual "smart resize":
aspect kept, sides rounded to multiples of a token, scaled into the allowed range (report §3.1; keye-vl-utils 1.5.2).
They equal the release's where the budget does not limit them. Where it does, the release returns the first size *over*
the budget; here pairs of a slow and a fast grid with an aspect near the picture's are compared, and the best pair whose
actual total fits is taken.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

PATCH = 14
SIDE = 28  # pixels along one side of a token
LEAST_FAST = 4
"""Tokens of the smallest fast frames; up to twice as many where the aspect ratio needs them (6 for 16:9)."""

Grid = tuple[int, int, int]
"""(tokens, rows, columns)"""


@dataclass(frozen=True)
class Allocation:
    """Sizes (height, width) in pixels of the slow and the fast frames, and the tokens of the video."""

    slow_size: tuple[int, int]
    fast_size: tuple[int, int]
    tokens: int


def size_tokens(size: tuple[int, int], side: int = SIDE) -> int:
    """Tokens of one frame of `size` (height, width), both multiples of `side`."""
    return (size[0] // side) * (size[1] // side)


def fit_size(height: int, width: int, min_tokens: int, max_tokens: int, side: int = SIDE) -> tuple[int, int]:
    """The size (height, width), multiples of `side`, nearest to the given one with `min_tokens` to `max_tokens` tokens.

    The aspect ratio is kept as closely as the grid allows. Both limits always hold, so extreme aspects, or a range as
    narrow as [7, 7], change the aspect.

    Raises:
        ValueError: a side is below 1 pixel, or the range of tokens is empty.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a frame of {height}x{width} pixels has no area")
    if not 1 <= min_tokens <= max_tokens:
        raise ValueError(f"the range of {min_tokens} to {max_tokens} tokens per frame is empty")
    rows, columns = max(1, round(height / side)), max(1, round(width / side))
    if rows * columns > max_tokens:
        # In the release's order of operations: where a side is near a multiple of 28, the last bit decides.
        shrink = math.sqrt((height * width) / (max_tokens * side * side))
        rows, columns = max(1, math.floor(height / shrink / side)), max(1, math.floor(width / shrink / side))
    elif rows * columns < min_tokens:
        scale = math.sqrt(min_tokens * side * side / (height * width))
        rows, columns = max(1, math.ceil(height * scale / side)), max(1, math.ceil(width * scale / side))
    if not min_tokens <= rows * columns <= max_tokens:
        rows, columns = _nearest_grid(height / width, min_tokens, max_tokens)
    return rows * side, columns * side


def _nearest_grid(aspect: float, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """The grid within the token range whose rows / columns is nearest to `aspect`, on a logarithmic scale."""
    best, best_error = (1, min_tokens), math.inf
    for rows in range(1, max_tokens + 1):
        fewest, most = -(-min_tokens // rows), max_tokens // rows
        if fewest > most:
            continue
        columns = min(max(round(rows / aspect), fewest), most)
        error = abs(math.log(rows / columns / aspect))
        if error < best_error:
            best, best_error = (rows, columns), error
    return best


@lru_cache(maxsize=256)
def near_grids(height: int, width: int, min_tokens: int, max_tokens: int) -> tuple[Grid, ...]:
    """The grids of `min_tokens` to `max_tokens` whose aspect is 5/6 to 6/5 of the picture's, by ascending tokens.

    One row more or less changes the aspect of a frame of six rows by this much; at 48 tokens plain resizing may change
    it by more.
    """
    grids = []
    fewest = math.isqrt(5 * min_tokens * height // (6 * width))
    for rows in range(max(1, fewest), math.isqrt(6 * max_tokens * height // (5 * width)) + 1):
        first = max(1, -(-5 * rows * width // (6 * height)), -(-min_tokens // rows))
        last = min(6 * rows * width // (5 * height), max_tokens // rows)
        grids += [(rows * columns, rows, columns) for columns in range(first, last + 1)]
    return tuple(sorted(grids))


def aspect_error(height: int, width: int, grid: Grid) -> float:
    """The ratio of a grid's aspect to the picture's, or its inverse: 1 or more."""
    one, other = grid[1] * width, grid[2] * height
    return max(one, other) / min(one, other)


def fast_limit(slow_tokens: int, ratio: float, min_tokens: int) -> int:
    """Most tokens of a fast frame where slow frames have `slow_tokens` (report: 30 %)."""
    return max(int(ratio * slow_tokens), min_tokens)


def allocate(
    height: int,
    width: int,
    slow: int,
    fast: int,
    *,
    ratio: float,
    min_tokens: int,
    max_tokens_per_frame: int,
    max_tokens: int,
    side: int = SIDE,
    fast_tokens: int | None = None,
) -> Allocation:
    """The sizes of `slow` + `fast` frames of `height` x `width` pixels whose total is at most `max_tokens`.

    The largest sizes are taken if they fit. Otherwise the candidates are pairs of `near_grids`, and the plain sizes
    that the release's binary search would find if it kept to the budget. Pairs that spend 98 % of the budget are
    preferred; a pair that spends less is taken only if it spends no less than the plain sizes. Among the remaining
    pairs the one with the least loss is taken. The loss is a product of factors of 1 or more: both grids' aspect
    errors, a fast frame's limit over its tokens, and the square of the budget over the total (squared, or else a row
    whose aspect error equals what it spends would never be added).

    Args:
        ratio: most tokens of a fast frame over those of a slow one, see `fast_limit`.
        min_tokens, max_tokens_per_frame: range of a slow frame's tokens; `min_tokens` applies to fast frames, too.
        max_tokens: the budget.
        side: pixels along a token.
        fast_tokens: fast frames get at most so many tokens and nearly as many, whatever `ratio` and `min_tokens` are.

    Raises:
        ValueError: frames of `min_tokens` exceed the budget; reduce them to `most_frames` first.
    """
    if slow + fast < 1 or min(slow, fast) < 0:
        raise ValueError(f"{slow} slow and {fast} fast frames are no video; give at least one frame")
    fixed = None if fast_tokens is None else pooled_size(height, width, fast_tokens, side)
    least = slow * min_tokens + fast * (size_tokens(fixed, side) if fixed else min_tokens)
    if least > max_tokens:
        raise ValueError(f"{slow + fast} frames take {least} tokens at least, which exceeds the budget of {max_tokens}")
    problem = _Problem(height, width, slow, fast, ratio, min_tokens, max_tokens_per_frame, max_tokens, side, fixed)
    largest = problem.plain(max_tokens_per_frame)
    return largest if largest.tokens <= max_tokens else problem.fill()


def bounds(
    height: int,
    width: int,
    slow: int,
    frames: int,
    *,
    ratio: float,
    min_tokens: int,
    max_tokens_per_frame: int,
    max_tokens: int,
    side: int = SIDE,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Upper bounds (height, width) of slow and of fast frames if at least `slow` (1 or more) of `frames` are slow.

    For keeping frames before all types are known. `allocate` for `slow` slow frames is no such bound: with one slow
    frame more it may choose more rows and fewer columns.
    """
    spare = max_tokens - frames * min_tokens
    slow_tokens = min(max_tokens_per_frame, min_tokens + max(spare, 0) // slow)
    # Where a fast frame is above the minimum, slow frames have at least 1 / ratio times its tokens.
    all_as_fast = slow / ratio + frames - slow
    fast_tokens = min(fast_limit(slow_tokens, ratio, min_tokens), max(min_tokens, int(max_tokens / all_as_fast + 1e-6)))
    return tuple(box(height, width, tokens, min_tokens, side) for tokens in (slow_tokens, fast_tokens))


def box(height: int, width: int, tokens: int, min_tokens: int, side: int = SIDE) -> tuple[int, int]:
    """The longest sides (height, width) of the sizes of `min_tokens` to `tokens` tokens that are used for a clip."""
    odd = _odd_sizes(height, width, min_tokens, side)[min(tokens, 4 * min_tokens) - min_tokens]
    sides = _longest(height, width, tokens) * side, _longest(width, height, tokens) * side
    return max(odd[0], sides[0]), max(odd[1], sides[1])


def _longest(one: int, other: int, tokens: int) -> int:
    """Most tokens along side `one` of a grid of `tokens` that is near the aspect, or off by rounding only."""
    near = math.isqrt(6 * tokens * one // (5 * other))
    # Rounding makes the other side at most a token shorter and this side at most a token longer than the aspect says:
    # rounded <= (short + 1) * aspect + 1, and rounded * short <= tokens.
    aspect = one / other
    short = (math.sqrt((aspect + 1) ** 2 + 4 * aspect * tokens) - aspect - 1) / (2 * aspect)
    return max(near, int(tokens / max(short, 1.0) + 1e-6))


@lru_cache(maxsize=64)
def _odd_sizes(height: int, width: int, min_tokens: int, side: int) -> list[tuple[int, int]]:
    """The longest sides of the plain sizes with at most `min_tokens`, one more, … four times as many tokens.

    This near the minimum, a range of tokens may be so narrow that its grids are further off in aspect.
    """
    longest = [(1, 1)] * (3 * min_tokens + 1)
    for limit in range(min_tokens, 4 * min_tokens + 1):
        size = fit_size(height, width, min_tokens, limit, side)
        place = size_tokens(size, side) - min_tokens
        longest[place] = (max(longest[place][0], size[0]), max(longest[place][1], size[1]))
    return list(accumulate(longest, lambda one, other: (max(one[0], other[0]), max(one[1], other[1]))))


def pooled_size(height: int, width: int, tokens: int, side: int) -> tuple[int, int]:
    """The size of at most `tokens` tokens with the least loss of tokens and aspect, of 98 % of them if possible."""
    return _size_of_least(
        height, width, 1, tokens, side, lambda found, error: (found * 50 < tokens * 49, error * (tokens / found))
    )


def best_size(height: int, width: int, least: int, most: int, side: int) -> tuple[int, int]:
    """The size of `least` to `most` tokens that loses least of tokens (squared) and aspect, of 98 % if possible."""
    return _size_of_least(
        height, width, least, most, side, lambda found, error: (found * 50 < most * 49, error * (most / found) ** 2)
    )


def smallest_size(height: int, width: int, least: int, most: int, side: int) -> tuple[int, int]:
    """The size of `least` to `most` tokens with the least product of tokens and error of the aspect."""
    return _size_of_least(height, width, least, most, side, lambda found, error: (error * found, found))


def _size_of_least(
    height: int, width: int, least: int, most: int, side: int, loss: Callable[[int, float], tuple[float, ...]]
) -> tuple[int, int]:
    """The size of `least` to `most` tokens with the least loss, a function of its tokens and its aspect error."""
    plain = _grid(fit_size(height, width, least, most, side), side)
    grids = [plain, *near_grids(height, width, least, most)]
    _, rows, columns = min(grids, key=lambda grid: (*loss(grid[0], aspect_error(height, width, grid)), grid))
    return rows * side, columns * side


def _grid(size: tuple[int, int], side: int) -> Grid:
    return size_tokens(size, side), size[0] // side, size[1] // side


@dataclass(frozen=True)
class _Problem:
    """The arguments of `allocate`; fast_size: size of the fast frames, where it is fixed."""

    height: int
    width: int
    slow: int
    fast: int
    ratio: float
    min_tokens: int
    max_tokens_per_frame: int
    max_tokens: int
    side: int
    fast_size: tuple[int, int] | None

    def fast_limit(self, slow_tokens: int) -> int:
        if self.fast_size is not None:
            return size_tokens(self.fast_size, self.side)
        return fast_limit(slow_tokens, self.ratio, self.min_tokens)

    def plain_fast(self, limit: int) -> tuple[int, int]:
        return self.fast_size or fit_size(self.height, self.width, self.min_tokens, limit, self.side)

    def plain(self, limit: int) -> Allocation:
        """The sizes of plain resizing for slow frames of at most `limit` tokens."""
        slow_size = fit_size(self.height, self.width, self.min_tokens, limit, self.side)
        return self.allocation(slow_size, self.plain_fast(self.fast_limit(size_tokens(slow_size, self.side))))

    def allocation(self, slow_size: tuple[int, int], fast_size: tuple[int, int]) -> Allocation:
        tokens = self.slow * size_tokens(slow_size, self.side) + self.fast * size_tokens(fast_size, self.side)
        return Allocation(slow_size, fast_size, tokens)

    def best_plain(self) -> Allocation:
        """The largest plain sizes that fit, by binary search on the tokens of a slow frame."""
        best, low, high = self.plain(self.min_tokens), self.min_tokens, self.max_tokens_per_frame
        while high - low > 1:
            middle = (low + high) // 2
            trial = self.plain(middle)
            if trial.tokens <= self.max_tokens:
                low = middle
                best = max(best, trial, key=lambda allocation: allocation.tokens)
            else:
                high = middle
        return best

    def fill(self) -> Allocation:
        """The pair of grids that fills the budget with the least loss; see `allocate`."""
        plain = self.best_plain()
        enough = -(-self.max_tokens * 49 // 50)
        least = min(plain.tokens, enough)
        near = near_grids(self.height, self.width, self.min_tokens, self.max_tokens_per_frame)
        best: tuple[bool, float] = (True, math.inf)
        pair = plain.slow_size, plain.fast_size
        for slow_grid in sorted({*near, _grid(plain.slow_size, self.side)}):
            limit, spare = self.fast_limit(slow_grid[0]), self.max_tokens - self.slow * slow_grid[0]
            if spare < self.fast or (self.fast and best < (False, limit * self.fast / spare)):
                break  # with larger slow frames the loss of the fast ones alone would exceed that of the best pair
            slow_loss = aspect_error(self.height, self.width, slow_grid) if self.slow else 1.0
            for fast_grid in self._fast_grids(near, limit, least - self.max_tokens + spare, spare):
                tokens = self.slow * slow_grid[0] + self.fast * fast_grid[0]
                fast_loss = aspect_error(self.height, self.width, fast_grid) * (limit / fast_grid[0])
                loss = slow_loss * (fast_loss if self.fast else 1.0) * (self.max_tokens / tokens) ** 2
                if (tokens < enough, loss) < best:
                    best = (tokens < enough, loss)
                    pair = tuple((rows * self.side, columns * self.side) for _, rows, columns in (slow_grid, fast_grid))
        return self.allocation(*pair)

    def _fast_grids(self, near: tuple[Grid, ...], limit: int, least: int, spare: int) -> list[Grid]:
        """Grids of at most `limit` tokens with which the fast frames have `least` to `spare` tokens together."""
        plain = _grid(self.plain_fast(limit), self.side)
        grids = [plain] if least <= self.fast * plain[0] <= spare else []
        if self.fast and self.fast_size is None:
            start = bisect_left(near, (-(-least // self.fast),))
            grids += near[start : bisect_right(near, (min(limit, spare // self.fast), math.inf))]
        return grids


def most_frames(max_tokens: int, min_tokens: int) -> int:
    """Number of frames of `min_tokens` that fit into `max_tokens`."""
    return max_tokens // min_tokens


def thin(count: int, limit: int) -> list[int]:
    """At most `limit` of the indices 0 … count-1, spread evenly, including the first."""
    if count <= limit:
        return list(range(count))
    return [index * count // limit for index in range(limit)]
