"""The ideal observer of SlowFastBench: it is right with all frames, at chance without pixels, and reads no answer."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from keye.slowfast.resizing import resize
from keye.world.slowfastbench import FAMILIES, draw, painter_of, posterior, reading
from keye.world.slowfastbench.reader import READERS, read
from keye.world.slowfastbench.schedules import PERIODS, RATES, RING

EACH = 20
SECRETS = {"states": None, "tags": ("red",), "texts": ("9 9 9 9",)}


def clip(item):
    frames = painter_of(item.film).cell_frames()
    return [cell / 2 for cell in range(len(frames))], frames


def items(family, number=EACH, height=None):
    """Dev questions of different groups on short clips."""
    row = FAMILIES[family]
    for index in range(0, number * 5, 5):
        yield draw(family, "dev", index, max(8, row.shortest), height or max(144, row.lowest))


def small(pictures, height, width):
    frames = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return list(resize(frames, (height, width), "bicubic"))


@pytest.mark.parametrize("family", READERS)
def test_all_frames_at_full_size_answer_every_family(family):
    asked = list(items(family))
    right = [read(item, *clip(item)) == item.answer for item in asked]
    assert np.mean(right) >= 0.95


def test_drawn_resolutions_are_read():
    asked = [draw(family, "dev", index, max(8, FAMILIES[family].shortest)) for family in READERS for index in (1, 7)]
    assert np.mean([read(item, *clip(item)) == item.answer for item in asked]) >= 0.95


@pytest.mark.parametrize("control", ["blind", "zeroed", "other"])
def test_without_its_pixels_it_is_at_chance(control):
    right, chance = [], []
    for family in READERS:
        asked = list(items(family, 16))
        for item, partner in zip(asked, [*asked[1:], asked[0]], strict=True):
            times, pictures = clip(partner)
            if control == "blind":
                times, pictures = [], []
            elif control == "zeroed":
                pictures = [np.zeros_like(pictures[0])] * len(pictures)
            right.append(read(item, times, pictures) == item.answer)
            chance.append(1 / len(item.options or range(4)))
    expected, spread = np.mean(chance), np.sqrt(np.mean(chance) * (1 - np.mean(chance)) / len(right))
    assert abs(np.mean(right) - expected) < 4 * spread


@pytest.mark.parametrize("family", ["order", "when", "read"])
def test_order_comes_from_the_times(family):
    rng, right = np.random.default_rng(0), []
    for item in items(family):
        times, pictures = clip(item)
        right.append(read(item, times, [pictures[place] for place in rng.permutation(len(pictures))]) == item.answer)
    assert np.mean(right) < 0.7


@pytest.mark.parametrize("family", READERS)
def test_it_reads_neither_the_answer_nor_what_happens(family):
    item = next(items(family, 1))
    times, pictures = clip(item)
    states = np.zeros((len(item.film.states) + 1, 3), int)
    film = dataclasses.replace(item.film, **{**SECRETS, "states": states})
    changed = dataclasses.replace(item, answer="", film=film, clip="", group="", slices={})
    for some in (slice(None), slice(0, None, 3), slice(0, 0)):
        assert read(changed, times[some], pictures[some]) == read(item, times[some], pictures[some])


def test_small_text_is_lost_in_small_pictures_and_large_lamps_are_not():
    def accuracy(family, height, width):
        asked = [(item, *clip(item)) for item in items(family)]
        return np.mean([read(item, times, small(shown, height, width)) == item.answer for item, times, shown in asked])

    assert accuracy("detail", 280, 504) >= 0.95 > 0.6 > accuracy("detail", 56, 84)
    assert accuracy("find", 56, 84) >= 0.9


def test_more_noise_reads_less():
    asked = [(item, *clip(item)) for item in items("detail")]
    shown = [(item, times, small(pictures, 56, 84)) for item, times, pictures in asked]
    clear, noisy = (np.mean([read(*one, noise=noise) == one[0].answer for one in shown]) for noise in (2, 256))
    assert clear > noisy + 0.2


def test_arrays_and_tensors_are_equal_and_wrong_calls_are_refused():
    item = next(items("find"))
    times, pictures = clip(item)
    tensors = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
    assert read(item, times, tensors) == read(item, times, pictures)
    with pytest.raises(ValueError, match="15 times and 16 pictures"):
        read(item, times[1:], pictures)
    with pytest.raises(ValueError, match="maze is not read"):
        read(dataclasses.replace(item, family="maze"), [], [])


def test_noise_of_sums_is_that_of_pixels():
    layout = reading.layout_of(next(items("find")).film, 5)
    sight = reading._sights(layout, (56, 84), 8.0, "states", ())[0]
    rng, size = np.random.default_rng(0), (56, 84, 3)
    looks = np.stack([sight.look(rng.normal(90, 8, size)) for _ in range(4000)])
    assert np.allclose(np.cov(looks.T), sight.noise @ sight.noise.T, rtol=0.1)


def test_likelihoods_are_those_of_the_gaussians():
    """Against the definition with full covariance matrices, for things that are there and for cards against none."""
    film = next(items("detail")).film
    layout, size = reading.layout_of(film, 1), (84, 140)
    texts = ("1 2 3 4", "4 3 2 1")
    (sight,) = reading._sights(layout, size, 8.0, "states", texts)
    window = (sight.rows.stop - sight.rows.start, sight.columns.stop - sight.columns.start)
    picture = np.random.default_rng(1).uniform(0, 255, (*size, 3))
    values = picture[sight.rows, sight.columns].mean(2).ravel()
    top, bottom, left, right = layout.places[0]
    covered, looks = reading._looks(layout, (bottom - top, right - left), texts)
    full = torch.zeros(3, 1, *layout.size)
    for plane, look in zip(full, [covered, *looks], strict=True):
        plane[0, top:bottom, left:right] = torch.from_numpy(look)
    shown = torch.nn.functional.interpolate(full, size, mode="bicubic", antialias=True)[:, 0].double().numpy()
    covered, *looks = (plane[sight.rows, sight.columns].ravel() for plane in shown)
    beside = 1 - covered
    pixel = 8.0**2 / 3
    thing = np.diag(pixel + reading.ROUNDING**2 + (reading.SPREAD * beside) ** 2)
    thing += reading.COMMON**2 * np.outer(beside, beside)
    plain = np.eye(window[0] * window[1]) * (pixel + reading.COMMON**2 + reading.SPREAD**2)

    def density(mean, covariance):
        rest = values - mean
        return -(rest @ np.linalg.solve(covariance, rest) + np.linalg.slogdet(covariance)[1]) / 2

    nothing = density(np.full(len(values), reading.BACKGROUND), plain)
    expected = [density(look + reading.BACKGROUND * beside, thing) - nothing for look in looks]
    assert np.allclose(sight.look(picture), expected, rtol=1e-3, atol=0.5)


def placements(cells, lengths, gap):
    """All placements of events of the lengths in this order, from cell 1."""
    for starts in itertools.combinations(range(1, cells), len(lengths)):
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        if ends[-1] <= cells and all(end + gap <= later for end, later in zip(ends, starts[1:], strict=False)):
            yield starts


def log_of(weights):
    return np.log(np.exp(weights).sum())


def test_events_are_summed_over_all_placements():
    rng = np.random.default_rng(2)
    lit, length, gap, cells = rng.normal(0, 1, (3, 12)), 2, 1, 12
    found = np.full(3, -np.inf)
    for order in itertools.permutations(range(3)):
        for starts in placements(cells, [length] * 3, gap):
            weight = sum(lit[place, at : at + length].sum() for place, at in zip(order, starts, strict=True))
            found[order[1]] = np.logaddexp(found[order[1]], weight)
    assert np.allclose(posterior.nth_event(posterior.gains_of(lit, length), length, gap, 1), found)
    counts = [
        log_of([
            sum(lit[0, at : at + length].sum() for at in starts) for starts in placements(cells, [length] * n, gap)
        ])
        for n in (1, 2, 3)
    ]  # fmt: skip
    assert np.allclose(posterior.numbers_of_events(lit[0], 3, length, gap), counts)
    texts = np.full(3, -np.inf)
    for chosen in itertools.product(range(3), repeat=2):
        for starts in placements(cells, [length] * 2, gap):
            weight = sum(lit[text, at : at + length].sum() for text, at in zip(chosen, starts, strict=True))
            texts[chosen[0]] = np.logaddexp(texts[chosen[0]], weight)
    assert np.allclose(posterior.nth_text(posterior.gains_of(lit, length), length, gap, 2, 0), texts)


def test_turning_and_blinking_are_summed_over_all_schedules():
    rng, cells = np.random.default_rng(3), 20
    states, lit = rng.normal(0, 0.3, (4, cells, 8)), rng.normal(0, 0.3, (4, cells))
    turned, blinked = np.full((4, 4), -np.inf), np.full((4, 4), -np.inf)
    for length in range(8, 17):
        for start in range(1, cells - length + 1):
            steps = np.clip(np.arange(cells) - start + 1, 0, length)
            table = np.array([
                [log_of([dial[np.arange(cells), (first + rate * steps) % 8].sum() for first in range(8)])
                 for rate in RATES.values()] for dial in states
            ])  # fmt: skip
            turned = np.logaddexp(turned, posterior.assigned(table))
    for length in range(16, 20):
        for start in range(1, cells - length + 1):
            steps = np.arange(length)
            table = np.array([
                [lamp[start : start + length][steps % period < period // 2].sum() for period in PERIODS.values()]
                for lamp in lit
            ])  # fmt: skip
            # Lengths above 19 have no room and are drawn as 19.
            blinked = np.logaddexp(blinked, posterior.assigned(table))
    assert np.allclose(posterior.turning(states), turned)
    assert np.allclose(posterior.blinking(lit), blinked)


def test_going_round_is_summed_over_all_schedules():
    rng, cells = np.random.default_rng(4), 16
    states, found = rng.normal(0, 0.3, (2, cells, RING)), np.full((2, 2), -np.inf)
    for length in (1, 2):
        for start in range(1, cells - RING * length + 2):
            where = np.clip((np.arange(cells) - start) // length + 1, 0, RING)
            table = [[disc[np.arange(cells), way * where % RING].sum() for way in (1, -1)] for disc in states]
            found = np.logaddexp(found, posterior.assigned(np.array(table)))
    assert np.allclose(posterior.going_round(states, [1, 2]), found)
