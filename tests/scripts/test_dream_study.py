"""The study of SlowFast-VGen runs, and does not ask probe questions in the words of the question."""

import json
import sys

import numpy as np
import pytest

from scripts.bench.systems import dream, dream_reader
from scripts.bench.systems.dream_walks import ARMS, draw_walks


@pytest.mark.slow
def test_quick_study_has_every_arm_and_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(dream, "SCRATCH", tmp_path / "scratch" / "dream")
    for words in (["--quick"], ["--quick", "--page"]):
        monkeypatch.setattr(sys, "argv", ["dream", *words, "--out", str(tmp_path / "out")])
        dream.main()
        record = json.loads((tmp_path / "out" / "dream.json").read_text())
        assert [row[0] for row in record["tables"][0]["rows"]] == list(ARMS)
        assert all(cell != "–" for row in record["tables"][0]["rows"] for cell in row)
    assert (tmp_path / "out" / "dream.png").exists()


def test_probes_leave_out_the_words_of_the_question():
    for family, question, left_out in (
        ("read", "Read the code.", "Read"),
        ("count", "How often does the green one flash?", "How often"),
        ("order", "First colour: blue or green?", "First colour"),
    ):
        row = {"family": family, "messages": [{"content": [{"text": question}]}]}
        probes = dream_reader._probes(row, np.random.default_rng(0))
        assert len(probes) == 11 and not any(probe.startswith(left_out) for probe in probes)


def test_walks_of_seeds_differ_and_repeat():
    first, again, other = (draw_walks(seed, 2)[1] for seed in (0, 0, 1))
    assert first.picture.equal(again.picture) and not first.picture.equal(other.picture)


def test_a_memory_of_other_families_has_no_probe_of_the_question():
    row = {"family": "when", "messages": [{"content": [{"text": "When is it white?"}]}]}
    probes = dream_reader._probes(row, np.random.default_rng(0))
    kept = [probe for probe in probes if not dream_reader._is_of(probe, "when")]
    assert len(kept) == 10 and set(probes) - set(kept) == {"At what second is it white?"}
