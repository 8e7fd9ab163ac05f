"""The gap between answers with and without frames, by hand, and the guards that follow from it."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from keye.errors import RecipeError
from rl import blindness
from rl.blindness import Blindness, BlindnessMonitor, own_metrics, partners, summary, without_media
from rl.losses import group_advantages
from rl.policy.scoring import Group
from rl.questions.prompts import Prompt
from rl.questions.sampling import Experience
from rl.recipe import load
from rl.rewards import Earned

TINY = Path(__file__).parents[2] / "rl/recipes/tiny.toml"


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(blindness, "gather", lambda value: [value])
    monkeypatch.setattr(blindness, "agree", lambda action: action())


def prompt(name: str, frames: list[int] | None, family: str = "count") -> Prompt:
    """A question about a video of plain frames of the given grey levels."""
    parts: list[dict] = [{"type": "text", "text": "how many flashes?"}]
    if frames is not None:
        clip = torch.stack([torch.full((3, 56, 56), level, dtype=torch.uint8) for level in frames])
        parts.insert(0, {"type": "video", "video": clip})
    return Prompt(name, family, [{"role": "user", "content": parts}], "3", None, (), Path("."))


def test_what_remains_of_a_question_without_its_media():
    assert without_media(prompt("a", [1])) == [
        {"role": "user", "content": [{"type": "text", "text": "how many flashes?"}]}
    ]
    url = {"type": "image_url", "image_url": {"url": "a.png"}}
    both = dataclasses.replace(
        prompt("b", None),
        messages=[
            {"role": "system", "content": "look"},
            {"role": "user", "content": [url, {"type": "text", "text": "?"}]},
        ],
    )
    assert blindness.kinds(both) == ["image"]
    assert without_media(both)[1]["content"] == [{"type": "text", "text": "?"}]


def test_partners_have_other_media_and_if_possible_the_same_family():
    def still(name: str, file: str, family: str) -> Prompt:
        parts = [{"type": "image", "image": file}, {"type": "text", "text": "?"}]
        return dataclasses.replace(prompt(name, None, family), messages=[{"role": "user", "content": parts}])

    questions = [still("a", "1", "x"), still("b", "1", "x"), still("c", "2", "y"), still("d", "3", "x")]
    assert [other.id for other in partners(questions)] == ["d", "d", "d", "a"]
    assert partners(questions[:2]) == [None, None]


def test_the_gaps_by_hand():
    rows = [
        {"none": 1.0, "blind": 0.25, "shuffled": 1.0},
        {"none": 0.5, "blind": 0.5, "zeroed": 0.0},
    ]
    assert summary(rows) == {
        "seen": 0.75,
        "blind/blind": 0.375, "gap/blind": 0.375,
        "blind/zeroed": 0.0, "gap/zeroed": 0.5,
        "blind/shuffled": 1.0, "gap/shuffled": 0.0,
        "gap/smallest": 0.375,  # not that of "shuffled", which leaves the frames there
    }  # fmt: skip
    assert summary([]) == {}
    assert own_metrics([(1.0, 0.75, 0), (0.5, 0.0, 4)], Blindness()) == {
        "blind/own": 0.375, "gap/own": 0.375, "blind/answered": 0.5,
    }  # fmt: skip
    assert own_metrics([], Blindness()) == {}
    # With four options 0.5 is chance and 0.25 more; with six options it is above that, without options below 0.75.
    rows = [(1.0, 0.5, 4), (1.0, 0.375, 4), (1.0, 0.5, 6), (1.0, 0.5, 0)]
    assert own_metrics(rows, Blindness(drop_over_chance=0.25))["blind/answered"] == 0.5


def test_a_probe_asks_the_same_questions_under_each_control(processor):
    questions = [prompt("a", [0, 80, 160, 240]), prompt("b", [250, 170, 90, 10]), prompt("c", None)]
    asked: list[list] = []

    def ask(batch, samples):
        asked.append([sample for _, sample in batch])
        # Right only with the first clip's frames in their order: it reads the pixels.
        values = [s.pixel_values_videos for s in asked[-1]]
        means = [None if v is None else v.float().mean((1, 2, 3)) for v in values]
        return [0.0 if m is None or m.std() == 0 else float((m.diff() >= 0).all()) for m in means]

    monitor = BlindnessMonitor(Blindness(every=2), questions, processor, ask)
    assert monitor.probe(1) == {}
    found = monitor.probe(2)
    assert [len(batch) for batch in asked] == [2] * 5
    seen, blind, zeroed, shuffled, other = asked
    assert [s.visual_tokens for s in blind] == [0, 0]
    for batch in (zeroed, shuffled, other):
        assert all(torch.equal(s.input_ids, t.input_ids) for s, t in zip(batch, seen, strict=True))
    assert all(not s.pixel_values_videos.any() for s in zeroed)
    means = [s.pixel_values_videos.float().mean() for s in seen]
    assert other[0].pixel_values_videos.float().mean() == pytest.approx(float(means[1]), abs=2)
    assert shuffled[0].pixel_values_videos.float().mean() == pytest.approx(float(means[0]), abs=2)
    assert found["seen"] == 0.5 and found["gap/blind"] == found["gap/zeroed"] == 0.5
    assert found["gap/other"] == 0.0  # the clip of b is right with the frames of a, and a wrong with those of b


def test_a_question_whose_clip_cannot_be_read_is_left_out_of_a_probe(processor, tmp_path):
    gone = prompt("gone", None)
    parts = [{"type": "video", "video": str(tmp_path / "gone.mp4")}, {"type": "text", "text": "?"}]
    gone = dataclasses.replace(gone, messages=[{"role": "user", "content": parts}])
    config = Blindness(every=1, controls=("blind",))
    monitor = BlindnessMonitor(config, [gone, prompt("a", [0, 100])], processor, lambda batch, n: [0.5] * len(batch))
    assert monitor.probe(1) == {"seen": 0.5, "blind/blind": 0.5, "gap/blind": 0.0, "gap/smallest": 0.0}


def test_the_run_stops_after_some_probes_with_a_small_gap(processor):
    accuracies = iter([0.8, 0.3, 0.05, 0.0, 0.8, 0.75, 0.8, 0.3, 0.8, 0.75, 0.8, 0.8])  # seen, blind, seen, blind, …
    config = Blindness(every=1, controls=("blind",), guard="stop", stop_probes=2)
    monitor = BlindnessMonitor(config, [prompt("a", [0, 100])], processor, lambda batch, n: [next(accuracies)])
    lows, stops = [], []
    for step in range(1, 7):
        monitor.probe(step)
        lows.append(monitor.low)
        stops.append(monitor.stopped)
    # The second probe does not count: a policy that is never right says nothing about its gap.
    assert lows == [0, 0, 1, 0, 1, 2] and stops == [False] * 5 + [True]
    resumed = BlindnessMonitor(config, [prompt("a", [0, 100])], processor, lambda batch, n: [])
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.stopped and "stop_gap = 0.1" in resumed.reason(6) and "step 6" in resumed.reason(6)


def experience() -> Experience:
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    prompts = [prompt("a", [0, 100]), prompt("b", [0, 100]), prompt("c", None)]
    groups = [Group(None, [], [], [], [])] * 3
    return Experience(prompts, groups, [[Earned(1.0, {})] * 2] * 3, rewards, group_advantages(rewards), [slice(0, 3)])


@pytest.mark.parametrize(
    ("guard", "factors"), [("off", [1, 1, 1]), ("stop", [1, 1, 1]), ("drop", [0, 1, 1]), ("penalise", [0.25, 0.5, 1])]
)
def test_a_guard_acts_on_questions_that_are_answered_without_frames(processor, guard, factors):
    asked = []

    def ask(batch, samples):
        asked.extend(batch)
        return [0.75, 0.5]

    every = 1 if guard == "stop" else 0
    questions = [prompt("a", [0, 100])]
    monitor = BlindnessMonitor(Blindness(guard=guard, every=every), questions, processor, ask)
    before = experience()
    found = monitor.guarded(before)
    assert torch.equal(found.advantages, before.advantages * torch.tensor(factors)[:, None])
    if guard in ("drop", "penalise"):
        assert [p.id for p, _ in asked] == ["a", "b"] and all(s.visual_tokens == 0 for _, s in asked)
        assert found.blind[:2].tolist() == [0.75, 0.5] and math.isnan(found.blind[2])
    else:
        assert not asked and found.blind is None


@pytest.mark.parametrize(
    ("options", "over", "blind", "kept"),
    [
        (2, 0.0, 0.7, True),  # the key is off: only drop_above counts
        (2, 0.0, 0.75, False),
        (4, 0.25, 0.4, True),
        (4, 0.25, 0.5, False),
        (6, 0.3, 0.45, True),
        (6, 0.3, 0.5, False),
        (2, 0.4, 0.75, False),  # chance and 0.4 more is above drop_above, which still counts
        (0, 0.1, 0.7, True),  # without options no chance is known
    ],
)
def test_the_guard_drop_compares_with_chance(processor, options, over, blind, kept):
    asked = dataclasses.replace(prompt("a", [0, 100]), options=tuple("abcdef"[:options]))
    before = dataclasses.replace(experience(), prompts=[asked, *experience().prompts[1:]])
    config = Blindness(guard="drop", drop_over_chance=over)
    monitor = BlindnessMonitor(config, [], processor, lambda batch, n: [blind, 0.0])
    found = monitor.guarded(before)
    assert torch.equal(found.advantages[0], before.advantages[0] * kept)
    assert torch.equal(found.advantages[1:], before.advantages[1:])


@pytest.mark.parametrize(
    ("gap", "seen", "blind", "kept"),
    [
        (-1.0, [0.0, 0.0, 1.0, 0.0], 0.5, True),
        (0.0, [0.0, 0.0, 1.0, 0.0], 0.5, False),  # looking does not help
        (0.0, [0.0, 0.0, 1.0, 0.0], 0.25, False),
        (0.0, [1.0, 0.0, 1.0, 0.0], 0.25, True),
        (0.25, [1.0, 0.0, 1.0, 0.0], 0.25, False),
        (0.0, [1.0, 1.0, 1.0, 0.0], 0.75, False),  # drop_above
    ],
)
def test_the_guard_drop_keeps_questions_for_which_looking_helps(processor, gap, seen, blind, kept):
    earned = [Earned(value + 0.1, {"accuracy": value, "format": 0.1}) for value in seen]
    rewards = torch.tensor([[one.total for one in earned]])
    groups, advantages = [Group(None, [], [], [], [])], group_advantages(rewards)
    before = Experience([prompt("a", [0, 100])], groups, [earned], rewards, advantages, [slice(0, 1)])
    config = Blindness(guard="drop", drop_gap=gap)
    found = BlindnessMonitor(config, [], processor, lambda batch, n: [blind]).guarded(before)
    assert torch.equal(found.advantages, before.advantages * kept)
    assert own_metrics([(sum(seen) / 4, blind, 0)], config)["blind/answered"] == (not kept)


def test_a_lower_reward_for_all_right_answers_of_a_group_would_change_nothing():
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    torch.testing.assert_close(group_advantages(rewards * 0.25), group_advantages(rewards))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("blindness.guard='of'", "must be one of off, drop, penalise, stop"),
        ("blindness.guard='stop'", "needs blindness.every above 0"),
        ("blindness.controls=['masked']", "blindness.controls names ['masked']"),
        ("blindness.drop_above=0", "blindness.drop_above must be above 0"),
        ("blindness.drop_over_chance=1.0", "blindness.drop_over_chance must be at least 0 and below 1"),
        ("blindness.drop_gap=1.0", "blindness.drop_gap must be at least -1 and below 1"),
        ("blindness.samples=0", "blindness.samples must be at least 1"),
        ("heldout.every=-1", "heldout.every must be at least 0"),
        ("gspo.curriculum_floor=0.0", "gspo.curriculum_floor must be above 0"),
        ("gspo.extra_prompts=-1", "gspo.extra_prompts must be at least 0"),
    ],
)
def test_an_impossible_value_is_named(override, said):
    with pytest.raises(RecipeError) as caught:
        load(TINY, [override])
    assert said in str(caught.value)


def test_probes_need_a_question_with_media(processor):
    with pytest.raises(RecipeError, match="no held-out question has images or videos"):
        BlindnessMonitor(Blindness(every=1), [prompt("c", None)], processor, lambda batch, n: [])
