"""The adversary: its inputs are those of a plan, and it finds a planted leak."""

import json
import sys

import numpy as np
import pytest
import torch

from keye import SlowFastEncoder
from keye.world.slowfastbench import FAMILIES, Painter, draw
from scripts.bench import adversary, adversary_inputs
from scripts.bench.common import record

LENGTHS = {name: next(n for n in (8, 16, 32) if n >= row.shortest) for name, row in FAMILIES.items() if not row.real}


@pytest.mark.parametrize("family", LENGTHS)
def test_every_question_offers_its_right_choice(family):
    items = [draw(family, "dev", i, LENGTHS[family], 144) for i in range(24)]
    found = [adversary_inputs.choice(item) for item in items]
    assert all(allowed[answer] for answer, allowed in found)
    members = FAMILIES[family].members
    assert {allowed.sum() for _, allowed in found} == {3 if family == "together" else members}
    assert all(len({answer for answer, _ in found[i : i + members]}) == members for i in range(0, 24, members))


@pytest.mark.parametrize("measure", adversary_inputs.MEASURES)
def test_the_inputs_are_those_of_the_encoders_plan(measure):
    encoder = SlowFastEncoder(measure=measure)
    for index in range(0, 24, 4):
        painter = Painter(draw("find", "dev", index, 8, 144).film)
        [(_, values)] = adversary_inputs.plans(painter, {measure: encoder})
        frames = torch.from_numpy(np.stack(painter.cell_frames())).permute(0, 3, 1, 2)
        plan = encoder.plan(frames, source_fps=2.0)
        assert values[adversary_inputs.LOWEST] == pytest.approx(plan.similarity[1:].min().item())
        assert values[1:17].tolist() == plan.frame_types.tolist()
        np.testing.assert_allclose(values[18:33], plan.similarity[1:].numpy(), atol=1e-6)


def planted(leak: float, seed: int, number: int = 800) -> adversary_inputs.Drawn:
    """Questions with four choices; a share `leak` of the answers follows from the third column of the plan."""
    rng = np.random.default_rng(seed)
    answers = rng.permutation(number) % 4
    inputs = rng.normal(size=(number, 6)).astype(np.float32)
    inputs[:, 2] = np.where(rng.random(number) < leak, answers, rng.integers(0, 4, number))
    return adversary_inputs.Drawn({"plan": inputs}, answers, np.ones((number, 4), bool), np.arange(number))


