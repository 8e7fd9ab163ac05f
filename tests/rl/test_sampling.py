"""Which questions a step asks: too long ones are left out, flat groups are replaced, accuracy guides the draws."""

import json
from collections import Counter

import pytest
import torch

from keye.errors import CheckpointError, ManifestError
from rl.losses import group_advantages
from rl.policy.scoring import Group
from rl.questions import sampling
from rl.questions.prompts import PromptStream, load_prompts
from rl.questions.sampling import Curriculum, Experience, accuracy_of, replace_flat
from rl.rewards import Earned


@pytest.fixture
def questions(tmp_path):
    """Nine questions whose words grow in number."""
    lines = [
        {"id": str(i), "answer": str(i), "messages": [{"role": "user", "content": "how many flashes? " * (i + 1)}]}
        for i in range(9)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_prompts(path).prompts


def test_the_index_of_a_prompt_is_its_place(questions):
    assert [prompt.index for prompt in questions] == list(range(9))


def test_a_prompt_that_is_too_long_is_left_out_named_and_encoded_once(questions, processor):
    lengths = [len(processor.sample(prompt.messages, add_generation_prompt=True)) for prompt in questions]
    stream = PromptStream(questions, processor, seed=0, cache=0, max_tokens=lengths[5])
    asked = Counter(prompt.index for prompt, _ in stream.take(12))
    assert set(asked) == set(range(6)) and all(count == 2 for count in asked.values())
    assert set(stream.rejected) == {questions[i].where for i in (6, 7, 8)}
    assert f"{lengths[7]:,} tokens, more than gspo.max_prompt_tokens = {lengths[5]}" in stream.too_long[7]
    resumed = PromptStream(questions, processor, seed=0, cache=0, max_tokens=lengths[5])
    resumed.load_state_dict(json_of(stream.state_dict()))
    assert resumed.rejected == stream.rejected
    encoded = []
    encode = resumed.encode
    resumed.encode = lambda index: (encoded.append(index), encode(index))[1]
    more, others = resumed.take(6), stream.take(6)
    assert [prompt.index for prompt, _ in more] == [prompt.index for prompt, _ in others] == encoded


def json_of(state: dict) -> dict:
    """A copy of a state by way of what torch.load(weights_only=True) accepts."""
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_when_every_prompt_is_too_long_the_error_names_the_key(questions, processor):
    stream = PromptStream(questions, processor, seed=0, max_tokens=3)
    with pytest.raises(ManifestError, match=r"no prompt is short enough.*gspo.max_prompt_tokens = 3"):
        stream.take(2)


def test_probabilities_of_the_curriculum_by_hand():
    curriculum = Curriculum(4, floor=0.2)
    curriculum.observe([(1, 0.5), (2, 1.0), (3, 0.25)])
    # 0.2 + 0.8 · 4 · a (1 − a)
    assert [curriculum.probability(i) for i in range(4)] == pytest.approx([1.0, 1.0, 0.2, 0.8])
    curriculum.observe([(2, 0.0)])
    assert float(curriculum.accuracy[2]) == 0.5 and curriculum.probability(2) == 1.0


def test_the_running_accuracy_does_not_depend_on_the_order_of_the_ranks():
    rows = [(0, 0.1), (1, 0.7), (0, 0.2), (0, 0.3), (1, 0.9)]
    one, other = Curriculum(2, 0.5), Curriculum(2, 0.5)
    one.observe(rows)
    other.observe(rows[::-1])
    assert torch.equal(one.accuracy, other.accuracy)


def test_questions_are_asked_as_often_as_the_curriculum_says(questions, processor):
    curriculum = Curriculum(9, floor=0.25, seed=3)
    curriculum.observe([(0, 1.0), (1, 0.0), (2, 0.5)])
    stream = PromptStream(questions, processor, seed=3, asks=curriculum.asks)
    asked = Counter(prompt.index for prompt, _ in stream.take(3000))
    share = {i: asked[i] / stream.epoch for i in range(9)}
    assert share[2] == pytest.approx(1, abs=0.01) and share[8] == pytest.approx(1, abs=0.01)
    assert share[0] == pytest.approx(0.25, abs=0.07) and share[1] == pytest.approx(0.25, abs=0.07)


def test_without_a_curriculum_the_order_is_the_shuffled_one(questions, processor):
    plain = PromptStream(questions, processor, seed=1)
    with_one = PromptStream(questions, processor, seed=1, asks=Curriculum(9, 1.0, 1).asks)
    order = [prompt.index for prompt, _ in plain.take(20)]
    assert order == [prompt.index for prompt, _ in with_one.take(20)]
    assert sorted(order[:9]) == list(range(9))


def test_a_curriculum_continues_from_its_state_and_refuses_another_one():
    curriculum = Curriculum(4, floor=0.2)
    curriculum.observe([(1, 0.5)])
    resumed = Curriculum(4, floor=0.2)
    resumed.load_state_dict(json_of(curriculum.state_dict()))
    assert [resumed.probability(i) for i in range(4)] == [curriculum.probability(i) for i in range(4)]
    for state in ({}, Curriculum(5, 0.2).state_dict()):
        with pytest.raises(CheckpointError, match="gspo.curriculum_floor"):
            resumed.load_state_dict(state)
    Curriculum(4).load_state_dict({})


def test_accuracy_of_a_group():
    assert accuracy_of([Earned(1.1, {"accuracy": 1.0, "format": 1.0}), Earned(0.1, {"accuracy": 0.0})]) == 0.5
    assert accuracy_of([Earned(1.5, {"iou": 1.5}), Earned(-0.5, {"iou": -0.5})]) == 0.5


def answers_to(drawn, flat: set[int]) -> Experience:
    """Two answers to each question; the rewards of the questions in `flat` are equal."""
    rewards = torch.tensor([[0.0, 0.0 if prompt.index in flat else 1.0] for prompt, _ in drawn]).view(-1, 2)
    groups = [Group(sample, [], [], [], []) for _, sample in drawn]
    earned = [[Earned(float(r), {}) for r in row] for row in rewards]
    return Experience([prompt for prompt, _ in drawn], groups, earned, rewards, group_advantages(rewards), [])


@pytest.mark.parametrize(("extra", "left"), [(0, 3), (2, 2), (50, 0)])
def test_flat_groups_are_replaced_by_the_next_questions_up_to_the_limit(questions, processor, monkeypatch, extra, left):
    monkeypatch.setattr(sampling, "gather", lambda value: [value])
    monkeypatch.setattr(sampling, "agree", lambda action: action())
    stream = PromptStream(questions, processor, seed=0)
    order = [prompt.index for prompt, _ in PromptStream(questions, processor, seed=0).take(30)]
    flat = {order[0], order[2], order[3], order[4]}  # the first replacement, order[4], is flat as well
    first = answers_to(stream.take(4), flat)
    calls = []

    def answer(drawn):
        calls.append([prompt.index for prompt, _ in drawn])
        return answers_to(drawn, flat)

    found, replaced = replace_flat(first, [0, 1, 2, 3], extra, stream, answer)
    assert len(found.flat) == left
    expected = {
        0: [order[0], order[1], order[2], order[3]],
        2: [order[4], order[1], order[5], order[3]],
        50: [order[7], order[1], order[5], order[6]],
    }
    assert [prompt.index for prompt in found.prompts] == expected[extra]
    assert calls == {0: [], 2: [order[4:6]], 50: [order[4:7], order[7:8]]}[extra]
    assert [prompt.index for one in replaced for prompt in one.prompts] == {
        0: [], 2: [order[0], order[2]], 50: [order[0], order[2], order[3], order[4]],
    }[extra]  # fmt: skip
    pairs = zip(found.prompts, found.groups, strict=True)
    again = answers_to([(prompt, group.sample) for prompt, group in pairs], flat)
    assert torch.equal(found.advantages, again.advantages)
