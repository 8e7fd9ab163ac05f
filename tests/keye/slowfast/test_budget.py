import math
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keye.slowfast.budget import allocate, bounds, fast_limit, fit_size, near_grids, size_tokens, thin

sides = st.integers(1, 8000)
RELEASED = {"ratio": 0.3, "min_tokens": 48, "max_tokens_per_frame": 768, "max_tokens": 65_536}


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((720, 1280), (48, 768), (560, 1008)),  # 20 x 36 = 720; one more row or column would be over 768
        ((720, 1280), (48, 256), (336, 588)),  # 12 x 21 = 252: the scaled sides are 336 and 597.3
        ((272, 640), (48, 768), (280, 644)),  # fits as it is: rounded to 10 x 23
        ((112, 112), (4, 16), (112, 112)),
        ((112, 112), (48, 768), (196, 196)),  # scaled up to 7 x 7 >= 48
        ((1, 1), (1, 1), (28, 28)),
        ((10, 10_000), (1, 4), (28, 112)),  # a ribbon
    ],
)
def test_fit_size_by_hand(size, limits, expected):
    assert fit_size(*size, *limits) == expected


def test_the_side_of_a_token():
    # 720x1280 in tokens of 32: 22.5 and 40 round to 22 x 40 = 880 > 768; scaled, 20.78 and 36.95 give 20 x 36.
    assert fit_size(720, 1280, 48, 768, 32) == (640, 1152)
    assert size_tokens((640, 1152), 32) == 720


@given(sides, sides, st.integers(1, 800), st.integers(0, 800), st.sampled_from([28, 32]))
def test_fit_size_keeps_both_limits(height, width, low, more, side):
    size = fit_size(height, width, low, low + more, side)
    assert size[0] % side == 0 and size[1] % side == 0
    assert low <= size_tokens(size, side) <= low + more


@given(st.integers(60, 4000), st.floats(0.4, 2.5))
def test_fit_size_keeps_the_aspect(height, aspect):
    width = round(height * aspect)
    rows, columns = fit_size(height, width, 48, 768)
    # Rounding moves each side by at most one token of at least five.
    assert abs(math.log((columns / rows) / (width / height))) < 0.25


@settings(max_examples=300, deadline=None)
@given(
    sides,
    sides,
    st.integers(0, 400),
    st.integers(0, 1500),
    st.floats(0.01, 1.0),
    st.integers(1, 60),
    st.integers(0, 800) | st.integers(0, 20_000),
    st.integers(1, 80_000),
    st.sampled_from([28, 32, 14]),
    st.none() | st.integers(1, 80),
)
def test_limits_hold_everywhere(height, width, slow, fast, ratio, low, more, max_tokens, side, fixed):
    settings_ = {"ratio": ratio, "min_tokens": low, "max_tokens_per_frame": low + more, "side": side}
    if slow + fast == 0 or slow * low + fast * (fixed or low) > max_tokens:
        if slow + fast == 0 or fixed is None:
            with pytest.raises(ValueError):
                allocate(height, width, slow, fast, max_tokens=max_tokens, fast_tokens=fixed, **settings_)
        return
    allocation = allocate(height, width, slow, fast, max_tokens=max_tokens, fast_tokens=fixed, **settings_)
    assert all(length % side == 0 for length in (*allocation.slow_size, *allocation.fast_size))
    slow_tokens, fast_tokens = size_tokens(allocation.slow_size, side), size_tokens(allocation.fast_size, side)
    assert allocation.tokens == slow * slow_tokens + fast * fast_tokens <= max_tokens
    assert low <= slow_tokens <= low + more
    if fixed is None:
        assert low <= fast_tokens <= max(int(ratio * slow_tokens), low)
    else:
        assert fast_tokens <= fixed


def is_near(height, width, rows, columns):
    return Fraction(5, 6) <= Fraction(rows * width, columns * height) <= Fraction(6, 5)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 80), st.integers(0, 300))
