"""How many tokens a slow and a fast frame get: pure integers, and the total after rounding is never above the budget.

A token is 28x28 pixels (2x2 vision patches of 14). Sizes follow the usual "smart resize": aspect kept, sides rounded to
multiples of 28, scaled down or up into the allowed range (report §3.1; keye-vl-utils 1.5.2). Where the release returns
the first size *over* the budget, the search here only ever accepts sizes whose real total fits.
"""

import math
from dataclasses import dataclass

PATCH = 14
SIDE = 28  # pixels along one side of a token


@dataclass(frozen=True)
class Allocation:
    """Sizes (height, width) in pixels of the slow and the fast frames, and the tokens the whole video costs."""

    slow_size: tuple[int, int]
    fast_size: tuple[int, int]
    tokens: int


def size_tokens(size: tuple[int, int], side: int = SIDE) -> int:
    """Tokens of one frame of `size` (height, width), both multiples of `side`."""
    return (size[0] // side) * (size[1] // side)


def fit_size(height: int, width: int, min_tokens: int, max_tokens: int, side: int = SIDE) -> tuple[int, int]:
    """The size (height, width), multiples of `side`, nearest to the given one that has `min_tokens` to `max_tokens`.

    The aspect ratio is kept as closely as the grid allows; both limits always hold, so a ribbon or a range as narrow as
    [7, 7] gives up some of the aspect instead. Raises ValueError for sizes below 1 pixel or an empty range.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a frame of {height}x{width} pixels has no area")
    if not 1 <= min_tokens <= max_tokens:
        raise ValueError(f"the range of {min_tokens} to {max_tokens} tokens per frame is empty")
    rows, columns = max(1, round(height / side)), max(1, round(width / side))
    if rows * columns > max_tokens:
        # In the order of operations of the release: where a side lands on a multiple of 28, the last bit decides.
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


def fast_limit(slow_tokens: int, ratio: float, min_tokens: int) -> int:
    """The most tokens a fast frame may have beside slow frames of `slow_tokens` (report: 30 %)."""
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
    """The largest frame sizes for `slow` + `fast` frames of `height` x `width` whose real total is <= `max_tokens`.

    Binary search on the tokens of a slow frame in [`min_tokens`, `max_tokens_per_frame`]; a fast frame has at most
    `max(int(ratio * slow tokens), min_tokens)`. Raises ValueError when even `min_tokens` for each frame is too much:
    thin the frames to `most_frames` first.
    """
    if slow + fast < 1 or min(slow, fast) < 0:
        raise ValueError(f"{slow} slow and {fast} fast frames make no video")
    if slow * min_tokens + fast * (fast_tokens or min_tokens) > max_tokens:
        raise ValueError(f"{slow + fast} frames of at least {min_tokens} tokens exceed the budget of {max_tokens}")

    def at(limit: int) -> Allocation:
        slow_size = fit_size(height, width, min_tokens, limit, side)
        slow_tokens = size_tokens(slow_size, side)
        if fast_tokens is None:
            fast_size = fit_size(height, width, min_tokens, fast_limit(slow_tokens, ratio, min_tokens), side)
        else:
            fast_size = fit_size(height, width, 1, fast_tokens, side)
        return Allocation(slow_size, fast_size, slow * slow_tokens + fast * size_tokens(fast_size, side))

    best = at(max_tokens_per_frame)
    if best.tokens <= max_tokens:
        return best
    best, low, high = at(min_tokens), min_tokens, max_tokens_per_frame
    while high - low > 1:
        middle = (low + high) // 2
        trial = at(middle)
        if trial.tokens <= max_tokens:
            low = middle
            best = max(best, trial, key=lambda allocation: allocation.tokens)
        else:
            high = middle
    return best


def most_frames(max_tokens: int, min_tokens: int) -> int:
    """How many frames of `min_tokens` fit into `max_tokens`."""
    return max_tokens // min_tokens


def thin(count: int, limit: int) -> list[int]:
    """At most `limit` of the indices 0 … count-1, evenly spread, always with the first."""
    if count <= limit:
        return list(range(count))
    return [index * count // limit for index in range(limit)]
