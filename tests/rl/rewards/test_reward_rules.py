"""Rewards, literally."""

from pathlib import Path

import pytest

from keye.errors import ManifestError, RecipeError
from rl.questions.prompts import Prompt, PromptStream, load_prompts
from rl.rewards import Judgement, rewards_from


def judged(text: str, answer: str = "3", tolerance: float | None = None, finished: bool = True) -> Judgement:
    return Judgement(Prompt("a", "count", [], answer, tolerance, (), Path()), text, finished)


@pytest.mark.parametrize(
    ("text", "answer", "tolerance", "earned"),
    [
        ("3", "3", None, 1.0),
        ("three", "3", None, 1.0),
        ("4", "3", None, 0.0),
        ("<think>one, two</think><answer>3</answer>", "3", None, 1.0),
        ("4.4", "4.0", 0.5, 1.0),
        ("4.6", "4.0", 0.5, 0.0),
        ("", "3", None, 0.0),
        ("<think>maybe <answer>3</answer></think>4", "3", None, 0.0),
        ("<think>maybe <answer>4</answer></think>3", "3", None, 1.0),
        ("3 or more", "3", None, 0.0),
        ("9" * 5000 + ":00:00", "3", None, 0.0),
    ],
)
def test_accuracy(text, answer, tolerance, earned):
    assert rewards_from({"accuracy": 1.0})(judged(text, answer, tolerance)).parts == {"accuracy": earned}


@pytest.mark.parametrize(
    ("text", "finished", "earned"),
    [
        ("red", True, 1.0),
        ("red", False, 0.0),
        (" \n", True, 0.0),
        ("red\nblue", True, 0.0),
        ("<answer>red</answer>", True, 1.0),
        ("<think>so\nso</think>\n<answer>red</answer>", True, 1.0),
        ("<answer>red</answer> surely", True, 0.0),
        ("<think>so<answer>red</answer>", True, 0.0),
        ("<answer>red</answer><answer>blue</answer>", True, 0.0),
        ("<answer> \n </answer>", True, 0.0),
        ("<think>so</think><answer></answer>", True, 0.0),
        ("<answer>so</think>red</answer>", True, 0.0),  # its answer is empty: what precedes `</think>` is thought
        ("<think>so<answer>red</answer></think>", True, 0.0),
        ("<think>so", True, 0.0),
        ("so</think>red", True, 0.0),
        ("red</answer>", True, 0.0),
    ],
)
def test_format(text, finished, earned):
    assert rewards_from({"format": 1.0})(judged(text, finished=finished)).parts == {"format": earned}


def test_sum_is_weighted_and_its_parts_are_kept():
    earned = rewards_from({"accuracy": 1.0, "format": 0.25})(judged("<answer>3"))
    assert earned.total == 1.0 and earned.parts == {"accuracy": 1.0, "format": 0.0}
    assert rewards_from({"accuracy": 0.5, "format": 0.25})(judged("3")).total == 0.75


def test_an_unfinished_completion_earns_nothing():
    earned = rewards_from({"accuracy": 1.0, "format": 0.1})(judged("3", finished=False))
    assert earned.parts == {"accuracy": 0.0, "format": 0.0}


def test_an_unknown_reward_is_named():
    with pytest.raises(RecipeError, match="'acuracy'.*accuracy, .*format"):
        rewards_from({"acuracy": 1.0})


LINE = '{{"id": "{0}", "family": "{1}", "answer": "3", "messages": [{{"role": "user", "content": "{0}?"}}]}}'


def test_a_bad_line_is_left_out_and_named(tmp_path):
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("\n".join([LINE.format("a", "count"), "{not json", LINE.format("b", "order"), "[1]"]))
    found = load_prompts(manifest)
    assert [prompt.id for prompt in found.prompts] == ["a", "b"]
    assert [Path(place).name for place in found.rejected] == ["train.jsonl:2", "train.jsonl:4"]
    assert [prompt.id for prompt in load_prompts(manifest, ["order"]).prompts] == ["b"]
    with pytest.raises(ManifestError, match="no question of the families read"):
        load_prompts(manifest, ["read"])
    with pytest.raises(ManifestError, match="nowhere.jsonl does not exist"):
        load_prompts(tmp_path / "nowhere.jsonl")


def test_ranks_share_an_epoch_and_a_stream_goes_on_from_its_state(tmp_path, processor):
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("\n".join(LINE.format(name, "count") for name in "abcdef"))
    prompts = load_prompts(manifest).prompts

    def stream() -> PromptStream:
        return PromptStream(prompts, processor, seed=3)

    def ids(source: PromptStream, count: int, mine: list[int] | None = None) -> list[str]:
        return [prompt.id for prompt, _ in source.take(count, mine)]

    whole = ids(stream(), 6)
    assert sorted(whole) == list("abcdef")
    one, two, alone = stream(), stream(), stream()
    for count, mine, others in ((6, [0, 2, 4], [1, 3, 5]), (4, [0], [1, 2, 3])):
        together = ids(alone, count)
        assert ids(one, count, mine) == [together[place] for place in mine]
        assert ids(two, count, others) == [together[place] for place in others]
    assert one.state_dict() == two.state_dict() == alone.state_dict()
    first = stream()
    ids(first, 4)
    resumed = stream()
    resumed.load_state_dict(first.state_dict())
    assert ids(resumed, 7) == ids(first, 7)


def test_a_prompt_whose_clip_is_missing_is_passed_over(tmp_path, processor):
    manifest = tmp_path / "train.jsonl"
    video = '[{"type": "video", "video": "gone.mp4"}, {"type": "text", "text": "what?"}]'
    broken = f'{{"id": "broken", "answer": "3", "messages": [{{"role": "user", "content": {video}}}]}}'
    manifest.write_text("\n".join([broken, LINE.format("a", "count")]))
    stream = PromptStream(load_prompts(manifest).prompts, processor, seed=0)
    assert [prompt.id for prompt, _ in stream.take(3)] == ["a", "a", "a"]
    assert "gone.mp4" in stream.rejected[f"{manifest}:1"]
