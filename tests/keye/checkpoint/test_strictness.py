"""Weights that do not fit, damaged directories and interrupted conversions."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from keye.checkpoint.convert import Report, check, convert_released, load_released
from keye.checkpoint.report import folded
from keye.commands.convert import main
from keye.errors import CheckpointError, run
from tests.keye.checkpoint.directories import RELEASED, released


def drop(folder: Path, name: str, instead: dict[str, torch.Tensor] | None = None) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    path = folder / index[name]
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors | (instead or {}), path)


def test_missing_weights_are_an_error_unless_allowed(tmp_path: Path) -> None:
    released(tmp_path / "theirs")
    drop(tmp_path / "theirs", "mlp_AR.linear_1.bias")
    assert check(tmp_path / "theirs").missing == ["model.projector.linear_1.bias"]
    with pytest.raises(CheckpointError, match="model.projector.linear_1.bias"):
        convert_released(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(CheckpointError, match="1 weights are missing"):
        load_released(tmp_path / "theirs")
    assert not (tmp_path / "ours").exists()
    report = convert_released(tmp_path / "theirs", tmp_path / "ours", allow_missing=True)
    assert report.missing == ["model.projector.linear_1.bias"] and "1 missing" in str(report)


def test_other_shapes_and_unknown_names_are_reported(tmp_path: Path) -> None:
    released(tmp_path / "theirs")
    drop(tmp_path / "theirs", "mlp_AR.linear_2.bias", {"mlp_AR.linear_2.bias": torch.zeros(3), "fast.x": torch.ones(2)})
    report = check(tmp_path / "theirs")
    assert report.mismatched == [("model.projector.linear_2.bias", (3,), (64,))] and report.unexpected == ["fast.x"]
    assert "model.projector.linear_2.bias is [3]" in str(report) and "fast.x" in str(report)
    with pytest.raises(CheckpointError, match=r"shape \[3\], the model's is \[64\]"):
        convert_released(tmp_path / "theirs", tmp_path / "ours", allow_missing=True)


def test_damaged_directories_are_named(tmp_path: Path) -> None:
    released(tmp_path / "theirs")
    shard = tmp_path / "theirs" / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        check(tmp_path / "theirs")
    shard.write_bytes(b"no header at all")
    with pytest.raises(CheckpointError, match="damaged"):
        check(tmp_path / "theirs")
    shard.unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors is missing"):
        check(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="no such"):
        check(tmp_path / "nowhere")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text(json.dumps(RELEASED))
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled"):
        check(tmp_path / "pickled")
    (tmp_path / "pickled" / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(CheckpointError, match="'qwen2_vl'"):
        check(tmp_path / "pickled")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": None, "head_dim": None},
        {"hidden_size": "wide"},
        {"rope_scaling": [1]},
        {"vision_config": 3},
        {"vision_config": {"patch_size": 0}},
        {"vision_config": {"hidden_act": "relu"}},
    ],
    ids=str,
)
def test_a_config_with_wrong_values_is_named(tmp_path: Path, changes: dict) -> None:
    released(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(RELEASED | changes))
    with pytest.raises(CheckpointError, match=r"^.*theirs/config\.json: .*; "):
        check(tmp_path / "theirs")


def test_report_folds_layers() -> None:
    layers = [f"visual.encoder.layers.{i}.mlp.fc1.bias" for i in (0, 1, 2)] + ["lm_head.weight"]
    assert folded(layers) == ["visual.encoder.layers.{0..2}.mlp.fc1.bias", "lm_head.weight"]
    assert folded([f"a.{i}.b" for i in (0, 2)]) == ["a.{0,2}.b"]
    assert str(Report(loaded=3)) == "3 tensors fit"


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    released(tmp_path / "theirs")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_released(tmp_path / "theirs", tmp_path / "ours", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_directory_that_is_no_release_is_named_before_a_progress_bar(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["keye convert", "from-released", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        run(main)
    wanted = "is not a released Keye-VL-1.5 directory; name the directory of the downloaded release"
    assert capsys.readouterr().err == f"error: {tmp_path} {wanted}\n"
