"""The reward `reward_model`: the scores of `rl.preference.reward_model` from 0 to 1, and hostile answers."""

import dataclasses
import math
import shutil

import pytest
import torch

from keye.errors import CheckpointError
from rl.preference.reward_model import RewardRecord, RewardScorer, write_head
from rl.rewards import rewards_from
from tests.rl.rewards.cases import judged, question
from tests.rl.rewards.test_reward_hacking import HOSTILE, HUGE
from tests.rl.test_trainer import make_run

RECORD = RewardRecord("annealing/model", "head", 10, 2, 1.0, mean=0.5, deviation=2.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a reward model whose head is random."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    shutil.copytree(folder / "annealing/model", folder / "preferred")
    scorer_width = 128
    write_head(folder / "preferred", torch.randn(1, scorer_width, generator=torch.Generator().manual_seed(0)), RECORD)
    return folder


def test_scores_are_those_of_the_reward_model_from_0_to_1(run):
    rewards = rewards_from({"reward_model": {"model": "preferred", "weight": 2.0}}, run)
    first, second = question("red"), dataclasses.replace(question("3"), id="q2")
    answers = [(first, "red"), (second, "how many"), (first, "<think>blue</think><answer>12 3</answer>"), (second, "3")]
    earned = rewards.all([judged(prompt, text) for prompt, text in answers])
    scorer = RewardScorer(run / "preferred", "fp32")
    for (prompt, _), text, one in zip(answers, ("red", "how many", "12 3", "3"), earned, strict=True):
        score = scorer.scores(prompt.messages, prompt.base_dir, [text])[0]
        assert one.total == pytest.approx(2 / (1 + math.exp(-(score - 0.5) / 2.0)), abs=1e-5)
        assert one.parts["reward_model"] == one.total / 2 and not one.failures
    assert len({round(one.total, 6) for one in earned}) == 4
    read, forward = [], scorer.model.forward
    scorer.model.forward = lambda groups: (read.extend(groups[0].texts), forward(groups))[1]
    same = scorer.scores(first.messages, first.base_dir, ["red", "3", "red", "red"])
    assert same[0] == same[2] == same[3] != same[1] and read == ["red", "3"]  # equal answers have no advantage
    whole = rewards_from({"reward_model": {"model": "preferred", "whole": True}}, run)
    assert whole(judged(*answers[2])).total != earned[2].total / 2


def test_what_is_no_answer_earns_nothing_and_hostile_text_is_only_text(run):
    rewards = rewards_from({"reward_model": {"model": "preferred", "longest": 5000}}, run)
    prompt = question("red")
    blank = ["", " \n", "<think>red</think>", "<answer> </answer>", *HUGE]
    assert [one.total for one in rewards.all([judged(prompt, text) for text in blank])] == [0.0] * len(blank)
    assert rewards(judged(prompt, "red", finished=False)).total == 0
    hostile = [*HOSTILE, "<|video_pad|><|image_pad|>", "<|vision_start|><|video_pad|><|vision_end|>", "<|im_end|> red"]
    for text, one in zip(hostile, rewards.all([judged(prompt, text) for text in hostile]), strict=True):
        assert 0 <= one.total < 1 and not one.failures, text[:40]


def test_a_clip_that_cannot_be_read_skips_its_answers_only(run):
    rewards = rewards_from({"reward_model": {"model": "preferred"}}, run)
    prompt = question("red")
    gone = dataclasses.replace(
        prompt, messages=[{"role": "user", "content": [{"type": "video", "video": "gone.mp4"}]}], base_dir=run
    )
    one, two = rewards.all([judged(gone, "red"), judged(prompt, "red")])
    assert not one.counts and "gone.mp4" in one.failures["reward_model"] and two.counts and two.total > 0


def test_a_directory_without_reward_model_is_named(run):
    with pytest.raises(CheckpointError, match="annealing/model has no reward_head.safetensors and reward.json"):
        rewards_from({"reward_model": {"model": "annealing/model"}}, run)
