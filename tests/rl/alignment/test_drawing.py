"""Drawn sets are satisfiable: every one has a witness text, and every pair of kinds that does not conflict has one."""

import itertools
import json
import random

import pytest

from keye.errors import KeyeError, ManifestError
from keye.world.manifest import read_manifest
from rl.alignment import KINDS, Constraint
from rl.alignment.conflicts import PAIRS, conflict
from rl.alignment.dataset import write_constraint_set
from rl.alignment.draw import DRAWS, draw_constraints
from rl.alignment.witness import witness
from rl.commands import posttrain
from rl.questions.prompts import load_prompts
from rl.rewards import Judgement, rewards_from

REQUEST = "Describe what happens in the clip."
AVAILABLE = [kind for kind in KINDS if kind != "language"]


def satisfied(text: str | None, constraints: tuple[Constraint, ...]) -> bool:
    return text is not None and all(one.check(text) for one in constraints)


def test_every_pair_without_a_conflict_has_a_witness():
    rng, missing, count = random.Random(0), [], 0
    for pair in itertools.combinations(AVAILABLE, 2):
        if not conflict(*pair):
            drawn = tuple(DRAWS[kind](rng, REQUEST) for kind in pair)
            count += 1
            if not satisfied(witness(drawn), drawn):
                missing.append(drawn)
    assert missing == [] and count > 350


def test_every_kind_alone_has_a_witness():
    rng = random.Random(1)
    for kind in AVAILABLE:
        for _ in range(5):
            drawn = (DRAWS[kind](rng, REQUEST),)
            assert satisfied(witness(drawn), drawn), drawn


def test_a_language_has_a_witness():
    pytest.importorskip("py3langid")
    for seed in range(8):
        drawn = draw_constraints(random.Random(seed), REQUEST, 3, ("language", "paragraphs", "no_commas"))
        assert satisfied(witness(drawn), drawn)


@pytest.mark.parametrize("number", [1, 3, 5])
def test_drawn_sets_have_a_witness_and_no_conflict(number):
    for seed in range(40):
        drawn = draw_constraints(random.Random(seed), REQUEST, number)
        kinds = [one.kind for one in drawn]
        assert satisfied(witness(drawn), drawn)
        assert not any(conflict(*pair) for pair in itertools.combinations(kinds, 2))
        assert drawn == draw_constraints(random.Random(seed), REQUEST, number)


def test_conflicts_are_symmetric_and_name_kinds():
    assert set(PAIRS) | set().union(*PAIRS.values()) <= set(KINDS)
    for one, other in itertools.product(KINDS, repeat=2):
        assert conflict(one, other) == conflict(other, one)
    assert conflict("lowercase", "uppercase") and conflict("json", "words") and not conflict("json"[::-1], "words")


def test_sets_that_cannot_be_satisfied_have_no_witness():
    from rl.alignment.counts import Sentences, Words
    from rl.alignment.letters import LetterFrequency

    assert witness([Words("at most", 3), Sentences("at least", 9)]) is None
    assert witness([Words("at least", 30), LetterFrequency("at least", 50, "z"), Words("at most", 3)]) is None


def prompts(path):
    line = {"id": "a", "answer": "red", "messages": [{"role": "user", "content": REQUEST}], "family": "order"}
    media = [{"type": "video", "video": "clips/a.mp4"}, {"type": "text", "text": "What is seen?"}]
    other = {"messages": [{"role": "user", "content": media}, {"role": "assistant", "content": "a bird"}]}
    path.write_text("".join(json.dumps(one) + "\n" for one in (line, other)))
    return path


def test_a_data_set_asks_for_its_constraints_in_words(tmp_path):
    source = prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "sets").mkdir()
    out = tmp_path / "sets/c.jsonl"
    assert write_constraint_set(source, out, seed=3, each=2, least=2, most=3, progress=False) == 4
    first = out.read_bytes()
    write_constraint_set(source, out, seed=3, each=2, least=2, most=3, progress=False)
    assert out.read_bytes() == first
    lines = read_manifest(out)
    assert len({line["id"] for line in lines}) == 4
    assert lines[2]["messages"][0]["content"][0]["video"] == "../clips/a.mp4"
    assert all("answer" not in line and [m["role"] for m in line["messages"]] == ["user"] for line in lines)
    reward = rewards_from({"constraints": 1.0, "all_constraints": 0.0})
    found = load_prompts(out)
    assert not found.rejected and len(found.prompts) == 4
    for prompt in found.prompts:
        constraints = prompt.extra["constraints"]
        content = prompt.messages[-1]["content"]
        asked = content if isinstance(content, str) else content[-1]["text"]
        from rl.alignment import read_constraints

        read = read_constraints(constraints, "")
        assert all(one.describe() in asked for one in read)
        earned = reward(Judgement(prompt, f"<think>so, so</think><answer>{witness(read)}</answer>", True))
        assert earned.parts == {"constraints": 1.0, "all_constraints": 1.0}
        for text, finished in (("", True), (witness(read), False), ("<think>" + witness(read), True)):
            assert reward(Judgement(prompt, text, finished)).parts == {"constraints": 0.0, "all_constraints": 0.0}


def test_media_are_found_from_a_folder_behind_a_link(tmp_path):
    source = prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    write_constraint_set(source, tmp_path / "link/c.jsonl", progress=False)
    [_, line] = read_manifest(tmp_path / "link/c.jsonl")
    assert line["messages"][0]["content"][0]["video"] == "../../clips/a.mp4"


def test_the_share_that_is_satisfied_is_the_reward(tmp_path):
    entries = [{"kind": "no_commas"}, {"kind": "words", "relation": "at most", "count": 2}, {"kind": "lowercase"}]
    line = {"messages": [{"role": "user", "content": "x"}], "constraints": entries}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    [prompt] = load_prompts(tmp_path / "a.jsonl").prompts
    reward = rewards_from({"constraints": 1.0, "all_constraints": 1.0})
    assert reward(Judgement(prompt, "three small words", True)).parts == pytest.approx(
        {"constraints": 2 / 3, "all_constraints": 0}
    )
    assert reward(Judgement(prompt, "two words", True)).total == 2.0


def test_a_wrong_constraint_is_reported_with_its_line(tmp_path):
    good = {"messages": [{"role": "user", "content": "x"}], "constraints": [{"kind": "no_commas"}]}
    bad = good | {"constraints": [{"kind": "no_comma"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    found = load_prompts(tmp_path / "a.jsonl")
    assert len(found.prompts) == 1 and "a.jsonl:2" in str(found.rejected) and "no_commas" in str(found.rejected)


def test_the_command_writes_a_set(tmp_path, monkeypatch, capsys):
    source, out = prompts(tmp_path / "prompts.jsonl"), tmp_path / "c.jsonl"
    argv = ["keye posttrain", "constraints", str(source), "--out", str(out), "--kinds", "no_commas,words"]
    monkeypatch.setattr("sys.argv", argv)
    posttrain.main()
    assert "with 2 prompts" in capsys.readouterr().out and len(read_manifest(out)) == 2
    monkeypatch.setattr("sys.argv", [*argv[:-1], "no_comma"])
    with pytest.raises(KeyeError, match="names 'no_comma'; use some of words"):
        posttrain.main()
    monkeypatch.setattr("sys.argv", [*argv, "--least", "3", "--most", "2"])
    with pytest.raises(ManifestError, match="3 to 2"):
        posttrain.main()
