"""Every example of the guide to the model runs, with directories laid out like real models and tiny weights."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from keye.checkpoint.convert import export_released, initialise
from keye.cli import build_parser
from scripts.clips import clip
from tests.docs.examples import elsewhere, sections
from tests.keye.model.parts import decoder, siglip

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "model.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files that the guide names: clips, a picture, a decoder, a tower, a released model and a Llama."""
    from PIL import Image

    path = tmp_path_factory.mktemp("guide")
    (path / "clip.mp4").symlink_to(clip("carphone_pristine.mp4"))
    Image.new("RGB", (120, 80), "green").save(path / "picture.png")
    decoder(path / "Qwen3-8B", head_dim=16, max_position_embeddings=16_384)
    decoder(path / "SmolLM2", "llama", tie_word_embeddings=True, max_position_embeddings=2048)
    siglip(path / "siglip-so400m-patch14-384", complete=True)
    initialise(path / "Qwen3-8B", path / "siglip-so400m-patch14-384", out=path / "ours")
    export_released(path / "ours", path / "Keye-VL-1_5-8B")
    return path


def test_examples_run(folder):
    result = subprocess.run(
        [sys.executable, "-m", "tests.docs.examples", str(GUIDE)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-3000:]
    assert "is reduced from" in result.stdout
    for made in ("model", "from-parts", "keye-8b", "smol", "adapter", "served", "for-vllm"):
        assert any((folder / made).iterdir()), made


def test_what_is_not_run_is_written_right():
    blocks = elsewhere(GUIDE)
    assert len(blocks) >= 4 and len(sections(GUIDE)) >= 10
    for language, text in blocks:
        if language == "python":
            compile(text, str(GUIDE), "exec")
            continue
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
        for line in text.splitlines():
            if line.startswith("keye "):
                build_parser().parse_args(shlex.split(line, comments=True)[1:])
            elif line.startswith("python scripts/"):
                assert (ROOT / line.split()[1]).is_file()


def test_the_contents_lead_to_the_headings():
    text = GUIDE.read_text(encoding="utf-8")
    links = re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", text)
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [title for title, _ in links] == headings
    for title, anchor in links:
        assert anchor == re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
