"""Every example of the README and of the package's page runs, in a folder with clips and a model of a few weights."""

from pathlib import Path

import pytest

from scripts.clips import clip
from tests.docs.examples import run_in, sections
from tests.rl.test_trainer import make_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("readme")
    (path / "my-clips").mkdir()
    for name in ("clip.mp4", "my-clips/a.mp4"):
        (path / name).symlink_to(clip("carphone_pristine.mp4"))
    (path / "stages").symlink_to(ROOT / "stages")
    make_run(path / "runs/demo")
    (path / "runs/demo/annealing").rename(path / "runs/demo/gspo")
    return path


@pytest.mark.parametrize("document", ["README.md", "docs/package.md"])
def test_examples_run(folder, document):
    run_in(folder, ROOT / document)
    if document == "README.md":
        for made in ("plan.png", "plan.html", "plans", "runs/ablation"):
            assert (folder / made).exists(), made


def test_the_readme_has_its_sections():
    headings = [line[3:] for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line[:3] == "## "]
    assert headings == [
        "Installation", "Quick start", "Encoder", "Model", "Training", "Which page of results to read",
        "Troubleshooting", "Repository layout", "License and citation",
    ]  # fmt: skip
    assert len(sections(ROOT / "README.md")) == 3
