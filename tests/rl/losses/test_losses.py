"""Every policy loss against numbers worked out by hand, and the properties that all of them share."""

from dataclasses import replace

import pytest
import torch

from rl.losses import LOSSES, LossInput, build_loss, group_advantages

OWNER = torch.tensor([0, 0, 1, 2, 2, 2])
OLD = torch.tensor([-1.0, -2.0, -1.5, -1.0, -1.0, -1.0], dtype=torch.float64)
CHANGE = torch.tensor([0.1, 0.3, 0.5, -0.4, 0.0, 0.2], dtype=torch.float64)
ADVANTAGES = torch.tensor([2.0, 1.0, -1.0])


def example() -> LossInput:
    """Three sequences of 2, 1 and 3 tokens, whose ratios are e^0.1 = 1.105170918, e^0.3 = 1.349858808, e^0.5 =
    1.648721271, e^−0.4 = 0.670320046, 1 and e^0.2 = 1.221402758."""
    new = (OLD + CHANGE).requires_grad_()
    return LossInput(new, OLD, OWNER, ADVANTAGES, sequences=3, tokens=6, max_tokens=4)


@pytest.mark.parametrize(
    ("name", "high", "loss", "gradient", "clipped"),
    [
        # (2.210341836 + 2.4)/2 + 1.2 + (−0.8 − 1 − 1.221402758)/3 = 2.498036665, over 3 sequences
        ("grpo", None, -0.832678888, [-0.368390306, 0, 0, 0, 0.111111111, 0.135711418], [1, 2, 3]),
        # 2.210341836 + 2.56 + 1.28 − 0.8 − 1 − 1.221402758 = 3.028939078, over 6 tokens; 1.28 bounds from above
        ("dapo", None, -0.504823180, [-0.368390306, 0, 0, 0, 0.166666667, 0.203567126], [1, 2, 3]),
        # 2.210341836 + 2.4 + 1.2 − 0.8 − 1 − 1.221402758 = 2.788939078, over 3 sequences of at most 4 tokens
        ("dr_grpo", None, -0.232411590, [-0.184195153, 0, 0, 0, 0.083333333, 0.101783563], [1, 2, 3]),
        # min(r, 1.28)·Â·log π: −1.989307652 − 4.352 − 1.28 + 0.938448064 + 1 + 0.977122206 = −4.705737382, over 6
        # tokens; the gradient is −min(r, 1.28)·Â/6 for every token
        (
            "cispo",
            0.28,
            0.784289564,
            [-0.368390306, -0.426666667, -0.213333333, 0.111720008, 0.166666667, 0.203567126],
            [1, 2],
        ),
    ],
)  # fmt: skip
def test_token_losses_are_the_hand_computation(name, high, loss, gradient, clipped):
    batch = example()
    output = build_loss(name, epsilon_high=high)(batch)
    assert output.loss.dtype == output.ratio.dtype == torch.float32
    assert output.loss.item() == pytest.approx(loss, abs=1e-6)
    output.loss.backward()
    assert batch.log_probs.grad.tolist() == pytest.approx(gradient, abs=1e-6)
    assert output.clipped.nonzero().flatten().tolist() == clipped
    assert output.ratio.tolist() == pytest.approx(CHANGE.exp().tolist(), abs=1e-6)


def test_cispo_keeps_large_ratios_by_default_up_to_five():
    """Ratios e^1 = 2.718281828 and e^2 = 7.389, cut to 5; Â = 1; log π = −1 and −3: −(2.718281828 + 15)/2 → +8.859."""
    new = torch.tensor([-1.0, -3.0], requires_grad=True)
    batch = LossInput(new, torch.tensor([-2.0, -5.0]), torch.tensor([0, 0]), torch.tensor([1.0]), 1, 2)
    output = build_loss("cispo")(batch)
    assert output.loss.item() == pytest.approx((2.718281828 + 15) / 2, abs=1e-5)
    assert output.clipped.tolist() == [False, True]


@pytest.mark.parametrize("name", LOSSES)
def test_kl_is_the_k3_estimate_of_the_sampled_tokens(name):
    """k3 = r − 1 − log r of log r = 0.2 and −0.1: 0.021402758 and 0.004837418; equal models have none."""
    batch = replace(example(), advantages=torch.zeros(3))
    reference = batch.log_probs.detach() + torch.tensor([0.2, -0.1, 0.0, 0.0, 0.0, 0.2], dtype=torch.float64)
    found = build_loss(name, kl=0.5)(replace(batch, reference_log_probs=reference))
    tokens = [0.021402758, 0.004837418, 0, 0, 0, 0.021402758]
    assert found.kl.tolist() == pytest.approx(tokens, abs=1e-7)
    per_sequence = ((tokens[0] + tokens[1]) / 2 + tokens[5] / 3) / 3
    expected = {"dapo": sum(tokens) / 6, "cispo": sum(tokens) / 6, "dr_grpo": sum(tokens) / 12}
    assert found.loss.item() == pytest.approx(0.5 * expected.get(name, per_sequence), abs=1e-7)
    # The gradient of k3 by log π is 1 − r; it pulls the policy to the reference.
    found.loss.backward()
    assert batch.log_probs.grad[0] < 0 < batch.log_probs.grad[1]
    with pytest.raises(ValueError, match="reference_log_probs"):
        build_loss(name, kl=0.5)(batch)
    assert build_loss(name)(batch).kl is None


