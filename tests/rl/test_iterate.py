"""Rounds of cold start and RL: what each step keeps, and that a stopped run continues at the same place."""

import dataclasses
import json
from pathlib import Path

import pytest

import rl.iterate
from keye.errors import CheckpointError, RecipeError
from keye.world.manifest import read_manifest
from rl.iterate import Rounds, iterate
from rl.preference.answers import Answer, Answers
from rl.preference.recipe import Sft
from rl.preference.selecting import best_answers
from rl.rewards import Judgement, register
from stages.distributed import engine
from stages.recipe import DataRecipe, SourceRecipe
from tests.distributed import run_distributed
from tests.rl.test_trainer import GSPO, RECIPE, make_run

DATA = DataRecipe((SourceRecipe("{run}/world/train.jsonl", "text"),))
SFT = Sft(steps=2, learning_rate=1e-2, data=DATA, context=64, global_batch_size=4, max_new_tokens=2)
WHOLE = dataclasses.replace(
    RECIPE, gspo=dataclasses.replace(GSPO, steps=1), sft=SFT, rewards={"accuracy": 1.0, "format": 0.1}
)
TWO_SOURCES = dataclasses.replace(WHOLE, sft=dataclasses.replace(SFT, data=DataRecipe(DATA.sources * 2)))
ROUNDS = Rounds(2, "annealing", samples=64)


class OddLength:
    """In place of the accuracy: a random model gives no right answer, but answers of odd and even length."""

    in_process = True

    def __call__(self, judgement: Judgement) -> float:
        return float(judgement.finished and len(judgement.text) % 2)


def test_the_best_right_answer_is_kept(tmp_path):
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "old"}]
    lines = [{"id": n, "answer": "x", "messages": chat} for n in "abcd"]
    manifest, out = tmp_path / "q.jsonl", tmp_path / "cold.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = [
        [Answer("long one", 3, True, 1.1, 1.0), Answer("best", 2, True, 1.1, 1.0), Answer("right", 1, True, 1.0, 1.0)],
        [Answer("wrong", 2, True, 2.0, 0.0), Answer("cut", 2, False, 1.0, 1.0), Answer(" ", 1, True, 1.0, 1.0)],
        [Answer("judged by a model", 4, True, 0.3, None), Answer("less", 2, True, 0.2, None)],
        [],
    ]
    rows = [Answers(f"{manifest}:{n}", given, "" if given else "gone") for n, given in enumerate(answers, 1)]
    assert best_answers(manifest, rows, out) == {"questions": 4, "kept": 2, "wrong": 1, "unreadable": 1}
    first, second = read_manifest(out)
    assert [m["role"] for m in first["messages"]] == ["user", "assistant"]
    texts = [row["messages"][1]["content"][0]["text"] for row in (first, second)]
    assert texts == ["best", "judged by a model"] and (first["id"], first["reward"]) == ("a", 1.1)


def stopped_and_continued(run: Path) -> list:
    register("accuracy")(OddLength)
    engine.start(threads=1)
    train, names = rl.iterate.post_train, []

    def stopping(recipe, folder, only, done):
        if only == "gspo":
            raise KeyboardInterrupt
        return train(recipe, folder, only, done)

    rl.iterate.post_train = stopping
    with pytest.raises(KeyboardInterrupt):
        iterate(WHOLE, run, ROUNDS)
    rl.iterate.post_train = train
    first = run / "rounds/1"
    kept = {path: path.read_bytes() for path in first.rglob("*") if path.is_file() and path.suffix == ".jsonl"}
    results = iterate(WHOLE, run, ROUNDS, lambda name, _: names.append(name))
    assert kept and all(path.read_bytes() == data for path, data in kept.items())
    times = {path: path.stat().st_mtime_ns for path in run.rglob("metrics.jsonl")}
    again = iterate(WHOLE, run, ROUNDS)
    assert again == results and times == {path: path.stat().st_mtime_ns for path in run.rglob("metrics.jsonl")}
    with pytest.raises(CheckpointError, match="samples = 64, but now it is 32"):
        iterate(WHOLE, run, dataclasses.replace(ROUNDS, samples=32))
    changed = dataclasses.replace(WHOLE, gspo=dataclasses.replace(WHOLE.gspo, learning_rate=1e-4))
    with pytest.raises(CheckpointError, match="rounds/1/gspo was trained with gspo.learning_rate = 0.001"):
        iterate(changed, run, ROUNDS)
    with pytest.raises(CheckpointError, match="mpo/model has no model"):
        iterate(WHOLE, run.with_name("other"), dataclasses.replace(ROUNDS, first="mpo"))
    return [results, names]


def test_a_stopped_run_continues_and_a_finished_one_changes_nothing(tmp_path):
    run = make_run(tmp_path / "run")
    [(results, names)] = run_distributed(stopped_and_continued, 1, 280, run)
    assert names == ["rounds/1/sft", "rounds/1/gspo", "rounds/2/sft", "rounds/2/gspo"]
    assert (
        [result["round"] for result in results]
        == [1, 2]
        == [row["round"] for row in json.loads((run / "rounds/rounds.json").read_text())]
    )
    for number, result in enumerate(results, 1):
        folder = run / f"rounds/{number}"
        assert len(read_manifest(folder / "cold.jsonl")) == result["cold"]["kept"] > 0
        asked = read_manifest(folder / "rl.jsonl")
        assert len(asked) == result["rl"]["kept"] > 0 and all(0 < line["accuracy"] < 1 for line in asked)
        assert result["gspo"]["steps"] == 1 and (folder / "gspo/model/config.json").is_file()
    second = json.loads((run / "rounds/2/cold.answers/settings.json").read_text())
    first = json.loads((run / "rounds/1/cold.answers/settings.json").read_text())
    assert first["model"] != second["model"] and first["manifest"] == second["manifest"]


@pytest.mark.parametrize(
    ("recipe", "rounds", "sentence"),
    [
        (RECIPE, Rounds(), r"needs the tables \[sft\] and \[gspo\]"),
        (TWO_SOURCES, Rounds(), "one source"),
        (WHOLE, Rounds(0), "rounds ≥ 1"),
        (dataclasses.replace(WHOLE, rewards={"format": 1.0}), Rounds(), "add accuracy = 1.0 to .rewards."),
    ],
)
def test_what_cannot_be_iterated_is_refused(recipe, rounds, sentence, tmp_path):
    with pytest.raises(RecipeError, match=sentence):
        iterate(recipe, tmp_path, rounds)
