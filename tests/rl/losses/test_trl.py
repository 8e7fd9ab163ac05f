"""The losses against those of TRL 1.16 on the same numbers: value and gradient. TRL is an option of the package."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rl.losses import LossInput, build_loss

LENGTHS = (5, 1, 3, 8)
GSPO = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
CASES = {
    "gspo": (GSPO, 3e-4, 4e-4, 4e-4),
    "gspo_token": (GSPO, 3e-4, 4e-4, 4e-4),
    "grpo": ({"loss_type": "grpo"}, 0.2, 0.2, 0.2),
    "dapo": ({"loss_type": "dapo"}, 0.2, 0.28, 0.28),
    "dr_grpo": ({"loss_type": "dr_grpo"}, 0.2, 0.2, 0.2),
    # TRL's epsilon_high of CISPO is the limit itself
    "cispo": ({"loss_type": "cispo"}, 1.0, 0.3, 1.3),
}


def numbers(scale: float) -> tuple[list[Tensor], Tensor]:
    """Log-probabilities [4, 8] float64 (new, old, reference) of four padded sequences, and advantages [4]."""
    generator = torch.Generator().manual_seed(5)
    old = -torch.rand(4, 8, generator=generator, dtype=torch.float64) * 3
    new = old + scale * torch.randn(4, 8, generator=generator, dtype=torch.float64)
    reference = old + 0.2 * torch.randn(4, 8, generator=generator, dtype=torch.float64)
    return [new.requires_grad_(), old, reference], torch.tensor([1.5, -0.5, -1.0, 0.7])


def trl_loss(new: Tensor, old: Tensor, reference: Tensor, advantages: Tensor, low: float, high: float, beta: float,
             loss_type: str, importance_sampling_level: str = "token") -> Tensor:  # fmt: skip
    """The loss of `GRPOTrainer._compute_loss`, which is run with these log-probabilities instead of a model's."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    mask = (torch.arange(8) < torch.tensor(LENGTHS)[:, None]).int()
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (new, torch.zeros_like(new), None),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        max_completion_length=8,
        beta=beta,
        epsilon_low=low,
        epsilon_high=high,
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    ids = torch.zeros(4, 8, dtype=torch.long)
    inputs: dict[str, Any] = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    return trainer._compute_loss(stand_in, None, inputs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_value_and_gradient_equal_trl(name, kl):
    options, low, high, their_high = CASES[name]
    [new, old, reference], advantages = numbers(3e-3 if low < 1e-2 else 0.3)
    real = torch.arange(8) < torch.tensor(LENGTHS)[:, None]
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    batch = LossInput(new[real], old[real], owner, advantages, 4, sum(LENGTHS), 8, reference[real])
    ours = build_loss(name, low, high, kl)(batch)
    theirs = trl_loss(new, old, reference, advantages, low, their_high, kl, **options)
    assert ours.clipped.any() and not ours.clipped.all()
    assert ours.loss.item() == pytest.approx(theirs.item(), abs=1e-6)
    gradients = [torch.autograd.grad(loss, new)[0] for loss in (ours.loss, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)
    assert gradients[0].abs().max() > 1e-3
