"""The example of the guide to SlowFastBench runs, and its tables name every family and every control."""

import re
from pathlib import Path

from keye.evaluation import CONTROLS
from keye.world.slowfastbench import FAMILIES

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "slowfastbench.md").read_text(encoding="utf-8")


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