@pytest.mark.parametrize(
    ("leak", "number", "verdict"),
    [(0.75, 800, "**no**"), (0.0, 800, "open: more questions"), (0.0, 10_000, "yes"), (0.1, 10_000, "**no**")],
)
def test_a_planted_leak_is_found_and_noise_is_not(leak, number, verdict):
    pytest.importorskip("sklearn")
    [row] = adversary.judge("planted", planted(leak, 3, max(800, number // 5)), planted(leak, 4, number))
    assert row[2] == "25.0" and row[-1] == verdict


@pytest.mark.parametrize(
    ("above", "half", "number", "expected"),
    [
        (0.000, 0.0085, 10_000, "yes"),
        (0.009, 0.0085, 10_000, "yes"),  # noise of this size is to be expected; its interval ends above a point
        (0.011, 0.0085, 10_000, "**no**"),
        (0.009, 0.0085, 9_999, "open: more questions"),
        (0.000, 0.0085, 9_999, "yes"),
        (0.015, 0.0085, 9_999, "open: more questions"),
        (0.020, 0.0085, 9_999, "**no**"),
        (-0.020, 0.0300, 800, "yes"),
    ],
)
def test_the_accuracy_decides_with_10000_questions_and_the_interval_with_fewer(above, half, number, expected):
    assert adversary.verdict(above, above - half, above + half, number) == expected


def rows(*verdicts, number="10,000"):
    """Rows of one family, one for each input, in the order text, change, mse, lab."""
    names = ("text", "change", "mse", "lab")
    return [
        ["find", name, "25.0", "3,000", number if name != "lab" else "800", "25.0 (24.0–26.0)", "+0.0", verdict]
        for name, verdict in zip(names, verdicts, strict=False)
    ]


@pytest.mark.parametrize(
    ("verdicts", "met", "shown"),
    [
        (("yes", "yes", "yes", "yes"), True, "yes"),
        (("yes", "yes", "yes", adversary.OPEN), "open", "open"),
        (("yes", "**no**", "yes", adversary.OPEN), False, "**no**"),
    ],
)
def test_a_claim_is_open_where_questions_are_missing(tmp_path, verdicts, met, shown):
    claim = adversary.claim(rows(*verdicts))
    assert claim.met == met
    record.save(tmp_path, "drawn", [claim], seconds=1, quick=False)
    line = next(line for line in record.document(tmp_path, ["drawn"], "").splitlines() if line.startswith("| find"))
    assert line.split("|")[-2].strip() == shown


def test_a_family_counts_without_a_leak_and_with_10000_questions_for_text_change_and_mse():
    assert adversary.counts(rows("yes", "yes", "yes", adversary.OPEN))
    assert not adversary.counts(rows("yes", "yes", "yes", adversary.NO))
    assert not adversary.counts(rows("yes", "yes", adversary.NO))
    assert not adversary.counts(rows("yes", "yes"))
    assert not adversary.counts(rows("yes", "yes", "yes", number="9,999"))


def test_runs_of_some_families_and_the_cache_give_one_record(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(adversary_inputs, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(adversary_inputs, "CHUNK", 2)

    def run(out, *words):
        some = ["--motion", "still", "--train", "24", "--test", "16", "--inputs", "mse", "--some", "8"]
        monkeypatch.setattr(sys, "argv", ["adversary", *some, "--out", str(tmp_path / out), *words])
        adversary.main()
        return json.loads((tmp_path / out / "still.json").read_text(encoding="utf-8"))

    run("runs", "--families", "together")
    joined = run("runs", "--families", "find")
    again = run("cached", "--cached")
    assert [table["rows"] for table in joined["tables"]] == [table["rows"] for table in again["tables"]]
    assert joined["claims"] == again["claims"] and again["seeds"] == {"train": "train", "test": "heldout"}
    found = joined["tables"][0]["rows"]
    assert list(dict.fromkeys(row[0] for row in found)) == ["find", "together"]
    assert {tuple(row[1:5]) for row in found if row[0] == "find"} >= {
        ("text", "25.0", "96", "64"), ("mse", "25.0", "24", "16"), ("packets", "25.0", "8", "8")
    }  # fmt: skip
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    run("runs", "--families", "find", "--test", "24")
    assert all(path.stat().st_mtime_ns == before for path, before in files.items())
    dev = run("dev", "--families", "find", "--dev")
    assert dev["seeds"] == {"train": "train", "test": "dev"}


def test_changed_drawing_or_measures_do_not_use_the_cache(monkeypatch):
    before = adversary_inputs._check("together", "still")
    adversary_inputs._check.cache_clear()
    monkeypatch.setattr("keye.slowfast.measures.change.Change.GLOBAL", 0.4)
    after = adversary_inputs._check("together", "still")
    assert {name for name in after if after[name] != before[name]} == {"change"}
    adversary_inputs._check.cache_clear()
    monkeypatch.setattr("keye.world.slowfastbench.film.DARK", 60)
    drawn = adversary_inputs._check("together", "still")
    assert {name for name in drawn if drawn[name] != after[name]} >= {"change", "mse", "lab", "packets"}
    adversary_inputs._check.cache_clear()


def test_the_interval_counts_groups_and_not_questions():
    right = np.repeat([1.0, 0.0], 50)
    alone, grouped = (adversary.interval(right, groups) for groups in (np.arange(100), np.arange(100) // 10))
    assert alone[0] == pytest.approx(0.5 - 1.96 * np.sqrt(0.25 / 99))
    assert grouped[1] - grouped[0] > 3 * (alone[1] - alone[0])
    balanced = np.tile([1.0, 0.0, 0.0, 0.0], 25)
    assert adversary.interval(balanced, np.arange(100) // 4) == (0.25, 0.25)
