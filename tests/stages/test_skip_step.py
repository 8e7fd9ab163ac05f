"""A step far above the running median is skipped and named; skipped steps do not enter the median."""

import math

import pytest

from keye.errors import KeyeError
from stages.skip_step import MAX_SKIPPED, WARMUP, StepGuard


def step(guard: StepGuard, loss: float, norm: float = 1.0, not_finite: int = 0) -> bool:
    guard.begin()
    guard.not_finite, guard.loss = not_finite, loss
    skipped = guard.should_skip(norm)
    assert guard.should_skip(norm) is skipped  # ZeRO asks once a group
    guard.end()
    return skipped


def test_spikes_are_held_only_when_enough_was_seen_and_asked_for():
    guard, off = StepGuard("stage", spike_loss=3.0), StepGuard("stage")
    assert not any(step(guard, loss) for loss in [50.0, *[2.0] * (WARMUP - 1)])  # the first may be anything
    assert step(guard, 6.1) and guard.skipped == "loss 6.1 is 3.0 times its running median"
    assert not step(guard, 6.0) and guard.skipped == ""
    assert not any(step(off, loss) for loss in [2.0] * 20 + [1e9])


def test_the_norm_is_watched_by_its_own_factor():
    guard = StepGuard("stage", spike_norm=10.0)
    for _ in range(WARMUP):
        step(guard, 2.0, norm=0.5)
    assert not step(guard, 1e6, norm=4.9) and step(guard, 2.0, norm=5.1)
    assert "grad_norm 5.1 is 10.2 times" in guard.skipped


def test_what_was_held_does_not_move_the_median():
    guard = StepGuard("stage", spike_loss=2.0)
    for loss in [1.0] * WARMUP + [10.0] * 5:
        step(guard, loss)
    assert step(guard, 2.1) and not step(guard, 1.9)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_what_is_not_finite_is_held_without_being_asked_for(norm):
    guard = StepGuard("stage")
    assert step(guard, 2.0, norm) and guard.not_finite == 1 and guard.skipped == "not finite"
    assert step(guard, 2.0, not_finite=2) and guard.not_finite == 2
    assert not step(guard, 2.0)


def test_run_is_given_up_after_too_many_spikes_in_a_row_and_counts_them_over_a_resume():
    guard = StepGuard("stage", spike_loss=2.0)
    for loss in [1.0] * WARMUP + [5.0] * MAX_SKIPPED:
        step(guard, loss)
    resumed = StepGuard("stage", spike_loss=2.0)
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(
        KeyeError, match="stage: 21 steps in a row were spikes .* lower its learning_rate, or raise its spike_"
    ):
        step(resumed, 5.0)
