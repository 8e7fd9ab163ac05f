"""The model's benches compare equal work, count correctly, and run at a small size."""

import sys
import types

import pytest
import torch

from keye.model import flops
from scripts.bench import __main__ as bench
from scripts.bench.common import record
from scripts.bench.common import timing as model_timing
from scripts.bench.common.record import Claim, save
from scripts.bench.gpu import settings as gpu_settings
from scripts.bench.model import layers as model_layers
from scripts.bench.model import memory as model_memory
from scripts.bench.model import packing as model_packing
from scripts.bench.model import pairs as model_pairs
from scripts.bench.model import released_checkpoint as model_released
from tests.scripts.test_bench_gpu import drawn_plan

CPU = torch.device("cpu")


def sizes() -> gpu_settings.Sizes:
    return gpu_settings.sizes_of(True, [drawn_plan()])


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
    assert "Not measured yet: parity, speed, memory." in text
