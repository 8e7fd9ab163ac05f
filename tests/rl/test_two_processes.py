"""Two processes with half the prompts each compute the loss and the gradient of one with all of them."""

from typing import Any

import torch
import torch.distributed as dist

from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.processor import Sample
from rl.gspo import group_advantages, gspo_loss
from rl.policy.scoring import Group, score
from tests.distributed import run_distributed

VOCABULARY, GROUP = 64, 3
REWARDS = [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.5, 0.5, 0.5]]


def policy() -> KeyeForConditionalGeneration:
    torch.manual_seed(0)
    config = KeyeConfig.preset("tiny", vocab_size=VOCABULARY, num_hidden_layers=1)
    config.vision_config.num_hidden_layers = 1
    config.image_token_id, config.video_token_id = 1, 2
    return KeyeForConditionalGeneration(config)


def prompts() -> list[Group]:
    """Four prompts of one still each (one visual token), with three completions of 1 to 4 tokens."""
    generator = torch.Generator().manual_seed(1)
    groups = []
    for index in range(4):
        text = torch.randint(3, VOCABULARY, (4 + index,), generator=generator)
        ids = torch.cat([torch.tensor([1]), text])
        completions = [
            torch.randint(3, VOCABULARY, (int(n),), generator=generator)
            for n in torch.randint(1, 5, (GROUP,), generator=generator)
        ]
        sample = Sample(
            input_ids=ids,
            labels=torch.full_like(ids, -100),
            position_ids=torch.arange(len(ids)).expand(3, -1),
            pixel_values=torch.randn(4, 3, 14, 14, generator=generator),
            image_grid_thw=torch.tensor([[1, 2, 2]]),
        )
        groups.append(Group(sample, completions, [], [True] * GROUP, [""] * GROUP))
    return groups


def loss_of(model: KeyeForConditionalGeneration, places: list[int], sequences: float) -> torch.Tensor:
    groups = [prompts()[i] for i in places]
    new = score(model, groups)
    generator = torch.Generator().manual_seed(2)
    shifts = 4e-4 * torch.randn(4 * GROUP, generator=generator).view(4, GROUP)[places].flatten()
    old = new.log_probs.detach() - shifts[new.owner]
    advantages = group_advantages(torch.tensor(REWARDS))[places].flatten()
    return gspo_loss(new.log_probs, old, new.owner, advantages, sequences).loss


def half_of_the_prompts() -> dict[str, Any]:
    rank, model = dist.get_rank(), policy()
    # Gradients are averaged over ranks, as DeepSpeed does, so the divisor is the global count over their number.
    loss = loss_of(model, [rank, rank + 2], 4 * GROUP / 2)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for value in (*gradients.values(), loss.detach()):
        dist.all_reduce(value)
        value /= 2
    return {"loss": loss.detach(), "gradients": gradients}


def test_two_processes_equal_one():
    two = run_distributed(half_of_the_prompts, 2, 180)[0]
    model = policy()
    loss = loss_of(model, [0, 1, 2, 3], 4 * GROUP)
    loss.backward()
    torch.testing.assert_close(two["loss"], loss.detach(), atol=1e-6, rtol=1e-5)
    one = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert one.keys() == two["gradients"].keys()
    assert max(gradient.abs().max() for gradient in one.values()) > 1e-4
    for name, gradient in one.items():
        torch.testing.assert_close(two["gradients"][name], gradient, atol=1e-6, rtol=1e-3)
