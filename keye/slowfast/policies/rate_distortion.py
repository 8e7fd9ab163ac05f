"""Sizes of frames that keep the most information within a token budget.

Each frame has one option per size: so many tokens, so much information. On the upper convex hull of a frame's options,
information per additional token falls from size to size. Taking the steps of all frames in the order of that slope is
optimal at every total that it passes (Lagrangian relaxation); at other totals it misses the optimum by less than the
information of one step.
"""

from collections.abc import Sequence


def hull(tokens: Sequence[int], information: Sequence[float]) -> list[int]:
    """The places of the options on the upper convex hull, which begins at no tokens and no information.

    Args:
        tokens: of each option, ascending, 1 or more.
        information: of each option.
    """
    chain: list[int] = []
    for place in range(len(tokens)):
        while chain and slope(tokens, information, chain, place) >= slope(tokens, information, chain[:-1], chain[-1]):
            chain.pop()
        if slope(tokens, information, chain, place) > 0:
            chain.append(place)
    return chain


def slope(tokens: Sequence[int], information: Sequence[float], chain: Sequence[int], place: int) -> float:
    """Information per token of the step from the last option of `chain` (nothing if it is empty) to `place`."""
    before = (tokens[chain[-1]], information[chain[-1]]) if chain else (0, 0.0)
    return (information[place] - before[1]) / (tokens[place] - before[0])


def best_levels(
    tokens: Sequence[int],
    information: Sequence[Sequence[float]],
    budget: int,
    *,
    price: float = 0.0,
    most: int | None = None,
    first: int = -1,
) -> list[int]:
    """Each frame's size as a place in `tokens`, -1 for a frame that is not shown.

    Steps are taken by falling slope, those that do not fit are passed over, until none fits: the total is never over
    the budget, and the rest is spent on the best of what fits.

    Args:
        tokens: of each size, ascending.
        information: of each frame at each size.
        budget: tokens of all frames together.
        price: steps with less information per token are not taken.
        most: number of frames that may be shown.
        first: the least size of the first frame, which has to fit.

    Raises:
        ValueError: the first frame does not fit.
    """
    levels = [-1] * len(information)
    if information and first >= 0:
        if tokens[first] > budget:
            raise ValueError(f"the first frame has {tokens[first]} tokens, which exceeds the budget of {budget}")
        levels[0] = first
    left = budget - (tokens[first] if information and first >= 0 else 0)
    free = (len(information) if most is None else most) - (first >= 0)
    steps = []
    for frame, row in enumerate(information):
        chain: list[int] = []
        for place in hull(tokens, row):
            gain = slope(tokens, row, chain, place)
            if gain >= price:
                steps.append((-gain, frame, place))
            chain.append(place)
    for _, frame, place in sorted(steps):
        level = levels[frame]
        cost = tokens[place] - (tokens[level] if level >= 0 else 0)
        if place <= level or cost > left or (level < 0 and not free):
            continue
        free -= level < 0
        levels[frame], left = place, left - cost
    return levels
