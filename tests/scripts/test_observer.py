"""The bench of the ideal observer's eye: figures against a drawn card and a small case by hand."""

import numpy as np

from scripts.bench import observer


def test_digits_take_half_of_a_card():
    assert 0.4 < observer.digit_height() < 0.7


def test_large_digits_are_read_and_the_smallest_are_not_under_much_noise():
    (claim,), table = observer._legibility(3)
    cells = np.array([[float(cell) for cell in row[2:]] for row in table.rows])
    assert [row[0] for row in table.rows] == list(observer.CARDS)
    assert cells[-1].min() == 100 and cells[0, 0] == 100 > cells[0, -1]
    assert "noise 256" in claim.figure


def test_cells_name_the_paired_difference():
    names = ["a", "a", "b", "b"]
    assert observer._cell([True] * 4, [True] * 4, names, "default") == "100.0"
    cell = observer._cell([True, False, True, False], [False] * 4, names, "random")
    assert cell == "50.0 [+50.0 (+50.0 to +50.0)]"
    assert observer._tokens([100], [100]) == "100" and observer._tokens([90], [100]) == "90 ≠"
