"""GSPO against numbers worked out by hand, and the properties that make it a policy gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.gspo import group_advantages, gspo_loss, sequence_log_ratio
from rl.losses import LossInput, build_loss


def test_advantages_are_standardised_within_each_group():
    # mean 0.25, population variance (3·0.0625 + 0.5625)/4 = 0.1875, std 0.4330127
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.1, 1.1, 1.1, 1.1]])
    expected = torch.tensor([[1.7320508, -0.5773503, -0.5773503, -0.5773503], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(group_advantages(rewards), expected)


def test_loss_is_the_hand_computation():
    """Three sequences of 2, 1 and 3 tokens.

    1: mean log-ratio (0.0002 + 0.0004)/2 = 0.0003 → s = 1.000300045, inside 1.0004;       Â = 2   → s·Â = 2.00060009
    2: log-ratio 0.001 → s = 1.0010005, above 1.0004, Â = 1                  → clipped to 1.0004
    3: mean (−0.003 + 0.0 − 0.003)/3 = −0.002 → s = 0.998001999, below 0.9997, Â = −1       → clipped to −0.9997
    J = (2.00060009 + 1.0004 − 0.9997)/3 = 0.66710003;  loss = −J
    """
    old = torch.tensor([-1.0, -2.0, -0.5, -1.0, -1.0, -1.0], dtype=torch.float64)
    change = torch.tensor([0.0002, 0.0004, 0.001, -0.003, 0.0, -0.003], dtype=torch.float64)
    new = (old + change).requires_grad_()
    owner = torch.tensor([0, 0, 1, 2, 2, 2])
    output = gspo_loss(new, old, owner, torch.tensor([2.0, 1.0, -1.0]))
    assert output.loss.item() == pytest.approx(-0.66710003, abs=2e-6)
    assert output.clipped.tolist() == [False, True, True]
    assert output.ratio.tolist() == pytest.approx([1.000300045, 1.0010005, 0.998001999], abs=1e-6)
    output.loss.backward()
    # d loss / d log π = −s·Â / |y| / 3 where the clip is not active: −1.000300045 · 2 / 2 / 3
    assert new.grad.tolist() == pytest.approx([-0.33343335, -0.33343335, 0, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("advantage", "change", "gradient_passes"),
    [
        (1.0, 0.0005, False),  # already raised enough
        (1.0, 0.0003, True),
        (1.0, -0.01, True),  # a good answer that became less likely is always pulled back
        (-1.0, -0.0004, False),  # already lowered enough
        (-1.0, -0.0002, True),
        (-1.0, 0.01, True),
        (0.0, 0.01, False),
    ],
)
def test_clip_cuts_only_the_direction_already_taken(advantage, change, gradient_passes):
    new = torch.tensor([-1.0 + change, -1.0 + change], dtype=torch.float64).requires_grad_()
    old = torch.full((2,), -1.0, dtype=torch.float64)
    output = gspo_loss(new, old, torch.tensor([0, 0]), torch.tensor([advantage]))
    output.loss.backward()
    assert bool(new.grad.abs().sum() > 0) == gradient_passes


def test_ratio_is_taken_in_float32_of_bf16_inputs():
    fine = sequence_log_ratio(torch.tensor([-1.0]).bfloat16(), torch.tensor([-1.0 - 3e-4]), torch.tensor([0]), 1)
    assert fine.dtype == torch.float32 and fine.item() == pytest.approx(3e-4, rel=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_rounding_errors_of_rewards_are_no_advantage(scale):
    noise = scale * (0.7 + torch.tensor([[0.0, 6e-8, 0.0, 1e-7]]))
    assert not group_advantages(noise).any() and not group_advantages(noise, standardise=False).any()
    # A small difference that float32 holds is one; the mean of the advantages is zero.
    fine = group_advantages(scale * torch.tensor([[0.7, 0.7 + 1e-4, 0.7]]))
    torch.testing.assert_close(fine, torch.tensor([[-1.0, 2.0, -1.0]]) / 2**0.5, atol=2e-3, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.1]), min_size=4, max_size=4))
def test_a_small_step_raises_better_answers_and_lowers_worse_ones(rewards):
    """On policy, one gradient step on the logits of four one-token answers moves each by the sign of its advantage."""
    advantages = group_advantages(torch.tensor([rewards]))[0]
    logits = torch.zeros(4, 5, requires_grad=True)
    tokens = torch.arange(4)
    log_probs = logits.log_softmax(-1)[torch.arange(4), tokens]
    gspo_loss(log_probs, log_probs.detach(), torch.arange(4), advantages).loss.backward()
    after = (logits - 0.1 * logits.grad).log_softmax(-1)[torch.arange(4), tokens].detach()
    moved = after - math.log(1 / 5)
    assert torch.equal(moved.sign().round(), advantages.sign()) or moved[advantages == 0].abs().max() < 1e-6
    assert (moved * advantages >= 0).all()


def test_groups_without_spread_give_no_gradient_and_count_in_the_mean():
    advantages = group_advantages(torch.tensor([[1.0, 1.0], [1.0, 0.0]])).flatten()
    new = torch.full((4,), -1.0, requires_grad=True)
    gspo_loss(new, torch.full((4,), -1.0), torch.arange(4), advantages).loss.backward()
    assert new.grad.tolist() == pytest.approx([0.0, 0.0, -0.25, 0.25])


def test_shards_divided_by_the_global_count_add_up_to_the_whole():
    torch.manual_seed(0)
    owner = torch.tensor([0, 0, 1, 2, 2, 3])
    old, change = torch.randn(6), 2e-4 * torch.randn(6)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    whole = gspo_loss(old + change, old, owner, advantages).loss
    first = gspo_loss((old + change)[:3], old[:3], owner[:3], advantages[:2], num_sequences=4).loss
    second = gspo_loss((old + change)[3:], old[3:], owner[3:] - 2, advantages[2:], num_sequences=4).loss
    torch.testing.assert_close(first + second, whole)


def test_the_loss_behind_the_protocol_is_the_same_to_the_bit():
    """`min(s Â, clip(s) Â)` written out once more; the recipe's default loss must not move by a rounding."""
    torch.manual_seed(1)
    owner = torch.tensor([0, 0, 1, 2, 2, 3])
    old = torch.randn(6)
    new, advantages = (old + 4e-4 * torch.randn(6)).requires_grad_(), torch.randn(4)
    output = build_loss("gspo")(LossInput(new, old, owner, advantages, 5.0, 6))
    sums = torch.zeros(4).index_add(0, owner, new - old)
    ratio = torch.exp(sums / torch.tensor([2, 1, 2, 1]))
    expected = -torch.minimum(ratio * advantages, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantages).sum() / 5.0
    assert torch.equal(output.loss, expected) and torch.equal(output.ratio, ratio.detach())
    assert torch.equal(torch.autograd.grad(output.loss, new)[0], torch.autograd.grad(expected, new)[0])
    assert torch.equal(gspo_loss(new, old, owner, advantages, 5.0).loss, expected)
