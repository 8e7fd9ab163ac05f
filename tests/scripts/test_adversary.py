"""The adversary: its inputs are those of a plan, and it finds a planted leak."""

import numpy as np
import pytest
import torch

from keye import SlowFastEncoder
from keye.world.slowfastbench import FAMILIES, Painter, draw
from scripts.bench import adversary

LENGTHS = {name: next(n for n in (8, 16, 32) if n >= row.shortest) for name, row in FAMILIES.items() if not row.real}


@pytest.mark.parametrize("family", LENGTHS)
def test_every_question_offers_its_right_choice(family):
    items = [draw(family, "dev", i, LENGTHS[family], 144) for i in range(24)]
    found = [adversary.choice(item) for item in items]
    assert all(allowed[answer] for answer, allowed in found)
    members = FAMILIES[family].members
    assert {allowed.sum() for _, allowed in found} == {3 if family == "together" else members}
    assert all(len({answer for answer, _ in found[i : i + members]}) == members for i in range(0, 24, members))


@pytest.mark.parametrize("measure", adversary.MEASURES)
def test_the_inputs_are_those_of_the_encoders_plan(measure):
    encoder = SlowFastEncoder(measure=measure)
    for index in range(0, 24, 4):
        painter = Painter(draw("find", "dev", index, 8, 144).film)
        [(_, values)] = adversary._plans(painter, {measure: encoder})
        frames = torch.from_numpy(np.stack(painter.cell_frames())).permute(0, 3, 1, 2)
        plan = encoder.plan(frames, source_fps=2.0)
        assert values[adversary.LOWEST] == pytest.approx(plan.similarity[1:].min().item())
        assert values[1:17].tolist() == plan.frame_types.tolist()
        np.testing.assert_allclose(values[18:33], plan.similarity[1:].numpy(), atol=1e-6)


def planted(leak: bool, seed: int, number: int = 800) -> adversary.Drawn:
    """Questions with four choices; with a leak, three quarters of the answers follow from the third column."""
    rng = np.random.default_rng(seed)
    answers = rng.integers(0, 4, number)
    inputs = rng.normal(size=(number, 6)).astype(np.float32)
    shown = np.where(rng.random(number) < 0.75, answers, rng.integers(0, 4, number))
    inputs[:, 2] = shown if leak else rng.integers(0, 4, number)
    return adversary.Drawn({"plan": inputs}, answers, np.ones((number, 4), bool), np.arange(number),
                           np.zeros((number, 1)))  # fmt: skip


@pytest.mark.parametrize(
    ("leak", "number", "verdict"), [(True, 800, "**no**"), (False, 800, "open: more questions"), (False, 40_000, "yes")]
)
def test_a_planted_leak_is_found_and_noise_is_not(leak, number, verdict):
    pytest.importorskip("sklearn")
    [row] = adversary.judge("planted", planted(leak, 1), planted(leak, 2, number))
    assert row[2] == "25.0" and row[-1] == verdict


def test_the_interval_counts_groups_and_not_questions():
    right = np.repeat([1.0, 0.0], 50)
    alone, grouped = (adversary.interval(right, groups) for groups in (np.arange(100), np.arange(100) // 10))
    assert alone[0] == pytest.approx(0.5 - 1.96 * np.sqrt(0.25 / 99))
    assert grouped[1] - grouped[0] > 3 * (alone[1] - alone[0])
    balanced = np.tile([1.0, 0.0, 0.0, 0.0], 25)
    assert adversary.interval(balanced, np.arange(100) // 4) == (0.25, 0.25)
