"""Two ranks that share the rows of an update have the scores and gradients of one process."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from keye.errors import RecipeError
from keye.slowfast.pixels import as_bytes
from rl.losses import LossInput, build_loss, group_advantages
from rl.policy.scoring import Group, score
from rl.policy.update import PolicyUpdate
from rl.recipe import Gspo
from stages.distributed import engine
from stages.distributed.activation_memory import apply_memory_options
from tests.distributed import run_distributed
from tests.rl.test_microbatch import reference
from tests.rl.test_two_processes import GROUP, REWARDS, VOCABULARY, policy
from tests.stages.test_parallel import sample

KL = {"gspo": 0.0, "dapo": 0.1}


def prompts() -> list[Group]:
    """Four prompts: stills and frames of different sizes, one of them in bytes, one of text alone; completions."""
    g = torch.Generator().manual_seed(3)
    contents = [([(1, 2)], [(3, 2), (1, 1)]), ([], [(2, 2), (1, 3), (2, 1)]), ([], []), ([(2, 1), (1, 1)], [])]
    groups = []
    for stills, frames in contents:
        one = sample(g, stills, frames, int(torch.randint(3, 9, (), generator=g)))
        if not stills and frames:
            one.pixel_values_videos = as_bytes(one.pixel_values_videos)
        lengths = torch.randint(1, 7, (GROUP,), generator=g).tolist()
        completions = [torch.randint(3, VOCABULARY, (n,), generator=g) for n in lengths]
        sampled = [-4 - torch.rand(n, generator=g) for n in lengths]
        groups.append(Group(one, completions, sampled, [True] * GROUP, [""] * GROUP))
    return groups


def settings_of(loss: str, budget: int, **more: Any) -> Gspo:
    return Gspo(steps=1, learning_rate=1e-3, prompts=4, group_size=GROUP, mini_batches=1, max_new_tokens=6, loss=loss,
                micro_batch_tokens=budget, kl=KL[loss], max_grad_norm=0.0, **more)  # fmt: skip


def one_pass(loss: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
    """Gradients, entropies and loss of all groups in one pass of one process, without DeepSpeed."""
    model, groups = policy(), prompts()
    new = score(model, groups)
    with torch.no_grad():
        other = score(reference(), groups).log_probs
    advantages = group_advantages(torch.tensor(REWARDS)).flatten()
    batch = LossInput(new.log_probs, new.log_probs.detach(), new.owner, advantages, 4 * GROUP, len(new.owner), 6, other)
    value = build_loss(loss, kl=KL[loss])(batch).loss
    value.backward()
    return {name: p.grad for name, p in model.named_parameters()}, new.entropy, value.item()


def update_of(zero: int, loss: str, budget: int, recompute: bool, sequence: int = 2) -> dict[str, Any]:
    """The gradients that DeepSpeed steps with, the number of passes and the metrics of this rank."""
    engine.start(threads=1)
    config = settings_of(loss, budget, sequence_parallel=sequence)
    model = policy()
    apply_memory_options(model, recompute, False, 2 if recompute else 1)
    made = engine.build(model, config, 1, zero=zero, precision="fp32")
    update = PolicyUpdate(made, config, reference() if config.kl else None)
    rank, world = dist.get_rank(), dist.get_world_size()
    every, advantages = prompts(), group_advantages(torch.tensor(REWARDS))
    places = list(range(4))[rank::world]
    found: dict[str, Any] = {"passes": 0}
    step, backward = made.step, made.backward

    def watched() -> None:
        found["gradients"] = {
            name: (safe_get_full_grad(p) if zero else p.grad).clone() for name, p in model.named_parameters()
        }
        step()

    def counted(loss: torch.Tensor) -> None:
        found["passes"] += 1
        backward(loss)

    made.step, made.backward = watched, counted
    [metrics] = update.run([every[i] for i in places], advantages[places], [slice(0, len(places))])
    return found | {"metrics": metrics}


CASES = [
    (0, "gspo", 0, False),
    (2, "dapo", 24, True),
    (3, "gspo", 24, True),
    (3, "dapo", 0, False),
]


def updates() -> list[dict[str, Any]]:
    return [update_of(*case) for case in CASES]


def check(ranks: list[list[dict[str, Any]]], cases: list[tuple[Any, ...]]) -> None:
    for place, (zero, loss, budget, recompute, *_) in enumerate(cases):
        found, (expected, entropy, value) = [rank[place] for rank in ranks], one_pass(loss)
        assert {one["passes"] for one in found} == {found[0]["passes"]}
        assert (found[0]["passes"] > 1) == bool(budget)
        assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
        for one in found:
            for name, gradient in expected.items():
                torch.testing.assert_close(
                    one["gradients"][name], gradient, atol=1e-6, rtol=1e-4, msg=f"{zero} {loss} {recompute} {name}"
                )
        counted = [one["metrics"].entropy for one in found]
        measured = sum(len(c) for group in prompts()[: 4 if KL[loss] else 3] for c in group.completions)
        assert sum(one.count for one in counted) == measured
        assert sum(one["metrics"].loss for one in found) / len(found) == pytest.approx(value, abs=1e-6)
        if measured == len(entropy):
            assert sum(one.total for one in counted) == pytest.approx(float(entropy.double().sum()), rel=1e-6)


def test_two_ranks_that_share_rows_have_the_gradient_of_one_pass():
    check(run_distributed(updates, 2, 240), CASES)


FOUR = [(3, "gspo", 24, True), (2, "dapo", 24, False)]


def updates_of_four() -> list[dict[str, Any]]:
    return [update_of(*case) for case in FOUR]


@pytest.mark.slow
def test_two_groups_of_two_ranks_with_different_questions_make_the_same_passes():
    check(run_distributed(updates_of_four, 4, 400), FOUR)


def refused() -> str:
    engine.start(threads=1)
    model = policy()
    config = settings_of("gspo", 0, sequence_parallel=2)
    made = engine.build(model, config, 1, zero=0, precision="fp32")
    made.module.config.text_config.num_attention_heads = 3
    with pytest.raises(RecipeError) as caught:
        PolicyUpdate(made, replace(config, sequence_parallel=2))
    return str(caught.value)


def test_ranks_that_do_not_divide_the_heads_are_refused_before_the_first_step():
    [said] = run_distributed(refused, 1, 120)
    assert said == "gspo.sequence_parallel = 2 does not divide the model's 3 attention heads; lower it"
