"""Rollouts carry the plan, their log-probabilities are those of the training forward, and batches do not matter."""

import pytest
import torch

from keye.errors import KeyeError
from rl.policy.scoring import Group, continued_positions, score, token_log_probs, vision_inputs
from rl.rollout import InProcessRollout
from rl.rollout.cache import RolloutCache, token_bytes


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
            assert (int(tokens[-1]) in engine.ends) == finished and not engine.ends & set(tokens[:-1].tolist())
            assert finished or len(tokens) == 5
            assert not banned & set(tokens.tolist())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_generation_equal_those_of_training(engine, prompts, temperature):
    groups = engine.generate(prompts, 4, temperature, 6)
    seen = torch.cat([row for group in groups for row in group.log_probs])
    scored = score(engine.model, groups, temperature)
    assert scored.log_probs.dtype == torch.float32
    torch.testing.assert_close(scored.log_probs.detach(), seen, atol=1e-5, rtol=0)
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


KEYS = [(7, 0, 3, place) for place in range(3)]


def tokens_of(groups: list[Group]) -> list[list[list[int]]]:
    return [[row.tolist() for row in group.completions] for group in groups]


def test_tokens_do_not_depend_on_batches_refilling_order_or_processes(model, processor, prompts):
    def draw(batch: int, numbers: list[int], cache_bytes: int = 1 << 30) -> list[list[list[int]]]:
        engine = InProcessRollout(model, processor, batch=batch, cache_bytes=cache_bytes)
        chosen = [prompts[n] for n in numbers], 4, 1.0, 12, [KEYS[n] for n in numbers]
        return tokens_of(engine.generate(*chosen))

    together = draw(12, [0, 1, 2])
    assert draw(1, [0, 1, 2]) == draw(5, [0, 1, 2]) == together
    assert draw(7, [2, 0, 1]) == [together[2], together[0], together[1]]
    assert draw(3, [0, 2]) + draw(3, [1]) == [together[0], together[2], together[1]]  # as two processes divide them
    longest = (max(map(len, prompts)) + 2 * 12) * token_bytes(model)
    assert draw(12, [0, 1, 2], longest) == together
    rows = [row for group in together for row in group]
    assert len({tuple(row) for row in rows}) == len(rows)


def test_greedy_tokens_are_those_of_generate(model, processor, prompts):
    engine = InProcessRollout(model, processor, batch=2)
    for group in engine.generate(prompts, 1, 0.0, 20):
        inputs = processor.collate([group.sample])
        del inputs["labels"]
        output = model.generate(
            **inputs, max_new_tokens=20, do_sample=False, eos_token_id=sorted(engine.ends), pad_token_id=0,
            suppress_tokens=[model.config.image_token_id, model.config.video_token_id],
        )  # fmt: skip
        assert group.completions[0].tolist() == output[0, len(group.sample) :].tolist()


def test_rows_that_end_are_refilled_at_once(model, processor, prompts, monkeypatch):
    """Every pass has a row for each place of the batch while completions wait."""
    sizes: list[int] = []
    begin = RolloutCache.begin

    def counted(self: RolloutCache, rows: list[int], lengths: list[int], device: torch.device) -> None:
        sizes.append(len(rows))
        begin(self, rows, lengths, device)

    monkeypatch.setattr(RolloutCache, "begin", counted)
    engine = InProcessRollout(model, processor, batch=4)
    engine.ends |= set(range(0, len(processor.tokenizer), 5))  # a fifth of all tokens ends a completion
    groups = engine.generate(prompts * 2, 6, 1.0, 30, [(n,) for n in range(6)])
    lengths = [len(row) for group in groups for row in group.completions]
    assert len(set(lengths)) > 5 and 1 in lengths
    assert sum(sizes) == sum(length - 1 for length in lengths)
    # Full until the queue is empty; then the last four rows end one by one.
    assert sizes == sorted(sizes, reverse=True) and sizes.count(4) >= len(sizes) - 3 * 29


def test_keys_and_values_stay_within_the_bound(model, processor, prompts, monkeypatch):
    per_token, longest = token_bytes(model), max(map(len, prompts))
    budget = (longest + 3 * 8) * per_token
    seen: list[int] = []
    append = RolloutCache._append

    def measured(self: RolloutCache, *args: object) -> object:
        result = append(self, *args)
        held = [x for block in self._blocks for pair in block.layers for x in pair]
        seen.append(sum(x.numel() * x.element_size() for x in (*held, *(x for pair in self._own for x in pair))))
        return result

    monkeypatch.setattr(RolloutCache, "_append", measured)
    InProcessRollout(model, processor, cache_bytes=budget).generate(prompts, 5, 1.0, 8)
    assert max(seen) <= budget
    with pytest.raises(KeyeError, match="cache_mb"):
        InProcessRollout(model, processor, cache_bytes=longest * per_token).generate(prompts, 5, 1.0, 8)


def test_cut_sampling_records_both_log_probs(model, processor, prompts):
    engine = InProcessRollout(model, processor, top_k=3)
    group = engine.generate(prompts[:1], 3, 0.8, 6)[0]
    scored = score(model, [group], 0.8)
    torch.testing.assert_close(torch.cat(group.log_probs), scored.log_probs.detach(), atol=1e-5, rtol=0)
    sample, completion = group.sample, group.completions[0]
    positions = torch.cat([sample.position_ids, continued_positions(sample, len(completion))], 1)[:, None]
    ids, device = torch.cat([sample.input_ids, completion])[None], torch.device("cpu")
    logits = model(input_ids=ids, position_ids=positions, **vision_inputs([sample], device)).logits
    table = token_log_probs(logits[0, len(sample) - 1 : -1], 0.8, engine.sampler.banned).detach()
    kept = table.topk(3).values.logsumexp(-1)
    chosen = table.gather(-1, completion[:, None])[:, 0]
    torch.testing.assert_close(group.sampler_log_probs[0], chosen - kept, atol=1e-5, rtol=0)
    assert engine.generate(prompts[:1], 1, 0.0, 2)[0].sampler_log_probs is not None


def test_end_tokens_of_stream_config_and_recipe_end_a_completion(model, processor, prompts):
    model.generation_config.eos_token_id = [11, 12]
    engine = InProcessRollout(model, processor, stop_tokens=[13])
    special = set(processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert engine.ends == special | {11, 12, 13}
    free = InProcessRollout(model, processor)
    row = free.generate(prompts[:1], 1, 1.0, 8, [(1,)])[0].completions[0].tolist()
    stopped = InProcessRollout(model, processor, stop_tokens=[row[2]]).generate(prompts[:1], 1, 1.0, 8, [(1,)])[0]
    assert stopped.completions[0].tolist() == row[: row.index(row[2]) + 1] and stopped.finished == [True]


def test_an_error_leaves_the_model_in_its_mode(model, processor, prompts, monkeypatch):
    model.train()
    monkeypatch.setattr(RolloutCache, "check_end", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        InProcessRollout(model, processor).generate(prompts[:1], 2, 1.0, 4)
    assert model.training


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_have_diverged_end_the_rollout_with_a_sentence(model, processor, prompts, temperature):
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(KeyeError, match="weights have diverged"):
        InProcessRollout(model, processor).generate(prompts, 2, temperature, 4)
