"""Hints: where they are put, who gets them, and what they do to the update."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from keye.errors import ManifestError, RecipeError
from keye.world.families import FAMILIES, deal
from keye.world.hints import world_hints
from keye.world.manifest import question_line
from keye.world.scene import Setting
from rl.blindness import Blindness
from rl.hints import Hints, HintStage, hinted, hints_of, with_hint
from rl.losses import group_advantages
from rl.policy.scoring import Group
from rl.questions.prompts import Prompt, load_prompts
from rl.recipe import RlRecipe, load
from rl.rewards import Earned, Judgement, counted_advantages, register
from rl.trainer import GspoTrainer
from stages.distributed import engine
from tests.distributed import run_distributed
from tests.rl.test_recipe import RECIPES
from tests.rl.test_trainer import GSPO, RECIPE, make_run

HINTS = ("one", "two", "three", "four", "five")


def prompt(name: str = "a", trusted: object = True, hints: tuple[str, ...] = HINTS) -> Prompt:
    chat = [{"role": "user", "content": f"{name}?"}]
    return Prompt(name, "count", chat, "3", None, (), Path(), "", {"hints": list(hints), "trusted": trusted})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("how?", "how?\nHint: H"),
        ("how? /think", "how?\nHint: H /think"),
        ("how?\n/no_think", "how?\nHint: H\n/no_think"),
        ([{"type": "text", "text": "how?"}], [{"type": "text", "text": "how?\nHint: H"}]),
        (
            [{"type": "text", "text": "how?"}, {"type": "video", "video": "a.mp4"}],
            [
                {"type": "text", "text": "how?"},
                {"type": "video", "video": "a.mp4"},
                {"type": "text", "text": "\nHint: H"},
            ],
        ),
    ],
)
def test_a_hint_follows_the_question(content, expected):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    before = json.dumps(chat)
    assert with_hint(chat, "H")[-1]["content"] == expected and json.dumps(chat) == before


def test_a_hinted_sample_is_the_one_that_is_encoded_again(processor):
    generator = torch.Generator().manual_seed(0)
    clips = [torch.randint(0, 255, (n, 3, 56, 56), dtype=torch.uint8, generator=generator) for n in (3, 4)]
    still = torch.randint(0, 255, (3, 56, 84), dtype=torch.uint8, generator=generator)
    content = [
        {"type": "video", "video": clips[0]}, {"type": "text", "text": "how many flashes?"},
        {"type": "image", "image": still}, {"type": "video", "video": clips[1]},
        {"type": "text", "text": "red or green?"},
    ]  # fmt: skip
    chat = [{"role": "user", "content": content}]
    question = dataclasses.replace(prompt(), messages=chat)
    sample = processor.sample(chat, add_generation_prompt=True)
    asked, again = hinted(processor, (question, sample), 2)
    expected = processor.sample(with_hint(chat, "two"), add_generation_prompt=True)
    for name in ("input_ids", "position_ids", "labels", "pixel_values", "pixel_values_videos", "video_grid_thw"):
        assert torch.equal(getattr(again, name), getattr(expected, name)), name
    assert "Hint: two" in asked.messages[0]["content"][-1]["text"] and len(again) > len(sample)
    with pytest.raises(ManifestError, match="keep the images and videos"):
        processor.reworded(sample, [{"role": "user", "content": "no media"}])


def drawn_lines(each: int = 8) -> list[dict]:
    lines = []
    for family, build in FAMILIES.items():
        for index in range(each):
            setting = Setting(difficulty=(index % 5) / 4)
            draft = build(np.random.default_rng(index), setting, deal(family, setting, 0, index), index)
            content = [{"type": "text", "text": draft.question}]
            lines.append(
                question_line(f"{family}{index}", family, content, draft.answer, draft.options, None, draft.meta)
            )
    return lines


def says(text: str, answer: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\d)", text) is not None


def test_hints_of_the_world_solve_the_question_only_at_the_last_level():
    found = {}
    for line in drawn_lines():
        hints = world_hints(line)
        if hints is None:
            assert line["family"] in ("caption", "text")
            continue
        assert len(hints) == len(set(hints)) == 5 and says(hints[4], line["answer"]), hints
        if line["family"] not in ("motion", "order"):  # they name all answers
            assert not any(says(hint, line["answer"]) for hint in hints[:3]), (line["answer"], hints)
        found.setdefault(line["family"], set()).add(hints[4])
    assert len(found) == 9 and all(len(different) > 1 for different in found.values())
    assert world_hints({"family": "count", "answer": "3", "messages": [], "meta": {}}) is None


def earned(*values: float) -> list[Earned]:
    return [Earned(value, {"accuracy": value}) for value in values]


def group(samples: int, texts: tuple[str, ...] = ("x", "y")) -> Group:
    rows = [torch.arange(samples), torch.arange(samples)]
    return Group(samples, rows, [torch.full((samples,), -1.0)] * 2, [True, True], list(texts))


class Asked:
    """Answers whose level of success is fixed by the question's id: `a3` needs the hint of level 3."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, taken):
        asked = [(q.id.partition("/")[0], q.messages[0]["content"].rpartition(" ")[2]) for q, _ in taken]
        names = [":".join(pair) for pair in asked]
        self.calls.append(names)
        right = [HINTS.index(name.split(":")[1]) + 1 >= int(name[1]) for name in names]
        return [group(sample, ("h", "h")) for _, sample in taken], [earned(float(ok), 0.0) for ok in right]


