"""Every example of the guide to the model runs, with directories laid out like real models and tiny weights."""

import shlex
import subprocess
from pathlib import Path

import pytest

from keye.checkpoint.convert import export_released, initialise
from keye.cli import build_parser
from scripts.clips import clip
from tests.docs.examples import check_contents, elsewhere, run_in, sections
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
    assert "is reduced from" in run_in(folder, GUIDE)
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
    check_contents(GUIDE)
