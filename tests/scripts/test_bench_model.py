"""The model's benches compare equal work, count correctly, and run at a small size."""

import json
import subprocess
import sys
import types

import pytest
import torch

from keye.model import flops
from scripts.bench import __main__ as bench
from scripts.bench.common import record
from scripts.bench.common import timing as model_timing
from scripts.bench.common.record import Claim, save
from scripts.bench.model import gpu as model_gpu
from scripts.bench.model import layers as model_layers
from scripts.bench.model import memory as model_memory
from scripts.bench.model import packing as model_packing
from scripts.bench.model import pairs as model_pairs
from scripts.bench.model import released_checkpoint as model_released
from scripts.bench.model import settings as model_settings

CPU = torch.device("cpu")


def sizes() -> model_settings.Sizes:
    return model_settings.sizes_of(small=True)


def test_both_models_read_the_same_tokens_and_have_almost_the_same_weights() -> None:
    torch.manual_seed(0)
    grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    given = model_pairs.batch(torch.randn(28, 3, 14, 14), grid, 2048)
    pair = model_pairs.models("tiny")
    with torch.no_grad():
        for who, one in pair.items():
            inputs = given.inputs[who]
            assert one(**inputs).logits.shape == (1, given.tokens, 2048)
            assert int((inputs["input_ids"] == model_pairs.VIDEO).sum()) == given.visual == 7
    ours, theirs = (sum(p.numel() for p in one.parameters()) for one in pair.values())
    assert abs(ours / theirs - 1) < 0.06  # positions, norms and biases differ
    # Theirs reads 2×2 squares one after another: the second square begins with the third patch of the first row.
    first = given.inputs["ours"]["pixel_values_videos"].flatten(1)
    assert torch.equal(given.inputs["Qwen2.5-VL"]["pixel_values_videos"][4], first[2])


def test_a_gated_mlp_of_the_width_given_takes_as_many_operations() -> None:
    assert model_layers.gated_width(4304) == 2872
    assert abs(3 * 2872 / (2 * 4304) - 1) < 0.002


@pytest.mark.parametrize("kind", ["vision", "decoder"])
def test_layers_of_both_compute_as_many_operations_as_is_said(kind) -> None:
    given = sizes()
    if kind == "vision":
        stacks = [
            model_layers.our_vision(given.config.vision_config, [(4, 6), (2, 2)], CPU, torch.float32, "sdpa"),
            model_layers.their_vision(given.config.vision_config, [(4, 6), (2, 2)], CPU, torch.float32),
        ]
    else:
        text = given.config.text_config
        stacks = [
            model_layers.our_decoder(text, [12, 5], CPU, torch.float32, "sdpa"),
            model_layers.their_decoder(text, [12, 5], CPU, torch.float32),
        ]
    for stack in stacks:
        weights = sum(p.numel() for layer in stack.layers for p in layer.parameters() if p.ndim == 2)
        tokens = stack.inputs.shape[-2]
        pairs = flops.attention_pairs([24, 4] if kind == "vision" else [12, 5], kind == "decoder")
        width = 96 if kind == "vision" else 128
        assert stack.flops == 2 * tokens * weights + 4 * width * pairs * len(stack.layers)
        stack.step()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in stack.layers.parameters())


def test_a_layer_gives_the_same_with_recomputing_and_compiled() -> None:
    given = sizes()
    stack = model_layers.our_vision(given.config.vision_config, [(4, 6), (2, 2)], CPU, torch.float32, "sdpa")
    outputs = [stack.forward(recompute).detach() for recompute in (False, True)]
    stack.compile("eager", fullgraph=True)
    for output in (outputs[1], stack.forward().detach()):
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-5)