@pytest.mark.parametrize("name", LOSSES)
def test_weights_scale_terms_and_the_sampler_is_only_compared(name):
    batch = example()
    plain = build_loss(name)(batch)
    doubled = build_loss(name)(replace(batch, weights=torch.full((6,), 2.0)))
    torch.testing.assert_close(doubled.loss, 2 * plain.loss)
    first = build_loss(name)(replace(batch, weights=torch.tensor([1.0, 1, 0, 0, 0, 0])))
    [gradient] = torch.autograd.grad(first.loss, batch.log_probs)
    assert gradient[2:].abs().max() == 0
    compared = build_loss(name)(replace(batch, sampler_log_probs=OLD + 0.1))
    assert torch.equal(compared.loss, plain.loss)
    # KL(sampler ‖ old) by k3 with log r = −0.1
    assert compared.sampler_kl.tolist() == pytest.approx([0.004837418] * 6, abs=1e-7)


def random_batch(seed: int) -> LossInput:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (7,), generator=generator)
    owner = torch.repeat_interleave(torch.arange(7), lengths)
    old, change, reference, weights = torch.randn(4, len(owner), generator=generator)
    new = (old + 0.3 * change).requires_grad_()
    advantages = torch.randn(7, generator=generator)
    return LossInput(
        new, old, owner, advantages, 7, len(owner), 9, old + 0.1 * reference, weights=weights.abs()
    )  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cuts", [(3, 4), (1, 1, 5), (1,) * 7])
def test_parts_with_the_divisors_of_the_whole_add_up_to_it(name, cuts):
    """Processes and micro-batches: any division of the sequences has the loss and the gradient of all of them."""
    loss = build_loss(name, epsilon_low=0.2, epsilon_high=0.28, kl=0.1)
    batch = random_batch(3)
    whole = loss(batch).loss
    [expected] = torch.autograd.grad(whole, batch.log_probs)
    parts, first = [], 0
    for count in cuts:
        mine = (batch.owner >= first) & (batch.owner < first + count)
        parts.append(
            replace(
                batch,
                log_probs=batch.log_probs[mine],
                old_log_probs=batch.old_log_probs[mine],
                owner=batch.owner[mine] - first,
                advantages=batch.advantages[first : first + count],
                reference_log_probs=batch.reference_log_probs[mine],
                weights=batch.weights[mine],
            )
        )
        first += count
    total = torch.stack([loss(part).loss for part in parts]).sum()
    torch.testing.assert_close(total, whole, atol=1e-6, rtol=1e-6)
    [gradient] = torch.autograd.grad(total, batch.log_probs)
    torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=1e-5)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_gspo_token_has_the_value_and_gradient_of_gspo(seed):
    batch = replace(random_batch(seed), weights=None)
    outputs = [build_loss(name, 0.01, 0.01, 0.1)(batch) for name in ("gspo", "gspo_token")]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    assert torch.equal(outputs[0].clipped, outputs[1].clipped) and outputs[0].clipped.any()
    one, other = (torch.autograd.grad(output.loss, batch.log_probs)[0] for output in outputs)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", LOSSES)
def test_a_ratio_that_would_overflow_gives_finite_gradients(name):
    new = torch.tensor([-1.0, -200.0, -1.0], requires_grad=True)
    old = torch.tensor([-200.0, -1.0, -1.0])
    output = build_loss(name)(LossInput(new, old, torch.arange(3), torch.tensor([1.0, -1.0, 1.0]), 3, 3))
    output.loss.backward()
    assert output.loss.isfinite() and new.grad.isfinite().all() and new.grad[2] != 0


@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
@pytest.mark.parametrize(("change", "passes"), [(19.0, True), (21.0, False)])
def test_a_sequence_ratio_beyond_its_limit_has_no_gradient(name, change, passes):
    """A negative advantage is not clipped above: e^19 has a gradient, e^21 only its limit as its value."""
    old = torch.tensor([-30.0, -30.0, -1.0])
    new = (old + torch.tensor([change, change, 0.0])).requires_grad_()
    batch = LossInput(new, old, torch.tensor([0, 0, 1]), torch.tensor([-1.0, 1.0]), 2, 3)
    build_loss(name)(batch).loss.backward()
    assert bool(new.grad[:2].any()) == passes and new.grad[2] == pytest.approx(-0.5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_float32_of_bf16_log_probs(name):
    batch = example()
    batch = replace(batch, log_probs=batch.log_probs.detach().bfloat16().requires_grad_())
    output = build_loss(name)(batch)
    assert output.loss.dtype == output.ratio.dtype == torch.float32


def test_centred_advantages_keep_the_scale_of_the_rewards():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.1, 1.1, 1.1, 1.1]])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(group_advantages(rewards, standardise=False), expected)
    assert [name for name, loss in LOSSES.items() if not loss.standardise] == ["dr_grpo"]
