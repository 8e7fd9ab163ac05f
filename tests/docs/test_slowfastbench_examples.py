"""The example of the guide to SlowFastBench runs, its tables are complete, and it says which families count."""

import json
import re
from pathlib import Path

from keye.evaluation import CONTROLS
from keye.world.slowfastbench import FAMILIES

DOCS = Path(__file__).resolve().parents[2] / "docs"
GUIDE = (DOCS / "slowfastbench.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for block in re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/slowfastbench.md", "exec"), {})
    assert (tmp_path / "bench" / "heldout.jsonl").exists()


def test_the_tables_name_every_family_and_control():
    first = {name for cell in re.findall(r"^\| ([a-z_, ]+) \|", GUIDE, re.MULTILINE) for name in cell.split(", ")}
    assert first >= {*FAMILIES, *CONTROLS}
    for name, what in CONTROLS.items():
        assert f"| {name} | {what.replace('another clip', 'another clip of the family')} |" in GUIDE


def test_the_families_that_count_are_those_of_the_record():
    tables = json.loads((DOCS / "results" / "bench_v1" / "drawn.json").read_text(encoding="utf-8"))["tables"]
    counting = {}
    for family, name, _, _, questions, *_, verdict in tables[0]["rows"]:
        decided = verdict == "yes" and int(questions.replace(",", "")) >= 10_000
        counting[family] = counting.get(family, True) and verdict != "**no**"
        counting[family] &= decided or name not in ("text", "change", "mse")
    [(number, sentence)] = re.findall(r"(\d+) of 17\s+families\s+count:([^.]*)\.", GUIDE)
    assert set(re.findall(r"`([a-z_]+)`", sentence)) == {name for name, counts in counting.items() if counts}
    assert int(number) == sum(counting.values()) >= 10
