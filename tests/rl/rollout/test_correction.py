"""Weights for a sampler that differs from the trainer, by hand and against exact expectations."""

import pytest
import torch

from rl.losses import LossInput, build_loss
from rl.rollout.correction import Correction, effective_share, gap_of, log_ratio_of, raw_weights

OLD = torch.tensor([-1.0, -2.0, -0.5, -1.5, -1.0])
SAMPLED = torch.tensor([-1.5, -2.0, -0.2, -1.0, -1.0])
OWNER = torch.tensor([0, 0, 1, 1, 2])
RATIO = log_ratio_of(OLD, SAMPLED)  # 0.5, 0, −0.3, −0.5, 0: sequences exp(0.5), exp(−0.8), 1


def test_weights_of_sequences_and_tokens_by_hand():
    one, two = 1.6487213, 0.4493290
    assert raw_weights(RATIO, OWNER).tolist() == pytest.approx([one, two, 1.0])
    assert Correction().weights(RATIO, OWNER) is None
    assert Correction("truncated", 1.5).weights(RATIO, OWNER).tolist() == pytest.approx([1.5, 1.5, two, two, 1.0])
    assert Correction("masked", 2.0).weights(RATIO, OWNER).tolist() == pytest.approx([one, one, 0, 0, 1.0])
    tokens = Correction("masked", 1.5, "token").weights(RATIO, OWNER)
    assert tokens.tolist() == pytest.approx([0, 1.0, 0.7408182, 0, 1.0])
    assert Correction("truncated", 1.5, "token").weights(RATIO, OWNER)[0] == 1.5


def test_the_gap_has_the_differences_and_the_effective_sample_size():
    gap = gap_of(RATIO, OWNER, None)
    assert gap.difference.tolist() == pytest.approx([0.5, 0, 0.3, 0.5, 0])
    assert gap.applied.tolist() == [1.0] * 5
    w = gap.weight.double()
    assert effective_share(float(w.sum()), float(w.square().sum()), 3) == pytest.approx(
        float(w.sum() ** 2 / (3 * w.square().sum()))
    )
    assert effective_share(4.0, 4.0, 4) == 1.0 and effective_share(1.0, 1.0, 4) == 0.25


def test_truncated_weights_with_a_high_cap_give_the_expectation_of_the_trainers_policy():
    """Two-token sequences over three tokens: E_μ[w A] is the exact E_π[A]."""
    torch.manual_seed(0)
    old, sampler = (torch.randn(2, 3).double().log_softmax(-1) for _ in range(2))
    gains = torch.randn(3, 3).double()
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    log_old, log_sampled = (table[0][pairs[:, 0]] + table[1][pairs[:, 1]] for table in (old, sampler))
    exact = (log_old.exp() * gains.flatten()).sum()
    tokens_old = torch.stack([old[0][pairs[:, 0]], old[1][pairs[:, 1]]], 1).flatten()
    tokens_sampled = torch.stack([sampler[0][pairs[:, 0]], sampler[1][pairs[:, 1]]], 1).flatten()
    owner = torch.arange(9).repeat_interleave(2)
    weights = Correction("truncated", 1e6).weights(log_ratio_of(tokens_old, tokens_sampled), owner)[::2]
    torch.testing.assert_close((log_sampled.exp() * weights * gains.flatten()).sum(), exact, atol=1e-6, rtol=1e-6)


def test_a_masked_sequence_has_no_gradient_in_gspo():
    new = OLD.clone().requires_grad_()
    weights = Correction("masked", 2.0).weights(RATIO, OWNER)
    batch = LossInput(new, OLD, OWNER, torch.ones(3), sequences=3.0, tokens=5.0, weights=weights)
    build_loss("gspo", 0.1, 0.1, 0.0)(batch).loss.backward()
    assert new.grad[2:4].tolist() == [0.0, 0.0]
    # dL/d log π = − w · s · Â / (|y| · S), with s = 1
    assert new.grad[[0, 4]].tolist() == pytest.approx([-1.6487213 / 6, -1 / 3])