class Words:
    """In place of a processor: a sample is a number of tokens."""

    def reworded(self, sample, messages, base_dir):
        return sample + 1


def advantages_of(earned: list[list[Earned]]) -> tuple[torch.Tensor, torch.Tensor]:
    return counted_advantages(earned, group_advantages)


def applied(questions: list[Prompt], right: list[float], update: str = "hinted", **more: object):
    asked = Asked()
    stage = HintStage(Hints(update), Words(), advantages_of, lambda g: torch.full((2 * len(g.completions[0]),), -2.0))
    outcomes = [earned(value, 0.0) for value in right]
    groups = [group(3) for _ in questions]
    advantages = advantages_of(outcomes)[1]
    found = stage.apply(questions, groups, outcomes, advantages, asked, **more)
    return stage, asked, groups, found


def one_rank() -> None:
    questions = [prompt("a2"), prompt("b1"), prompt("c9"), prompt("d1", trusted=False), prompt("e1", hints=())]
    stage, asked, groups, (found, advantages) = applied(questions, [0.0, 1.0, 0.0, 0.0, 0.0])
    assert asked.calls == [["a2:one", "c9:one"], ["a2:two", "c9:two"], ["c9:three"], ["c9:four"], ["c9:five"]]
    assert found[0].texts == ["h", "h"] and found[1:] == groups[1:]
    assert advantages.tolist()[:3] == [[1, -1], [1, -1], [0, 0]]
    assert stage.metrics == pytest.approx(
        {"hints/failed": 0.8, "hints/tried": 0.4}
        | {f"hints/level_{k}": [0, 0.5, 0, 0, 0][k - 1] for k in range(1, 6)}
        | {f"hints/wrong_{k}": [1, 0.5, 0.5, 0.5, 0.5][k - 1] for k in range(1, 6)}
    )
    off, asked, groups, (found, _) = applied(questions, [0.0] * 5, "off")
    assert asked.calls == [] and off.metrics == {} and found is groups
    for value in (False, 1, "true", None):
        assert hints_of(prompt(trusted=value)) == ()


def test_the_minimal_level_is_found_for_trusted_questions_that_fail():
    run_distributed(one_rank, 1, 60)


def guarded() -> None:
    questions = [prompt("a2"), prompt("b1"), prompt("c1")]
    seen = []

    def factor(place: int, outcome: list[Earned]) -> float:
        seen.append((place, [one.total for one in outcome]))
        return (0.0, 1.0, 0.25)[place]

    *_, (found, advantages) = applied(questions, [0.0] * 3, factor=factor)
    assert advantages.tolist() == [[0, 0], [1, -1], [0.25, -0.25]] and len(found) == 3
    assert seen == [(1, [1, 0]), (2, [1, 0]), (0, [1, 0])]  # in the order in which they are solved


def test_a_guard_acts_on_hinted_answers():
    run_distributed(guarded, 1, 60)


def original_prompt() -> None:
    stage, _, groups, (found, advantages) = applied([prompt("a1"), prompt("b1")], [0.0, 1.0], "original")
    assert found[0].sample == groups[0].sample == 3 and found[0].texts == ["h", "h"]
    assert [row.tolist() for row in found[0].log_probs] == [[-2.0] * 4] * 2
    # The sampler gave −1 to each token after the hint, the policy −2 after the question alone.
    assert stage.metrics["hints/importance"] == pytest.approx(math.exp(-1))
    assert advantages[0].tolist() == [1, -1] and found[1] is groups[1]


