import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.slowfast.budget import allocate, fast_limit, fit_size, most_frames, size_tokens, thin

sides = st.integers(1, 8000)


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


@given(sides, sides, st.integers(1, 800), st.integers(0, 800))
def test_fit_size_keeps_both_limits(height, width, low, more):
    size = fit_size(height, width, low, low + more)
    assert size[0] % 28 == 0 and size[1] % 28 == 0
    assert low <= size_tokens(size) <= low + more


@given(st.integers(60, 4000), st.floats(0.4, 2.5))
def test_fit_size_keeps_the_aspect(height, aspect):
    width = round(height * aspect)
    rows, columns = fit_size(height, width, 48, 768)
    # Rounding moves each side by at most one token of at least five.
    assert abs(math.log((columns / rows) / (width / height))) < 0.25


@settings(max_examples=400)
@given(
    sides,
    sides,
    st.integers(0, 400),
    st.integers(0, 1500),
    st.floats(0.01, 1.0),
    st.integers(1, 60),
    st.integers(0, 800),
    st.integers(1, 80_000),
)
def test_total_never_exceeds_the_budget(height, width, slow, fast, ratio, low, more, max_tokens):
    settings_ = {"ratio": ratio, "min_tokens": low, "max_tokens_per_frame": low + more, "max_tokens": max_tokens}
    if slow + fast == 0 or slow + fast > most_frames(max_tokens, low):
        with pytest.raises(ValueError):
            allocate(height, width, slow, fast, **settings_)
        return
    allocation = allocate(height, width, slow, fast, **settings_)
    slow_tokens, fast_tokens = size_tokens(allocation.slow_size), size_tokens(allocation.fast_size)
    assert allocation.tokens == slow * slow_tokens + fast * fast_tokens <= max_tokens
    assert low <= slow_tokens <= low + more
    assert low <= fast_tokens <= max(int(ratio * slow_tokens), low)


def test_release_exceeds_where_we_do_not():
    """The two cases in which the released search returns 65,900 and 66,885 tokens."""
    released = {"ratio": 0.3, "min_tokens": 48, "max_tokens_per_frame": 768, "max_tokens": 65_536}
    mixed = allocate(720, 1280, 100, 300, **released)
    assert 0.9 * 65_536 < mixed.tokens <= 65_536
    assert allocate(720, 1280, 1365, 0, **released).tokens <= 65_536


def test_a_binding_budget_is_nearly_spent():
    for count in (90, 120, 200, 400):
        allocation = allocate(
            1080, 1920, count, 0, ratio=0.3, min_tokens=48, max_tokens_per_frame=768, max_tokens=65_536
        )
        assert allocation.tokens > 0.88 * 65_536  # a whole row or column is what rounding may cost


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