def test_packings_of_the_released_shapes_hold_8192_tokens() -> None:
    large = model_settings.sizes_of(small=False)
    assert [sum(h * w for h, w in frames) for frames in large.frames.values()] == [8192, 4 * 8192]
    assert all(sum(lengths) == 8192 for lengths in large.documents.values())
    text, vision = large.config.text_config, large.config.vision_config
    assert (text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (4096, 32, 8, 128)
    assert (vision.hidden_size, vision.intermediate_size, vision.num_attention_heads) == (1152, 4304, 16)


def test_the_gpu_part_runs_small_and_counts_what_fails(tmp_path, monkeypatch, capsys) -> None:
    broken = model_layers.their_vision

    def theirs(*args: object) -> model_layers.Stack:
        if theirs.calls:
            raise torch.OutOfMemoryError("no room\nfor more")
        theirs.calls += 1
        return broken(*args)

    theirs.calls = 0
    monkeypatch.setattr(model_layers, "their_vision", theirs)
    given = sizes()
    quiet = type(given)(**{**vars(given), "compiler": "eager", "rounds": 1})
    model_gpu.measure(quiet, CPU, tmp_path, limit=1e9)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["quick"] and not (tmp_path / "gpu_partial.json").exists()
    titles = [table["title"] for table in found["tables"]]
    assert len(titles) == 5 and titles[3].startswith("One layer: decoder")
    settings = [row[1] for row in found["tables"][3]["rows"]]
    assert {"ours, sdpa", "ours, sdpa, compiled, checkpointing", "Qwen2.5-VL"} <= set(settings)
    failed = [row for row in found["tables"][4]["rows"] if row[2].startswith("failed")]
    assert len(failed) == 2 and failed[0][2] == "failed: OutOfMemoryError: no room"
    claims = {claim["claim"]: claim for claim in found["claims"]}
    share = claims["decoder layers, forward + backward, share of the measured matrix ceiling"]
    assert share["goal"] == "≥ 50%" and share["met"] is not None
    assert "no room" in capsys.readouterr().out


def test_rows_after_the_time_is_up_are_named(tmp_path) -> None:
    bench = model_gpu.Bench(sizes(), CPU, tmp_path, "gpu", limit=-1)
    bench.ceiling = 1.0
    row = model_settings.Row("decoder", "ours, sdpa", lambda: pytest.fail("began"))
    bench.stacks([row])
    assert row.failure == "not measured: the time was up"
    assert "the time was up" in (tmp_path / "gpu_partial.json").read_text()


def test_the_gpu_part_without_a_gpu_says_so_and_touches_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["model_gpu.py", "--out", str(tmp_path)])
    (tmp_path / "gpu.json").write_text("earlier")
    assert model_gpu.main() == 0
    assert "need a GPU" in capsys.readouterr().out and (tmp_path / "gpu.json").read_text() == "earlier"


def test_the_gpu_part_needs_no_video_library() -> None:
    modules = ("av", "datasets", "deepspeed", "peft", "rich", "skimage")
    code = f"import sys\nfor name in {modules}: sys.modules[name] = None\nimport scripts.bench.model.gpu"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=record.ROOT, timeout=120)


def test_times_are_taken_in_alternating_order_after_a_warm_up() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = model_timing.in_turn(calls, 3, CPU)
    assert "".join(order) == "ab" + "abbaab" and [len(times[name]) for name in "ab"] == [3, 3]
    assert model_timing.ratio([2.0, 3.0, 8.0], [1.0, 2.0, 2.0]) == 2.0


def test_packed_and_padded_rows_hold_the_same_documents() -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = model_packing.mixed_lengths(5, 64, draw)
    assert max(lengths) == 64 and min(lengths) >= 8
    both = model_packing.rows(lengths, 100, draw)
    packed, padded = both["packed"], both["padded"]
    assert torch.equal(padded["input_ids"][padded["attention_mask"].bool()], packed["input_ids"][0])
    assert torch.equal(padded["shift_labels"][padded["attention_mask"].bool()], packed["shift_labels"][0])
    assert packed["cu_seqlens"].tolist()[-1] == sum(lengths) and (packed["shift_labels"] == -100).sum() == 5


def test_a_checkpoint_changed_on_its_way_is_noticed(tmp_path, monkeypatch) -> None:
    config = model_memory.KeyeConfig.preset("tiny", vocab_size=64, num_hidden_layers=1)
    assert model_released.round_trip(config, tmp_path / "whole")[0] == 0

    def spoiled(source, out, **options) -> None:
        real(source, out, **options)
        file = next(out.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1] + b"!")

    real = model_released.convert_released
    monkeypatch.setattr(model_released, "convert_released", spoiled)
    assert model_released.round_trip(config, tmp_path / "spoiled")[0] == 1


def test_a_part_that_fails_is_named_and_the_document_says_what_was_not_measured(tmp_path, monkeypatch, capfd) -> None:
    options = ["model", "--quick", "--out", str(tmp_path), "--part", "speed", "packing"]
    monkeypatch.setattr(sys, "argv", ["scripts.bench", *options])
    save(tmp_path, "packing", [Claim("packed", "faster", "yes", met=True)], seconds=1, quick=True)

    def part(command: list[str], **_: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(returncode=int(command[2].endswith(".speed")))

    monkeypatch.setattr(record.subprocess, "run", part)
    assert bench.main() == 1
    assert "run again with --part speed" in capfd.readouterr().err
    text = (tmp_path / "model.md").read_text()
    assert text.startswith("# The model, measured") and "| packed | faster | yes |  | yes |" in text
    assert "Not measured yet: parity, speed, memory, gpu." in text