def test_the_original_prompt_is_scored_for_the_update():
    run_distributed(original_prompt, 1, 60)


def two_ranks() -> list:
    names = [["a2"], ["b1", "c4"]][dist.get_rank()]
    right = [[1.0], [0.0, 0.0]][dist.get_rank()]
    stage, asked, *_ = applied([prompt(name) for name in names], right, "original")
    return [asked.calls, stage.metrics]


def test_every_rank_makes_the_same_number_of_calls():
    (calls, metrics), (other, same) = run_distributed(two_ranks, 2, 90)
    assert metrics == same and len(calls) == len(other) == 4
    assert calls == [[]] * 4 and other[0] == ["b1:one", "c4:one"] and other[3] == ["c4:four"]
    assert metrics["hints/tried"] == pytest.approx(2 / 3) and metrics["hints/wrong_4"] == 0


@register("needs_a_hint")
class NeedsHint:
    """Right for some answers to a question with a hint of level 2."""

    in_process = True

    def __call__(self, judgement: Judgement) -> float:
        return float("two" in str(judgement.prompt.messages) and hash(judgement.text) % 2 == 0)


def trained(run: Path, update: str) -> dict:
    engine.start(threads=1)
    gspo = dataclasses.replace(GSPO, steps=1, group_size=8, max_new_tokens=4)
    recipe = dataclasses.replace(RECIPE, gspo=gspo, hints=Hints(update, reward="needs_a_hint"))
    trainer = GspoTrainer(dataclasses.replace(recipe, rewards={"needs_a_hint": 1.0}), run)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    moved = any(not torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))
    return json.loads((run / "gspo/metrics.jsonl").read_text()) | {"moved": moved}


def trained_blind(run: Path) -> dict:
    """All answers with frames are wrong, and the guard finds that the questions are answered without them."""
    engine.start(threads=1)
    gspo = dataclasses.replace(GSPO, steps=1, group_size=8, max_new_tokens=4)
    recipe = dataclasses.replace(
        RECIPE, gspo=gspo, hints=Hints("hinted", reward="needs_a_hint"), blindness=Blindness(guard="drop", samples=2)
    )
    trainer = GspoTrainer(dataclasses.replace(recipe, rewards={"needs_a_hint": 1.0}), run)
    trainer.blindness.ask = lambda asked, samples: [1.0] * len(asked)
    return trainer.train_step()


def test_the_guard_against_blindness_leaves_out_hinted_questions(tmp_path):
    run = make_run(tmp_path)
    manifest = run / "world/train.jsonl"
    Image.new("RGB", (56, 56), "red").save(run / "world/still.png")
    lines = [json.loads(line) | {"hints": HINTS, "trusted": True} for line in manifest.read_text().splitlines()]
    for line in lines:
        words = {"type": "text", "text": line["messages"][0]["content"]}
        line["messages"][0]["content"] = [{"type": "image", "image": "still.png"}, words]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [row] = run_distributed(trained_blind, 1, 120, run)
    assert row["hints/level_2"] > 0.5 and row["blind/answered"] == 1.0 and row["informative"] == 0


@pytest.mark.parametrize("update", ["hinted", "original"])
def test_hinted_answers_train_the_policy(tmp_path, update):
    run = make_run(tmp_path)
    manifest = run / "world/train.jsonl"
    lines = [json.loads(line) | {"hints": HINTS, "trusted": True} for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [row] = run_distributed(trained, 1, 120, run, update)
    assert row["hints/failed"] == row["hints/tried"] == row["hints/wrong_1"] == 1.0 and row["moved"]
    assert row["hints/level_2"] > 0.5 and ("hints/importance" in row) == (update == "original")
    assert row["reward_mean"] == 0 and math.isfinite(row["loss"])


def test_wrong_hints_are_reported_with_their_line(tmp_path):
    line = {"messages": [{"role": "user", "content": "x"}], "answer": "3"}
    bad = [{"hints": "one"}, {"hints": ["a"] * 6}, {"hints": [" "]}, {"trusted": "yes"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line | more) + "\n" for more in [{"hints": HINTS}, *bad]))
    found = load_prompts(tmp_path / "a.jsonl")
    assert len(found.prompts) == 1 and len(found.rejected) == 4


@pytest.mark.parametrize("override", ["hints.update=often", "hints.levels=6", "hints.right=0"])
def test_wrong_keys_are_named(override):
    with pytest.raises(RecipeError, match=override.split("=")[0]):
        load(RECIPES[0], [override])
    assert RlRecipe(GSPO).hints.update == "off"
