"""A mini-batch in micro-batches of a token budget: nothing is lost, and the gradient is that of one pass."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.model import heads
from keye.processor.processor import Sample
from rl.losses import LossInput, build_loss, group_advantages
from rl.policy.microbatch import pad, split
from rl.policy.scoring import Group, score
from rl.policy.update import PolicyUpdate
from rl.recipe import Gspo
from stages.distributed import engine
from tests.distributed import run_distributed
from tests.rl.test_two_processes import GROUP, REWARDS, policy, prompts

KL = {"gspo": 0.0, "dapo": 0.1}


def group_of(prompt: int, lengths: list[int], mark: int) -> Group:
    """A group whose completions are filled with the number of the sequence."""
    ids = torch.zeros(prompt, dtype=torch.long)
    sample = Sample(input_ids=ids, labels=ids, position_ids=ids.expand(3, -1))
    completions = [torch.full((n,), mark + i) for i, n in enumerate(lengths)]
    return Group(sample, completions, [torch.zeros(n) for n in lengths], [True] * len(lengths), [""] * len(lengths))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=3, max_size=3)), min_size=1, max_size=5
    ),
    st.integers(1, 60),
)
def test_every_completion_is_in_one_micro_batch_with_its_prompt_and_advantage(sizes, budget):
    groups = [group_of(prompt, lengths, 3 * i) for i, (prompt, lengths) in enumerate(sizes)]
    advantages = torch.arange(3.0 * len(groups)).view(-1, 3)
    batches = split(groups, advantages, budget)
    seen = []
    for batch in batches:
        completions = [(group, c) for group in batch.groups for c in group.completions]
        marks = [int(c[0]) for _, c in completions]
        assert batch.advantages.tolist() == marks
        for (group, completion), mark in zip(completions, marks, strict=True):
            prompt, lengths = sizes[mark // 3]
            assert (len(group.sample.input_ids), len(completion)) == (prompt, lengths[mark % 3])
        # Only a completion that does not fit beside its prompt exceeds the budget, and it is alone.
        assert batch.tokens <= budget or len(completions) == 1
        seen += marks
    assert sorted(seen) == list(range(3 * len(groups)))


def test_a_group_that_does_not_fit_repeats_its_prompt_and_small_groups_share_a_pass():
    groups = [group_of(10, [4, 4, 4], 0), group_of(3, [1, 1, 1], 3), group_of(3, [1, 1, 1], 6)]
    batches = split(groups, torch.arange(9.0).view(3, 3), 18)
    # 10 + 4 + 4 = 18 and 10 + 4 = 14; 6 + 6 = 12
    assert [batch.tokens for batch in batches] == [18, 14, 12]
    assert [len(batch.groups) for batch in batches] == [1, 1, 2]
    assert split(groups, torch.zeros(3, 3), 0)[0].tokens == 22 + 6 + 6
    idle = pad(batches, 5, groups)[3:]
    assert [(batch.tokens, batch.weight) for batch in idle] == [(4, 0.0)] * 2
    assert [(batch.tokens, batch.weight) for batch in pad([], 1, groups)] == [(4, 0.0)]


def settings_of(loss: str, budget: int, **more: Any) -> Gspo:
    return Gspo(steps=1, learning_rate=1e-3, prompts=4, group_size=GROUP, mini_batches=1, max_new_tokens=4, loss=loss,
                micro_batch_tokens=budget, kl=KL[loss], max_grad_norm=0.0, **more)  # fmt: skip


def reference() -> Any:
    """Another model than the policy, so that the KL has a gradient."""
    model = policy()
    with torch.no_grad():
        for parameter in model.lm_head.parameters():
            parameter *= 1.1
    return model


def one_pass(loss: str) -> dict[str, torch.Tensor]:
    """Gradients of all groups in one pass, without DeepSpeed."""
    model, groups = policy(), prompts()
    new = score(model, groups)
    with torch.no_grad():
        other = score(reference(), groups).log_probs
    advantages = group_advantages(torch.tensor(REWARDS)).flatten()
    batch = LossInput(new.log_probs, new.log_probs.detach(), new.owner, advantages, 4 * GROUP, len(new.owner), 4, other)
    build_loss(loss, kl=KL[loss])(batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def update_of(zero: int, loss: str, budget: int) -> dict[str, Any]:
    """The gradients that DeepSpeed steps with, and the number of passes on this rank."""
    engine.start(threads=1)
    config = settings_of(loss, budget)
    model = policy()
    made = engine.build(model, config, 1, zero=zero, precision="fp32")
    update = PolicyUpdate(made, config, reference() if config.kl else None)
    rank, world = dist.get_rank(), dist.get_world_size()
    every, advantages = prompts(), group_advantages(torch.tensor(REWARDS))
    places = list(range(4))[rank::world]
    # Rank 0 has prompts with equal rewards (3) or long ones: the ranks have different numbers of micro-batches.
    found: dict[str, Any] = {"passes": 0}
    step, backward = made.step, made.backward

    def watched() -> None:
        named = model.named_parameters()
        found["gradients"] = {
            name: (safe_get_full_grad(p) if zero else p.grad).clone() for name, p in named if zero or p.grad is not None
        }
        step()

    def counted(loss: torch.Tensor) -> None:
        found["passes"] += 1
        backward(loss)

    made.step, made.backward = watched, counted
    [metrics] = update.run([every[i] for i in places], advantages[places], [slice(0, len(places))])
    return found | {"metrics": metrics}


CASES = ((2, "gspo", 9), (0, "dapo", 14))


def updates() -> list[dict[str, Any]]:
    return [update_of(*case) for case in CASES]


def test_processes_with_micro_batches_have_the_gradient_of_one_pass():
    ranks = run_distributed(updates, 2, 240)
    for place, (_, loss, _) in enumerate(CASES):
        found, expected = [rank[place] for rank in ranks], one_pass(loss)
        assert found[0]["passes"] > 2 and {one["passes"] for one in found} == {found[0]["passes"]}
        assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
        for one in found:
            for name, gradient in expected.items():
                torch.testing.assert_close(one["gradients"][name], gradient, atol=1e-6, rtol=1e-4, msg=name)
        # Every sequence that has a gradient is measured once, on one rank only; padding is not measured.
        measured = sum(len(c) for group in prompts()[: 4 if KL[loss] else 3] for c in group.completions)
        assert sum(one["metrics"].entropy.count for one in found) == measured


def without_advantage() -> dict[str, Any]:
    """Two mini-batches of one prompt each; on rank 0 the first has no advantage, on rank 1 neither has one."""
    engine.start(threads=1)
    model, config = policy(), replace(settings_of("gspo", 0), mini_batches=2)
    made = engine.build(model, config, 2, zero=2, precision="fp32")
    before = [p.detach().clone() for p in model.parameters()]
    advantages = torch.tensor([[0.0] * GROUP, [1.0, -1.0] + [0.0] * (GROUP - 2)]) * (1 - dist.get_rank())
    updates = PolicyUpdate(made, config).run(prompts()[:2], advantages, [slice(0, 1), slice(1, 2)])
    moved = any(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    return {"counts": [update.entropy.count for update in updates], "moved": moved, "updates": updates}


def test_a_mini_batch_without_an_advantage_takes_part_and_is_not_measured():
    first, second = run_distributed(without_advantage, 2, 120)
    assert first["counts"] == [0, sum(map(len, prompts()[1].completions))] and second["counts"] == [0, 0]
    assert first["moved"] and second["moved"]  # by the second mini-batch of rank 0
    assert [update.loss for update in second["updates"]] == [0, 0] and second["updates"][0].grad_norm == 0


def test_one_micro_batch_is_the_pass_of_the_whole_mini_batch():
    groups = prompts()
    advantages = group_advantages(torch.tensor(REWARDS))
    [batch] = split(groups, advantages, 0)
    assert batch.groups is groups and torch.equal(batch.advantages, advantages.flatten())
    [same] = split(groups, advantages, 10_000)
    assert same.tokens == batch.tokens
    assert replace(batch, groups=[]).tokens == 0


def test_the_head_in_chunks_has_the_scores_and_gradients_of_all_rows_together(monkeypatch):
    found = []
    for chunk in (1024, 3):
        monkeypatch.setattr(heads, "SCORE_CHUNK", chunk)
        model = policy()
        scores = score(model, prompts())
        weight = torch.randn(len(scores.log_probs), generator=torch.Generator().manual_seed(0))
        (scores.log_probs * weight).mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([scores.log_probs.detach(), scores.entropy, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert len(scores.log_probs) > 6
