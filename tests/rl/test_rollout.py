"""Rollouts carry the plan, and their log-probabilities are those of the training forward."""

import pytest
import torch

from rl.policy import Group, continued_positions, score, vision_inputs
from rl.rollout import InProcessRollout


@pytest.fixture
def engine(model, processor) -> InProcessRollout:
    return InProcessRollout(model, processor, torch.Generator().manual_seed(1), batch=6)


def test_groups_follow_their_prompts_and_carry_the_plans(engine, prompts):
    groups = engine.generate(prompts, 3, 1.0, 5)
    assert [len(group.completions) for group in groups] == [3, 3, 3]
    assert all(group.sample is prompt for group, prompt in zip(groups, prompts, strict=True))
    assert [[len(plan) for plan in group.sample.plans] for group in groups] == [[3], [5], []]
    banned = {engine.model.config.image_token_id, engine.model.config.video_token_id}
    for group in groups:
        for tokens, finished in zip(group.completions, group.finished, strict=True):
            assert (tokens[-1] == engine.end) == finished and engine.end not in tokens[:-1]
            assert finished or len(tokens) == 5
            assert not banned & set(tokens.tolist())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_generation_equal_those_of_training(engine, prompts, temperature):
    groups = engine.generate(prompts, 4, temperature, 6)
    seen = torch.cat([row for group in groups for row in group.log_probs])
    scored = score(engine.model, groups, temperature)
    assert scored.log_probs.dtype == torch.float32
    torch.testing.assert_close(scored.log_probs.detach(), seen, atol=2e-5, rtol=1e-4)
    assert (scored.entropy >= 0).all()
    assert scored.owner.bincount().tolist() == [len(c) for group in groups for c in group.completions]


def test_shared_prompt_gives_the_log_probs_and_gradients_of_separate_sequences(engine, prompts):
    model, groups = engine.model, engine.generate(prompts, 3, 1.0, 4)
    shared = score(model, groups).log_probs
    separate = []
    for group in groups:
        sample = group.sample
        for completion in group.completions:
            logits = model(
                input_ids=torch.cat([sample.input_ids, completion])[None],
                position_ids=torch.cat([sample.position_ids, continued_positions(sample, len(completion))], 1)[:, None],
                **vision_inputs([sample], torch.device("cpu")),
            ).logits[0, len(sample) - 1 : -1]
            logits[:, [model.config.image_token_id, model.config.video_token_id]] = float("-inf")
            separate.append(logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0])
    separate = torch.cat(separate)
    torch.testing.assert_close(shared, separate, atol=2e-5, rtol=1e-4)
    weights = torch.randn(len(shared))
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad((shared * weights).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((separate * weights).sum(), parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_greedy_is_repeatable_and_sampling_follows_the_generator(model, processor, prompts):
    def draw(seed: int, temperature: float) -> list[list[int]]:
        engine = InProcessRollout(model, processor, torch.Generator().manual_seed(seed))
        groups: list[Group] = engine.generate(prompts, 2, temperature, 6)
        return [row.tolist() for group in groups for row in group.completions]

    assert draw(0, 0.0) == draw(1, 0.0)
    assert draw(0, 1.0) == draw(0, 1.0) != draw(1, 1.0)
