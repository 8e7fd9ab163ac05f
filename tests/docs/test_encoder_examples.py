"""Every example of the guide to the encoder runs, and its tables name every measure and policy."""

import re
from pathlib import Path

import pytest

from keye.slowfast.measures import get_measure, known_measures
from keye.slowfast.policies import known_policies
from tests.docs.examples import check_contents, lay_out, run_in, sections

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "encoder.md"
ELSEWHERE = {"In Qwen-VL models"}  # needs torchvision: run by tests/keye/adapters/qwen_models.py
WITH_DATASETS = "In datasets.map"


def test_examples_run_and_need_neither_transformers_nor_datasets(tmp_path):
    lay_out(tmp_path)
    titles = [title for title in sections(GUIDE) if title not in {*ELSEWHERE, WITH_DATASETS}]
    assert len(titles) >= 10
    printed = run_in(tmp_path, GUIDE, titles)
    assert printed.splitlines()[-1].strip() == "== loaded:"
    for made in ("plan.png", "clip.html", "plans"):
        assert (tmp_path / made).exists(), made


@pytest.mark.slow
def test_the_example_with_datasets_runs(tmp_path):
    lay_out(tmp_path)
    run_in(tmp_path, GUIDE, [WITH_DATASETS], HF_DATASETS_CACHE=str(tmp_path / "cache"))


def test_the_tables_name_every_measure_and_policy():
    text = GUIDE.read_text(encoding="utf-8")
    named = {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)", row)}
    ours = {name for name in known_measures() if type(get_measure(name)).__module__.startswith("keye.")}
    assert ours | set(known_policies()) <= named


def test_the_contents_lead_to_the_headings():
    check_contents(GUIDE)
