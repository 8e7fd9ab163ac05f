"""Merging is plain arithmetic on every tensor, and refuses models that differ."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from keye import KeyeConfig, KeyeForConditionalGeneration
from keye.checkpoint.shards import INDEX
from keye.errors import CheckpointError
from stages.merge import Weights, merge

WHOLE = "model.safetensors"
ROOT = Path(__file__).resolve().parents[2]


def save(path: Path, seed: int, dtype: torch.dtype = torch.float32, **text: object) -> Path:
    torch.manual_seed(seed)
    config = KeyeConfig.preset("tiny", **{"vocab_size": 384, "num_hidden_layers": 2, **text})
    KeyeForConditionalGeneration(config).to(dtype).save_pretrained(path)
    (path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "padding": null}')
    (path / "preprocessor_config.json").write_text('{"encoder": {}}')
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save(folder / f"model{i}", i) for i in range(3)]


def state(path: Path) -> dict[str, torch.Tensor]:
    return KeyeForConditionalGeneration.from_pretrained(path).state_dict()


@pytest.mark.parametrize("weights", [None, [2.0, 1.0, 1.0]])
def test_mean_is_that_of_plain_arithmetic(models: list[Path], tmp_path: Path, weights: list[float] | None):
    out = merge(models, tmp_path / "merged", weights, progress=False)
    one, two, three = map(state, models)
    a, b, c = [1 / 3] * 3 if weights is None else [0.5, 0.25, 0.25]
    merged = state(out)
    assert merged.keys() == one.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, a * one[name] + b * two[name] + c * three[name])
    assert not torch.equal(merged["lm_head.weight"], one["lm_head.weight"])


def test_a_base_in_bf16_is_the_start_of_models_in_fp32(models: list[Path], tmp_path: Path):
    base = save(tmp_path / "base", 7, torch.bfloat16)
    out = merge(models[:2], tmp_path / "merged", [0.5, 0.25], progress=False, base=base)
    one, two, start, merged = map(state, (*models[:2], base, out))
    for name, tensor in merged.items():
        before = start[name].float()
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, before + 0.5 * (one[name] - before) + 0.25 * (two[name] - before))
    with pytest.raises(CheckpointError, match="same shapes and dtype"):
        merge([models[0], base], tmp_path / "refused", progress=False)


def test_result_has_the_first_models_files_and_says_what_it_is(models: list[Path], tmp_path: Path):
    out = merge(models[:2], tmp_path / "merged", progress=False)
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (out / name).read_bytes() == (models[0] / name).read_bytes()
    assert json.loads((out / "merge.json").read_text())["weights"] == [0.5, 0.5]
    assert not list(tmp_path.glob(".merged*"))


def test_shards_in_and_out_give_the_same_as_one_file(models: list[Path], tmp_path: Path):
    whole = merge(models[:2], tmp_path / "whole", progress=False)
    shards = merge(models[:2], tmp_path / "shards", shard_bytes=300_000, progress=False)
    assert (whole / WHOLE).is_file() and not (whole / INDEX).exists()
    files = sorted(shards.glob("*.safetensors"))
    assert len(files) > 2 and (shards / INDEX).is_file()
    one, other = state(whole), state(shards)
    assert all(torch.equal(one[name], other[name]) for name in one)
    # A mean with itself, read from shards, changes nothing.
    again = state(merge([shards, shards], tmp_path / "again", progress=False))
    assert all(torch.allclose(one[name], again[name]) for name in one)
    assert not (tmp_path / "again" / INDEX).exists()


def test_bf16_models_are_averaged_in_fp32_and_stay_bf16(tmp_path: Path):
    paths = [save(tmp_path / str(seed), seed, torch.bfloat16) for seed in (1, 2)]
    merged = Weights(merge(paths, tmp_path / "merged", progress=False))
    name = next(n for n in merged.tensors if n.endswith("embed_tokens.weight"))
    one, two = (Weights(path).read(name) for path in paths)
    assert torch.equal(merged.read(name), ((one.float() + two.float()) / 2).bfloat16())


def test_models_that_are_not_alike_are_refused_by_name(models: list[Path], tmp_path: Path):
    out = tmp_path / "merged"
    wide = save(tmp_path / "wide", 0, intermediate_size=256)
    with pytest.raises(CheckpointError, match=r"tensor \S*mlp\.\S+ is F32 .* merge models of the same shapes"):
        merge([models[0], wide], out)
    deep = save(tmp_path / "deep", 0, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"tensor \S*layers\.2\.\S+ is in \S*deep but not in"):
        merge([models[0], deep], out)
    half = save(tmp_path / "half", 0, torch.bfloat16)
    with pytest.raises(CheckpointError, match="tensor .* is F32 .* but BF16"):
        merge([models[0], half], out)
    far = save(tmp_path / "far", 0, rope_parameters={"rope_type": "default", "rope_theta": 8e6})
    with pytest.raises(CheckpointError, match=r"differ in text_config\.rope_parameters\.rope_theta"):
        merge([models[0], far], out)
    words = save(tmp_path / "words", 0)
    (words / "tokenizer.json").write_text('{"model": {"vocab": {"b": 0}}}')
    with pytest.raises(CheckpointError, match="share a vocabulary"):
        merge([models[0], words], out)
    assert not out.exists() and not list(tmp_path.glob(".merged*"))


def test_tokenizers_may_differ_in_how_they_pad(models: list[Path], tmp_path: Path):
    other = save(tmp_path / "other", 1)
    (other / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "padding": {"strategy": "BatchLongest"}}')
    assert merge([models[0], other], tmp_path / "merged", progress=False).is_dir()


def test_torn_file_and_place_in_use_are_refused(models: list[Path], tmp_path: Path):
    torn = save(tmp_path / "torn", 0)
    (torn / WHOLE).write_bytes((torn / WHOLE).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"torn/model\.safetensors: not a safetensors file or damaged"):
        merge([models[0], torn], tmp_path / "merged")
    with pytest.raises(CheckpointError, match="exists already"):
        merge(models, models[0])
    with pytest.raises(CheckpointError, match="2 weights for 3 models"):
        merge(models, tmp_path / "merged", [1, 1])
    with pytest.raises(CheckpointError, match="must all be above 0"):
        merge(models, tmp_path / "merged", [1, 0, 1])


def test_script_merges_and_shows_examples(models: list[Path], tmp_path: Path):
    def script(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "scripts/merge.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert "--weights 2,1,1" in script("--help").stdout
    done = script(*models, "--weights", "2,1,1", "--out", tmp_path / "merged")
    assert done.returncode == 0 and "merging: " in done.stdout and (tmp_path / "merged" / WHOLE).is_file()
    wrong = script(models[0], tmp_path / "nowhere", "--out", tmp_path / "other")
    assert wrong.returncode == 2 and "nowhere: no such directory" in wrong.stderr
    assert "Traceback" not in wrong.stderr
