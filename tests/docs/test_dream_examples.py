"""The examples of the guide to SlowFast-VGen run."""

import subprocess
from pathlib import Path

from tests.docs.examples import check_contents, elsewhere, run_in, sections

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "five-systems" / "dream.md"


def test_examples_run(tmp_path):
    repository = GUIDE.parents[2]
    (tmp_path / "stages").symlink_to(repository / "stages")  # the recipe is named from the repository's root
    printed = run_in(tmp_path, GUIDE)
    assert "PSNR from memory" in printed
    assert (tmp_path / "runs/short/walk/walk.png").exists() and (tmp_path / "runs/short/loop/model").is_dir()


def test_what_is_not_run_is_shell_and_the_contents_lead_to_the_headings():
    assert len(sections(GUIDE)) == 3 and elsewhere(GUIDE)
    for _, text in elsewhere(GUIDE):
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    check_contents(GUIDE)
