"""The memory of a training step compared with autograd and the optimizer, and its parts by hand."""

from dataclasses import replace

import pytest
import torch

from keye.model.config import KeyeConfig
from keye.model.decoder import RMSNorm
from keye.model.keye import KeyeForConditionalGeneration
from scripts.bench.stages.cost import BASE, Case, pack_of
from stages.cost.footprint import Plan, Share, activations, footprint, reduced, states, tower_chunk, tower_layer


def kept_by_autograd(case: Case, dtype: torch.dtype) -> int:
    """Bytes that the graph of one forward pass keeps in addition to weights and inputs."""
    torch.manual_seed(0)
    model = KeyeForConditionalGeneration(case.config()).to(dtype).train()
    if case.stage == "alignment":
        model.requires_grad_(False).projector.requires_grad_(True)
    pack = pack_of(case)
    passed = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *pack.values()]}
    held: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in passed:
            held[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(**pack, num_items_in_batch=1.0)
    return sum(x.untyped_storage().nbytes() for x in held.values())


class KeepsItsInput(torch.autograd.Function):
    """A norm that keeps for its backward pass what a GPU's kernel keeps: input, weight, and a number for each row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


@pytest.mark.parametrize("fused", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [
    replace(BASE, layers=2, tower=2, tokens=512, documents=1),
    replace(BASE, width=256, layers=1, tower=4, tokens=512),
    replace(BASE, layers=3, tower=1, tokens=256, stage="alignment"),
], ids=["decoder", "tower", "alignment"])  # fmt: skip
def test_activations_are_what_autograd_keeps(case: Case, dtype: torch.dtype, fused: bool, monkeypatch):
    if fused:
        run = KeepsItsInput.apply
        monkeypatch.setattr(RMSNorm, "forward", lambda norm, x: run(x, norm.weight, norm.variance_epsilon))
    work, element = case.work(), torch.finfo(dtype).bits // 8
    share = Share(case.tokens, work.patches, work.labels)
    kept, _, _ = activations(case.config(), Plan(element, 1, 1, fused=fused), share, case.stage == "alignment")
    assert kept == pytest.approx(kept_by_autograd(case, dtype), rel=0.06)


def test_states_are_zeros():
    # ZeRO (arXiv 1910.02054, figure 1) with 7.5 G parameters on 64 ranks, buckets left out: 16.6 and 1.9 GB for stages
    # 2 and 3, and 2 more bytes per parameter of each rank's share, because gradients are fp32. Stages 0 and 1 run as 2.
    sizes = []
    for zero in range(4):
        held = states(7.5e9, 7.5e9, Plan(2, zero, 64, buckets=0, live=0))
        sizes.append(sum(held[name] for name in ("weights", "gradients", "optimizer")) / 1e9)
    more = 2 * 7.5 / 64
    assert sizes == pytest.approx([16.6 + more] * 3 + [1.9 + more], abs=0.05)


def test_a_second_copy_within_the_node_is_counted():
    plain, twice = (states(8e9, 8e9, Plan(2, 3, 64, live=0, hpz=hpz)) for hpz in (1, 8))
    assert twice["weights"] - plain["weights"] == 2 * 8e9 / 8


@pytest.mark.parametrize(
    ("zero", "hpz", "wanted"),
    [
        (3, 1, 2 * (8e9 / 64 + 0.6e9)),  # shares, and one tensor at a time complete
        (3, 8, 2 * (8e9 / 64 + 0.6e9 + 8e9 / 8)),
        (2, 1, 2 * 8e9),
    ],
)
def test_weights_are_read_a_tensor_at_a_time_with_zero_3(zero, hpz, wanted):
    assert states(8e9, 8e9, Plan(2, zero, 64, hpz=hpz), largest=0.6e9)["start"] == pytest.approx(wanted)


def test_frozen_parameters_have_neither_gradients_nor_states():
    held = states(1e9, 1e6, Plan(2, 0, 1))
    assert held["weights"] == 2e9 and held["gradients"] == 4e6 and held["optimizer"] == 12e6


def test_the_peak_is_the_largest_moment_and_its_parts_add_up():
    config = BASE.config()
    for tokens, zero in ((64, 0), (4096, 1), (65_536, 3)):
        made = footprint(config, Plan(2, zero, 4), Share(tokens, 4 * tokens, tokens // 4), 1e8, 1e8)
        assert made.peak == max(made.moments.values()) == pytest.approx(sum(made.parts.values()))


def test_every_memory_option_saves_memory():
    config, share = BASE.config(), Share(8192, 8192, 1024)

    def peak(**settings: object) -> float:
        return footprint(config, Plan(2, 1, 8, **settings), share, 1e7, 1e7).peak

    plain, recomputed = peak(), peak(checkpointing=True)
    tiled, offloaded = peak(checkpointing=True, mlp_tiles=8), peak(checkpointing=True, offload=True)
    assert plain > 2 * recomputed and recomputed > tiled and recomputed > offloaded


def test_gradients_of_earlier_micro_batches_stay_during_the_loss():
    config, share = KeyeConfig.preset("tiny"), Share(1000, 400, 100)
    # ZeRO-1 in fp32: a gradient of each parameter, and two buckets. In bf16 it runs as ZeRO-2: a share of fp32 sums.
    for element, zero, before in ((4, 1, 4 * (1e6 + 2 * 1e6)), (2, 1, 4 * 1e6 / 4), (2, 2, 4 * 1e6 / 4)):
        one, several = (
            footprint(config, Plan(element, zero, 4, micro_batches=1 + more), share, 1e6, 1e6).moments
            for more in (False, True)
        )
        pixels = 400 * 3 * 14 * 14  # of the second micro-batch
        assert several["at the loss"] - one["at the loss"] == before + pixels
        assert several["in the backward pass"] == one["in the backward pass"] + pixels


def test_buckets_exist_only_in_the_backward_pass():
    # 600 M parameters: buckets of 500 M. bf16: two of them, the joined slices of a third, and these in fp32.
    held = states(600e6, 600e6, Plan(2, 2, 4))
    assert held["gradients"] == 4 * 150e6 and held["buckets"] == 500e6 * 2 * 2
    assert reduced(600e6, Plan(2, 2, 4)) == 500e6 * (2 + 4)
    assert held["step"] == 0  # the optimizer reads the fp32 sums
    # Fewer parameters: buckets of their size (`engine.build`). fp32: no other precision, but a flat copy for the step.
    held = states(1e6, 1e6, Plan(4, 2, 4))
    assert held["buckets"] == 1e6 * 2 * 4 and reduced(1e6, Plan(4, 2, 4)) == 4e6
    assert held["step"] == 4 * 1e6 / 4
    made = footprint(KeyeConfig.preset("tiny"), Plan(2, 2, 4), Share(1000, 400, 100), 600e6, 600e6)
    backward, step = made.moments["in the backward pass"], made.moments["in the optimizer's step"]
    assert step == 1.2e9 + 12 * 150e6 + 4 * 150e6 + made.pixels
    assert backward - step == pytest.approx(made.buckets + made.activations + made.layer)


def test_pixels_of_all_micro_batches_stay_during_a_step():
    config, share = KeyeConfig.preset("tiny"), Share(1000, 400, 100)
    one, four = (footprint(config, Plan(2, 2, 4, micro_batches=n), share, 1e6, 1e6) for n in (1, 4))
    assert one.pixels == 400 * 3 * 14 * 14 and four.pixels == 4 * one.pixels
    assert four.parts["pixels"] == four.pixels


def test_logits_of_a_second_chunk_add_to_the_heads_gradient():
    config = KeyeConfig.preset("tiny")
    text = config.text_config
    head = 2 * text.vocab_size * text.hidden_size
    one, two = (activations(config, Plan(2, 2, 4), Share(0, 0, labels))[2] for labels in (4096, 4097))
    assert one == 4096 * text.vocab_size * (2 + 4 + 4 + 2) and two - one == head
    few = activations(config, Plan(2, 2, 4), Share(0, 0, 1))[2]  # what is left of one row's logits, and that gradient
    assert few == 2 * text.vocab_size + head
    frozen = activations(config, Plan(2, 2, 4), Share(0, 0, 1), frozen=True)[2]
    assert frozen == 12 * text.vocab_size


def test_a_large_frame_keeps_its_layers_inputs_and_one_layer():
    vision = KeyeConfig.preset("keye_8b").vision_config
    layer = 2 * (8 * 1152 + 2 * 4304) + 4 * 16
    assert tower_layer(vision, 2) == layer
    chunk = 4096 * (2 * 588 + 27 * layer)
    assert tower_chunk(vision, 2, 100_000) == chunk == tower_chunk(vision, 2, 100_000, frame=4096)
    large = 81_920 * (2 * 588 + 27 * 2 * 1152 + layer + 2 * (1152 + 4304))
    assert tower_chunk(vision, 2, 100_000, frame=81_920) == large > 2 * chunk


def test_decoder_and_frames_do_not_add_up_in_the_backward_pass():
    config, plan = KeyeConfig.preset("keye_8b"), Plan(2, 2, 64, checkpointing=True)
    kept, besides, _ = activations(config, plan, Share(8192, 0, 0))
    _, alone, _ = activations(config, plan, Share(0, 4096, 0))
    both, with_both, _ = activations(config, plan, Share(8192, 4096, 0))
    # Two chunks share the tower's gradient, 27 layers of bf16, and are not reduced in between.
    _, several, _ = activations(config, plan, Share(0, 8192, 0), reduced=1e9)
    assert several - alone == 2 * 27 * (4 * 1152**2 + 2 * 1152 * 4304)
    assert activations(config, plan, Share(8192, 0, 0), reduced=1e9)[1] - besides == 1e9
    seen = 4096 * (2 * 4096 / 4 + 2 * 1152)
    assert alone == 4096 * (2 * 588 + 27 * tower_layer(config.vision_config, 2)) and both == kept + seen
    assert both + with_both == max(both + besides, seen + alone)


def test_projector_is_recomputed_for_a_large_frame_as_a_whole():
    config, plan = KeyeConfig.preset("keye_8b"), Plan(2, 2, 64, checkpointing=True)
    share = Share(0, 32_068, 0, frame=20_164)
    _, besides, _ = activations(config, plan, share, frozen=True)
    # For each token: merged, norm, before and after the GELU and one gradient (4 × 1,152 wide), and the result (4,096).
    assert besides == 20_164 / 4 * 2 * (5 * 4 * 1152 + 4096)
    _, small, _ = activations(config, plan, Share(0, 32_068, 0), frozen=True)
    assert small == 4096 / 4 * 2 * (5 * 4 * 1152 + 4096)
