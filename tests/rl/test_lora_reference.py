"""The start model of the KL term: a copy of it, or with LoRA the policy without LoRA's change."""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from rl.losses import group_advantages
from rl.policy.lora import ADAPTER, add_lora, lora_layers, without_lora
from rl.policy.scoring import score
from rl.policy.update import PolicyUpdate
from stages.distributed import engine
from tests.distributed import run_distributed
from tests.rl.test_microbatch import settings_of
from tests.rl.test_two_processes import REWARDS, policy, prompts


def tuned() -> Any:
    """The small policy with LoRA, which has changed it."""
    model = policy()
    add_lora(model, 2, 4.0, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            up = layer.lora_B[ADAPTER].weight
            up.copy_(0.1 * torch.randn(up.shape, generator=generator))
    return model


def test_without_lora_the_policy_is_the_start_model():
    model, start, groups = tuned(), policy(), prompts()
    expected, before = score(start, groups).log_probs, score(model, groups).log_probs
    assert (before - expected).abs().max() > 1e-3
    with without_lora(model):
        torch.testing.assert_close(score(model, groups).log_probs, expected, atol=1e-6, rtol=0)
    assert torch.equal(score(model, groups).log_probs, before)
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())


def update_of(zero: int, copied: bool) -> dict[str, Any]:
    """Gradients of LoRA and the mean KL on this rank; micro-batches of different numbers on the ranks."""
    engine.start(threads=1)
    config = settings_of("dapo", 14, lora_rank=2)
    model = tuned()
    made = engine.build(model, config, 1, zero=zero, precision="fp32")
    update = PolicyUpdate(made, config, policy() if copied else None)
    step, found = made.step, {}

    def watched() -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found.update({n: (safe_get_full_grad(p) if zero else p.grad).clone() for n, p in trained.items()})
        step()

    made.step = watched
    places = list(range(4))[dist.get_rank() :: dist.get_world_size()]
    advantages = group_advantages(torch.tensor(REWARDS))[places]
    [metrics] = update.run([prompts()[i] for i in places], advantages, [slice(0, len(places))])
    return found | {"kl": torch.tensor(metrics.kl.mean)}


def updates() -> list[dict[str, Any]]:
    return [update_of(zero, copied) for zero in (0, 3) for copied in (True, False)]


def test_the_gradient_with_lora_as_reference_is_that_with_a_copy():
    for copy, own, partitioned, last in run_distributed(updates, 2, 100):
        assert copy["kl"] > 1e-4 and len(copy) > 14
        assert max(gradient.abs().max() for gradient in copy.values()) > 1e-3
        for other in (own, partitioned, last):
            assert other.keys() == copy.keys()
            for name, value in copy.items():
                torch.testing.assert_close(other[name], value, atol=1e-6, rtol=1e-4, msg=name)
