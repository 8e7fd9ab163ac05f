import random

from keye.slowfast.budget import size_tokens
from scripts.bench.encoder.budget import TOTAL, Case, any_case, count, released, released_case


def test_the_released_search_by_hand():
    # 100 slow and 300 fast: 346 tokens a slow frame and 103 a fast one are 65,500, one more each is too much and taken.
    sizes, counted = released(Case(720, 1280, 100, 300, TOTAL))
    assert counted == 347 * 100 + 104 * 300 == 65_900
    # 720 and 1280 pixels scaled to at most 347 tokens: 13.97 x 24.84; then to 0.3 * 312 = 93: 7.23 x 12.86.
    assert sizes == ((13 * 28, 24 * 28), (7 * 28, 12 * 28))
    # 1365 slow: 48 tokens fit, 49 are taken, and a square has exactly those.
    sizes, counted = released(Case(784, 784, 1365, 0, TOTAL))
    assert counted == 66_885 and size_tokens(sizes[0]) == 49
    # A budget that does not bind: all 768, of which the grid takes 20 x 36; 0.3 * 720 = 216: 11.02 x 19.6.
    sizes, counted = released(Case(720, 1280, 5, 20, TOTAL))
    assert counted == 5 * 768 + 20 * 230 and sizes == ((560, 1008), (308, 532))


def test_cases_are_counted():
    draw = random.Random(3)
    wide = count((any_case(draw) for _ in range(150)), with_release=False)
    usual = count((released_case(draw) for _ in range(150)), with_release=True)
    for result in (wide, usual):
        assert (result.cases, result.over, result.out_of_limits, result.missed) == (150, 0, 0, 0)
        assert 0 < result.spent <= result.binding < 150
    assert usual.released_counts_over == usual.binding  # the release stops one too far whenever the budget binds
    assert usual.released_same + usual.released_out_of_limits == usual.released_free > 0
