"""The terms of MPO equal computations by hand and TRL's, in value and gradient; δ is the same on every rank."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from rl.preference.losses import (
    MpoWeights,
    RewardShift,
    bco_loss,
    dpo_loss,
    mpo_loss,
    nll_loss,
    sequence_log_probs,
)
from tests.distributed import run_distributed

BETA, SHIFT = 0.1, 0.25
POLICY = [[-12.0, -15.0], [-30.0, -22.5]]
REFERENCE = [[-14.0, -13.0], [-28.0, -29.5]]
LENGTHS = [[4.0, 6.0], [10.0, 3.0]]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(weights: tuple[float, float, float]) -> tuple[list[float], list[list[float]]]:
    """Loss of each pair and its gradient with respect to both summed log-probabilities, from the formulas."""
    losses, gradients = [], []
    for (c, r), (c0, r0), (length, _) in zip(POLICY, REFERENCE, LENGTHS, strict=True):
        chosen, rejected = BETA * (c - c0), BETA * (r - r0)
        terms = (
            -math.log(sigmoid(chosen - rejected)),
            -math.log(sigmoid(chosen - SHIFT)) - math.log(1 - sigmoid(rejected - SHIFT)),
            -c / length,
        )
        losses.append(sum(w * term for w, term in zip(weights, terms, strict=True)))
        dpo = BETA * sigmoid(rejected - chosen)  # −d L_p / d log π(y_c)
        gradient_chosen = (-dpo, -BETA * sigmoid(SHIFT - chosen), -1 / length)
        gradient_rejected = (dpo, BETA * sigmoid(rejected - SHIFT), 0.0)
        pair = (gradient_chosen, gradient_rejected)
        gradients.append([sum(w * g for w, g in zip(weights, one, strict=True)) for one in pair])
    return losses, gradients


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.8, 0.2, 1.0)])
def test_each_term_equals_the_hand_computation(weights):
    policy = torch.tensor(POLICY, requires_grad=True)
    output = mpo_loss(
        policy, torch.tensor(LENGTHS), torch.tensor(REFERENCE), BETA, SHIFT, MpoWeights(*map(float, weights))
    )
    output.loss.sum().backward()
    losses, gradients = by_hand(weights)
    torch.testing.assert_close(output.loss.detach(), torch.tensor(losses), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(policy.grad, torch.tensor(gradients), atol=1e-7, rtol=1e-6)
    if weights[0] == 0.8:
        assert MpoWeights() == MpoWeights(*weights)
        parts = 0.8 * output.preference + 0.2 * output.quality + output.generation
        torch.testing.assert_close(output.loss.detach(), parts)


def test_losses_of_bf16_values_are_float32():
    values = torch.tensor([-300.0, -301.0], dtype=torch.bfloat16)
    for loss in (dpo_loss(values, values), bco_loss(values, values, 0.0), nll_loss(values, values.abs())):
        assert loss.dtype == torch.float32 and torch.isfinite(loss).all()


def test_sums_and_lengths_of_sequences():
    log_probs = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0], requires_grad=True)
    sums, lengths = sequence_log_probs(log_probs, torch.tensor([0, 0, 1, 2, 2]), 3)
    assert sums.tolist() == [-3.0, -4.0, -24.0] and lengths.tolist() == [2.0, 1.0, 2.0]
    sums[2].backward()
    assert log_probs.grad.tolist() == [0, 0, 0, 1, 1]


def of_trl(kind: str, tokens: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The loss `kind` of TRL's DPOTrainer for one pair of answers of equal length: tokens [2, T], reference [2]."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    length = tokens.shape[1]

    def model(**_):
        zeros = torch.zeros(2, length)
        output = {"log_probs": tokens, "entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}
        return SimpleNamespace(**output, loss=None)

    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    this = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0], beta=BETA,
        label_smoothing=0.0, use_weighting=False, _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
        _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(2, length + 1, dtype=torch.long),
        "attention_mask": torch.ones(2, length + 1, dtype=torch.long),
        "completion_mask": torch.tensor([[0] + [1] * length] * 2),
        "ref_chosen_logps": reference[:1],
        "ref_rejected_logps": reference[1:],
    }
    return trainer._compute_loss(this, model, inputs, False)


@pytest.mark.parametrize(
    ("kind", "weights"), [("sigmoid", (1.0, 0.0, 0.0)), ("bco_pair", (0.0, 1.0, 0.0)), ("sft", (0.0, 0.0, 1.0))]
)
def test_terms_equal_those_of_trl(kind, weights):
    """TRL's `bco_pair` has no reward shift, so δ is 0 here."""
    torch.manual_seed(0)
    values, reference = -3 * torch.rand(2, 5), torch.tensor([-6.0, -8.0])
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    sums, lengths = sequence_log_probs(ours.flatten(), torch.arange(2).repeat_interleave(5), 2)
    loss = mpo_loss(sums[None], lengths[None], reference[None], BETA, 0.0, MpoWeights(*weights)).loss.sum()
    expected = of_trl(kind, theirs, reference)
    loss.backward(), expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-6)


def shifts() -> list[float]:
    """δ before each of four steps; rank 1 has no rewards in the second."""
    rank, shift = dist.get_rank(), RewardShift()
    seen = []
    for rewards in ([1.0, 3.0 + 4 * rank], [2.0][rank:], [0.0]):
        seen.append(shift.value)
        shift.add(torch.tensor(rewards))
        shift.end_step()
    resumed = RewardShift()
    resumed.load_state_dict(shift.state_dict())
    return [*seen, resumed.value]


def test_the_reward_shift_is_the_mean_of_earlier_rewards_on_all_ranks():
    expected = [0.0, 12 / 4, 14 / 5, 14 / 7]
    assert run_distributed(shifts, 2, 240) == [pytest.approx(expected)] * 2