def test_near_grids_are_all_there_are(height, width, low, more):
    expected = [
        (rows * columns, rows, columns)
        for rows in range(1, low + more + 1)
        for columns in range(-(-low // rows), (low + more) // rows + 1)
        if is_near(height, width, rows, columns)
    ]
    assert list(near_grids(height, width, low, low + more)) == sorted(expected)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(100, 2000),
    st.floats(0.4, 2.5),
    st.integers(0, 40),
    st.integers(0, 60),
    st.sampled_from([0.1, 0.25, 0.3, 0.5, 1.0]),
    st.integers(1, 20),
    st.integers(0, 80),
    st.floats(0, 1),
)
def test_no_pair_is_better(height, aspect, slow, fast, ratio, low, more, spend):
    """Every pair of grids is tried, however far off in aspect, and judged by the rule in the docstring."""
    width, high = round(height * aspect), low + more
    settings_ = {"ratio": ratio, "min_tokens": low, "max_tokens_per_frame": high}
    if slow + fast == 0:
        return
    largest = allocate(height, width, slow, fast, max_tokens=10**9, **settings_)
    budget = round((slow + fast) * low + spend * (largest.tokens - (slow + fast) * low))
    chosen = allocate(height, width, slow, fast, max_tokens=budget, **settings_)
    if largest.tokens <= budget:
        assert chosen == largest
        return

    def plain(least, most):
        size = fit_size(height, width, least, most)
        return size[0] // 28, size[1] // 28

    def total(slow_grid, fast_grid):
        return slow * math.prod(slow_grid) + fast * math.prod(fast_grid)

    def error(grid):
        ratio_of_aspects = Fraction(grid[0] * width, grid[1] * height)
        return max(ratio_of_aspects, 1 / ratio_of_aspects)

    def limit(slow_grid):
        return max(int(ratio * math.prod(slow_grid)), low)

    def plain_pair(most):
        return plain(low, most), plain(low, limit(plain(low, most)))

    released, bottom, top = plain_pair(low), low, high
    while top - bottom > 1:
        middle = (bottom + top) // 2
        fits = total(*plain_pair(middle)) <= budget
        bottom, top = (middle, top) if fits else (bottom, middle)
        released = max(released, plain_pair(middle), key=lambda pair: total(*pair)) if fits else released
    most_plain = total(*released)

    def loss(pair):
        tokens, factor = total(*pair), Fraction(1)
        if slow:
            factor *= error(pair[0])
        if fast:
            factor *= error(pair[1]) * Fraction(limit(pair[0]), math.prod(pair[1]))
        return tokens * 50 < budget * 49, factor * Fraction(budget, tokens) ** 2

    grids = [(r, c) for r in range(1, high + 1) for c in range(-(-low // r), high // r + 1)]
    near = [grid for grid in grids if is_near(height, width, *grid)]
    pairs = {released}
    for slow_grid in {*near, released[0]}:
        fast_grids = [grid for grid in near if math.prod(grid) <= limit(slow_grid)] if fast else []
        pairs |= {(slow_grid, fast_grid) for fast_grid in (*fast_grids, plain(low, limit(slow_grid)))}
    least = min(most_plain, -(-budget * 49 // 50))
    best = min(loss(pair) for pair in pairs if least <= total(*pair) <= budget)
    mine = tuple((size[0] // 28, size[1] // 28) for size in (chosen.slow_size, chosen.fast_size))
    assert total(*mine) == chosen.tokens >= least
    assert loss(mine)[0] == best[0] and float(loss(mine)[1]) <= float(best[1]) * (1 + 1e-12)


# What keye-vl-utils 1.5.2 gives for 5 slow and 20 fast frames, its arithmetic done by hand: one slow frame scaled to at
# most 768 tokens, one fast frame to int(0.3 * slow tokens), 48 at least.
@pytest.mark.parametrize(
    ("size", "slow_size", "fast_size"),
    [
        ((720, 1280), (560, 1008), (308, 532)),  # 720 / 25.71 and 1280 / 35.9 tokens: 20 x 36; fast 216: 11 x 19
        ((1080, 1920), (560, 1008), (308, 532)),
        ((1280, 720), (1008, 560), (532, 308)),
        ((480, 640), (476, 644), (252, 336)),  # 17 x 23 = 391 as it is; fast 117: 9.37 x 12.49
        ((272, 640), (280, 644), (140, 336)),  # 10 x 23 = 230; fast 69: 5.42 x 12.74
        ((240, 320), (252, 308), (168, 224)),  # 9 x 11 = 99; fast 48: 6 x 8
        ((300, 300), (308, 308), None),  # 11 x 11 = 121; fast 6 x 6 in the release, though 48 is its minimum
    ],
)
def test_the_released_sizes_where_the_budget_does_not_bind(size, slow_size, fast_size):
    allocation = allocate(*size, 5, 20, **RELEASED)
    assert allocation.slow_size == slow_size
    if fast_size is None:
        assert size_tokens(allocation.fast_size) == 48
    else:
        assert allocation.fast_size == fast_size


# The released search takes the first number of tokens per slow frame that is too much for 65,536; where the grid has
# exactly that many, the video does too. By hand, for 784 x 784 pixels:
@pytest.mark.parametrize(
    ("slow", "first_over", "ours"),
    [
        (1365, 7 * 7, 6 * 8),  # 1365 * 48 = 65,520
        (292, 15 * 15, 14 * 16),  # 292 * 224 = 65,408
    ],
)
def test_the_release_exceeds_the_budget_and_this_does_not(slow, first_over, ours):
    assert slow * (first_over - 1) <= 65_536 < slow * first_over
    allocation = allocate(784, 784, slow, 0, **RELEASED)
    assert size_tokens(allocation.slow_size) == ours and allocation.tokens == slow * ours


def test_a_limiting_budget_is_spent():
    for slow, fast in ((90, 0), (120, 0), (200, 0), (400, 0), (100, 300), (300, 100), (50, 600), (10, 500)):
        allocation = allocate(1080, 1920, slow, fast, **RELEASED)
        assert 0.98 * 65_536 <= allocation.tokens <= 65_536


@settings(max_examples=200, deadline=None)
@example(42, 5.0, 1, 10, 1.0, 1, 15, 165, 0)
@example(42, 2.0, 2, 0, 1.0, 2, 3, 2, 0)
@example(20, 1.0, 1, 1, 0.75, 3, 3, 4, 0)
@given(
    st.integers(20, 3000),
    st.floats(0.2, 5.0),
    st.integers(1, 60),
    st.integers(0, 200),
    st.floats(0.05, 1.0),
    st.integers(1, 60),
    st.integers(0, 700),
    st.integers(0, 30_000),
    st.integers(0, 200),
)
def test_bounds_hold_for_all_later_frames(height, aspect, slow, more, ratio, low, above, spare, later):
    width, frames = max(1, round(height * aspect)), slow + more
    settings_ = {
        "ratio": ratio,
        "min_tokens": low,
        "max_tokens_per_frame": low + above,
        "max_tokens": frames * low + spare,
    }
    slow_bound, fast_bound = bounds(height, width, slow, frames, **settings_)
    later = min(slow + later, frames)
    allocation = allocate(height, width, later, frames - later, **settings_)
    assert allocation.slow_size[0] <= slow_bound[0] and allocation.slow_size[1] <= slow_bound[1]
    if later < frames:
        assert allocation.fast_size[0] <= fast_bound[0] and allocation.fast_size[1] <= fast_bound[1]


def test_fixed_fast_frames():
    # For a wide picture 4 x 4 is not near its aspect, and 3 x 5 is. For a square one it is.
    assert allocate(720, 1280, 10, 50, fast_tokens=16, **RELEASED).fast_size == (84, 140)
    assert allocate(512, 512, 10, 50, fast_tokens=16, **RELEASED).fast_size == (112, 112)
    # 2 slow frames and 10 fast ones of 16 tokens in 500: (500 - 160) / 2 = 170 for a slow one, of which 13 x 13 = 169.
    tight = allocate(512, 512, 2, 10, fast_tokens=16, **{**RELEASED, "max_tokens": 500})
    assert (tight.slow_size, tight.fast_size, tight.tokens) == ((364, 364), (112, 112), 498)
    with pytest.raises(ValueError, match="256 tokens at least, which exceeds the budget of 255"):
        allocate(512, 512, 2, 10, fast_tokens=16, **{**RELEASED, "max_tokens": 255})


def test_fast_limit_by_hand():
    assert fast_limit(720, 0.3, 48) == 216
    assert fast_limit(100, 0.3, 48) == 48
    assert fast_limit(16, 0.25, 1) == 4


def test_thin():
    assert thin(5, 9) == [0, 1, 2, 3, 4]
    assert thin(10, 5) == [0, 2, 4, 6, 8]
    assert thin(7, 3) == [0, 2, 4]


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_thin_is_even(count, limit):
    kept = thin(count, limit)
    assert len(kept) == min(count, limit) and kept[0] == 0 and kept[-1] < count
    gaps = [later - earlier for earlier, later in zip(kept, kept[1:], strict=False)]
    assert not gaps or 1 <= min(gaps) <= max(gaps) <= min(gaps) + 1


def test_impossible_sizes():
    with pytest.raises(ValueError, match="no area"):
        fit_size(0, 5, 1, 4)
    with pytest.raises(ValueError, match="empty"):
        fit_size(5, 5, 4, 3)
