"""Filtering by sampled correctness and pairs of a model's answers: what is kept, why not, and resuming."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from keye.errors import CheckpointError, RecipeError
from rl.commands import posttrain
from rl.policy.scoring import Group
from rl.preference.answers import CHUNK, Answer, Answers, Draw, Journal, Sampled, draw_all, draw_answers, seed_of
from rl.preference.pairs import load_pairs
from rl.preference.phase import Answerer
from rl.preference.selecting import Kept, choose, filter_questions, make_pairs, moved
from rl.questions.prompts import load_prompts
from rl.rewards import rewards_from
from rl.rollout.config import Rollout
from stages.distributed import engine
from stages.distributed.weights import open_start
from tests.rl.test_trainer import make_run


def answer(text: str, tokens: int, reward: float, accuracy: float = 0.0, finished: bool = True) -> Answer:
    return Answer(text, tokens, finished, reward, accuracy)


RIGHT = [answer("red", 2, 1.0, 1.0), answer("It is red.", 7, 1.1, 1.0)]
WRONG = [answer("green", 3, 0.0), answer("It is blue now.", 8, 0.1), answer("red and", 40, 0.0, finished=False)]


def test_rejection_pairs_have_similar_lengths():
    pairs, _ = choose(Answers("f:1", [*WRONG, *RIGHT]), "rejection", 2)
    assert [(a.text, b.text) for a, b in pairs] == [("red", "green"), ("It is red.", "It is blue now.")]
    assert [a.text for a, _ in choose(Answers("f:1", [*WRONG, *RIGHT]), "rejection", 1)[0]] == ["red"]


def test_ranking_pairs_the_highest_with_the_lowest_reward():
    pairs, _ = choose(Answers("f:1", [*WRONG, *RIGHT]), "ranking", 5)
    assert [(a.text, b.text) for a, b in pairs] == [("It is red.", "green"), ("red", "It is blue now.")]
    same = [answer("a", 1, 0.5), answer("b", 1, 0.5)]
    assert choose(Answers("f:1", same), "ranking", 1) == ([], "equal")


@pytest.mark.parametrize(
    ("answers", "reason"),
    [(RIGHT, "all_right"), (WRONG, "all_wrong"), (WRONG[2:] * 3, "unfinished"), (RIGHT[:1], "unfinished")],
)
def test_a_question_without_a_pair_has_a_reason(answers, reason):
    assert choose(Answers("f:1", answers), "rejection", 1) == ([], reason)
    assert choose(Answers("f:1", answers, "gone"), "rejection", 1) == ([], "unreadable")


@pytest.fixture
def manifest(tmp_path) -> Path:
    """Four questions with a clip each and one line that is no question."""
    rows = [
        {
            "id": i, "family": "read", "answer": "red", "meta": {"kept": True},
            "messages": [
                {"role": "user", "content": [{"type": "video", "video": f"clips/{i}.mp4", "max_tokens": 9}]},
                {"role": "assistant", "content": "red"},
            ],
        }
        for i in range(4)
    ]  # fmt: skip
    path = tmp_path / "data/train.jsonl"
    path.parent.mkdir()
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([lines[0], '{"messages": []}', *lines[1:]]) + "\n")
    return path


def answered(manifest: Path) -> list[Answers]:
    found = [RIGHT, [*RIGHT, *WRONG], WRONG, []]
    errors = ["", "", "", "no such clip"]
    places = [f"{manifest}:{n}" for n in (1, 3, 4, 5)]
    return [Answers(*row) for row in zip(places, found, errors, strict=True)]


def test_easy_questions_are_filtered(manifest, tmp_path):
    out = tmp_path / "hard.jsonl"
    counts = filter_questions(manifest, answered(manifest), out, Kept(0.1, 0.9))
    assert counts == {"questions": 4, "kept": 1, "easy": 1, "hard": 1, "unreadable": 1}
    [row] = map(json.loads, out.read_text().splitlines())
    assert row["id"] == 1 and row["accuracy"] == pytest.approx(0.4) and row["sampled"] == 5 and row["meta"]["kept"]
    # The clip is found from the new file's folder; the options of the encoder stay.
    assert row["messages"][0]["content"] == [{"type": "video", "video": "data/clips/1.mp4", "max_tokens": 9}]
    assert row["messages"][1] == {"role": "assistant", "content": "red"}


def test_pairs_are_written_in_the_chat_format(manifest, tmp_path):
    out = tmp_path / "pairs.jsonl"
    counts = make_pairs(manifest, answered(manifest), out)
    assert counts == {"questions": 4, "pairs": 1, "all_right": 1, "all_wrong": 1, "unreadable": 1}
    [pair] = load_pairs(out).pairs
    assert (pair.chosen, pair.rejected, pair.prompt.family) == ("red", "green", "read")
    part = {"type": "video", "video": "data/clips/1.mp4", "max_tokens": 9}
    assert pair.prompt.messages == [{"role": "user", "content": [part]}] and pair.prompt.base_dir == tmp_path


def test_paths_are_moved_and_others_stay():
    parts = [
        {"type": "video", "video": path} for path in ("a.mp4", "/b.mp4", "https://host/c.mp4", ["d.png", "/e.png"])
    ]
    [message] = moved([{"role": "user", "content": parts}], Path("/x/data"), Path("/x/out"))
    found = [part["video"] for part in message["content"]]
    assert found == ["../data/a.mp4", "/b.mp4", "https://host/c.mp4", ["../data/d.png", "/e.png"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with more questions than a line of the journal has."""
    engine.start(threads=1)
    run = make_run(tmp_path_factory.mktemp("run"))
    rows = [{"answer": str(i % 9), "messages": [{"role": "user", "content": f"{i}?"}]} for i in range(2 * CHUNK + 3)]
    (run / "world/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_answers_continue_after_an_unfinished_line_with_the_same_draws(run, tmp_path):
    prompts = load_prompts(run / "world/train.jsonl").prompts
    answerer, reward = Answerer(open_start(run / "annealing/model"), "fp32", 64), rewards_from({"accuracy": 1.0})
    draw = Draw(3, 1.0, 2, 0)
    complete, broken = (Journal(tmp_path / name, {"seed": 0}) for name in ("complete", "broken"))
    draw_answers(complete, prompts, answerer, reward, draw)
    expected = list(complete.rows())
    assert [row.where.rpartition(":")[2] for row in expected] == [str(n + 1) for n in range(len(prompts))]
    assert {len(row.answers) for row in expected} == {3}
    lines = complete.file.read_bytes().splitlines(keepends=True)
    broken.file.write_bytes(lines[2] + lines[0][: len(lines[0]) // 2])
    drawn: list[int] = []
    generate = answerer.rollout.generate

    def counted(samples: list, *args: object) -> list[Group]:
        drawn.append(len(samples))
        return generate(samples, *args)

    answerer.rollout.generate = counted
    draw_answers(broken, prompts, answerer, reward, draw)
    assert list(broken.rows()) == expected and drawn == [CHUNK, CHUNK]
    with pytest.raises(CheckpointError, match="were drawn with seed = 0, but now it is 1"):
        Journal(tmp_path / "broken", {"seed": 1})


def test_a_line_that_a_killed_process_left_at_a_bracket_is_drawn_again(run, tmp_path):
    journal = Journal(tmp_path / "journal", {"seed": 0})
    row = Answers("q.jsonl:1", [Answer('{"boxes": [1]}\n', 2, True, 1.0, 1.0)])
    journal.add(0, [row])
    journal.add(1, [row])
    whole = journal.file.read_bytes()
    cut = whole.index(b"]}", whole.index(b"\n")) + 2
    journal.file.write_bytes(whole[:cut])
    assert journal.missing(2 * CHUNK) == [1]
    journal.add(2, [row])
    assert journal.missing(3 * CHUNK) == [1] and list(journal.rows()) == [row, row]
    journal.file.write_bytes(whole[: len(whole) // 4])
    journal.add(0, [row])
    assert list(journal.rows()) == [row]


def test_a_phase_samples_as_the_recipe_says(run, tmp_path):
    start, rollout = open_start(run / "annealing/model"), Rollout(cache_mb=7, top_k=3, stop_tokens=("0",))
    plain, given = Answerer(start, "fp32", 64).rollout, Answerer(start, "fp32", 64, rollout).rollout
    assert given.ends - plain.ends == {given.processor.tokenizer.convert_tokens_to_ids("0")}
    assert (given.cache_bytes, given.sampler.top_k, given.sampler.top_p) == (7 << 20, 3, 1.0)
    found = load_prompts(run / "world/train.jsonl")
    sampled = Sampled(found, (), 2, {"accuracy": 1.0}, "fp32", 64, rollout)
    assert len(list(draw_all(tmp_path / "answers", start, sampled, Draw(2, 1.0, 2, 0)).rows())) == 2
    with pytest.raises(CheckpointError, match="stop_tokens = .'0'., but now it is None"):
        draw_all(tmp_path / "answers", start, dataclasses.replace(sampled, rollout=Rollout()), Draw(2, 1.0, 2, 0))


@pytest.mark.parametrize("seed", [0, -3, 20261128 * 1000 + 2, 1 << 62])
def test_any_seed_of_a_recipe_gives_seeds_of_a_generator(seed):
    drawn = {torch.Generator().manual_seed(seed_of(seed, chunk)).initial_seed() for chunk in range(100)}
    assert len(drawn) == 100 and seed_of(1, 2) == (1_000_003 + 2) * 4096 + 17


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["keye posttrain", *arguments])
    monkeypatch.setattr(engine, "stop", lambda: None)  # the tests of this process share their group
    posttrain.main()


def test_commands_share_answers(run, tmp_path, monkeypatch, capsys):
    model, manifest = str(run / "annealing/model"), str(run / "world/train.jsonl")
    common = ["--samples", "4", "--max-new-tokens", "2", "--temperature", "2", "--reward", "format=1"]
    common += ["--reward", "accuracy=1", "--answers", str(tmp_path / "answers"), "--limit", "20"]
    command(monkeypatch, "filter", model, manifest, "--out", str(tmp_path / "hard.jsonl"), *common)
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert counts["questions"] == 20 and sum(counts.values()) == 40
    monkeypatch.setattr("rl.preference.answers.draw_answers", None)  # all answers are there
    command(monkeypatch, "pairs", model, manifest, "--out", str(tmp_path / "p.jsonl"), "--method", "ranking", *common)
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = (tmp_path / "p.jsonl").read_text().splitlines()
    assert counts["questions"] == 20 and counts["pairs"] == len(written)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pairs", "M", "a.jsonl", "--out", "b", "--reward", "format=1"], "add --reward accuracy=1"),
        (["filter", "M", "a.jsonl", "--out", "a.jsonl"], "is the manifest itself"),
        (["filter", "M", "a.jsonl", "--out", "b", "--reward", "accuracy=x"], "write NAME=WEIGHT"),
        (["filter", "M", "a.jsonl", "--out", "b", "--temperature", "0"], "must be above 0"),
        (["pairs", "M", "a.jsonl", "--out", "b", "--samples", "0"], "must be at least 1"),
    ],
)
def test_impossible_options_are_named(arguments, said, monkeypatch):
    with pytest.raises(RecipeError, match=said):
        command(monkeypatch, *arguments)


def test_a_limit_takes_a_sample_of_a_sorted_manifest(tmp_path):
    families = ["read"] * 60 + ["count"] * 20 + ["order"] * 20
    lines = [
        {"id": f"q{n}", "family": family, "answer": "1", "messages": [{"role": "user", "content": "?"}]}
        for n, family in enumerate(families)
    ]
    manifest = tmp_path / "train.jsonl"

    def chosen(rows: list[dict], limit: int) -> list[str]:
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = load_prompts(manifest)
        return [prompt.id for prompt in Sampled(found, (), limit, {"accuracy": 1.0}, "fp32", 1).questions]

    few, more = chosen(lines, 25), chosen(lines, 50)
    assert {lines[int(name[1:])]["family"] for name in few} == {"read", "count", "order"}
    assert few == sorted(few, key=lambda name: int(name[1:])) and set(few) < set(more)
    assert set(chosen(lines[::-1], 25)) == set(few)
    assert chosen(lines, 0) == chosen(lines, 100) == chosen(lines, 1000) == [line["id"] for line in lines]
