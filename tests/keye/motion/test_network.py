"""The network against the published counts, another library's outputs, and a hand computation."""

import importlib
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from keye.errors import ArgumentError, CheckpointError
from keye.motion.frames import macs, pathways, slow_places
from keye.motion.names import load_zoo, pyslowfast, pytorchvideo
from keye.motion.network import Lateral, SlowFastNet
from keye.motion.settings import PRESETS, MotionSettings, SlowFastSettings

PACKAGES = ("pytorchvideo==0.1.5", "fvcore==0.1.5.post20221221", "iopath==0.1.10", "parameterized==0.9.0",
            "yacs==0.1.8", "portalocker", "tabulate", "termcolor")  # fmt: skip
SITE = Path(__file__).resolve().parents[3] / ".cache" / "pytorchvideo"


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("r50_4x16", 34_480_216), ("r50_8x8", 34_566_488), ("r101_8x8_50_50", 53_774_808), ("r101_8x8", 62_826_968)],
)
def test_presets_have_the_published_numbers_of_parameters(preset, parameters):
    with torch.device("meta"):
        network = SlowFastNet(preset)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(("preset", "billions"), [("r50_4x16", 36.10), ("r50_8x8", 65.71), ("r101_16x8_50_50", 213.02)])
def test_presets_have_the_counted_multiply_accumulates(preset, billions):
    assert macs(PRESETS[preset]) / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize(
    ("lateral", "paper"), [("none", 34.2), ("sum", 34.2), ("concat", 39.8), ("sample", 34.9), ("conv", 36.1)]
)
def test_lateral_variants_cost_what_the_paper_says(lateral, paper):
    assert macs(replace(PRESETS["r50_4x16"], lateral=lateral)) / 1e9 == pytest.approx(paper, abs=0.1)


def test_slow_frames_are_the_truncated_ones_of_the_release():
    assert slow_places(32, 4) == [0, 4, 8, 13, 17, 22, 26, 31]
    assert slow_places(32, 8) == [0, 10, 20, 31]
    assert slow_places(8, 8) == [0]
    with pytest.raises(ArgumentError, match="multiple of alpha = 8"):
        slow_places(12, 8)


def test_frames_are_normalised_and_divided_among_the_pathways():
    frames = torch.zeros(1, 8, 3, 2, 2, dtype=torch.uint8)
    frames[:, 7] = 255
    slow, fast = pathways(frames, SlowFastSettings(frames=2, alpha=4))
    assert slow.shape == (1, 3, 2, 2, 2) and fast.shape == (1, 3, 8, 2, 2)
    assert fast[0, 0, 0, 0, 0].item() == pytest.approx(-2.0)
    assert slow[0, 0, 1, 0, 0].item() == pytest.approx((1 - 0.45) / 0.225)


def test_a_lateral_connection_mixes_frames_as_computed_by_hand():
    """Two fast channels of 4 frames, alpha 2: the two frames of each slow frame follow one another as channels."""
    slow, fast = torch.zeros(1, 1, 2, 1, 1), torch.arange(8.0).view(1, 2, 4, 1, 1)
    found = Lateral(2, SlowFastSettings(alpha=2, beta=2, lateral="concat"))(slow, fast)
    assert found[0, :, :, 0, 0].tolist() == [[0, 0], [0, 2], [1, 3], [4, 6], [5, 7]]
    sampled = Lateral(2, SlowFastSettings(alpha=2, beta=2, lateral="sample"))(slow, fast)
    assert sampled[0, :, :, 0, 0].tolist() == [[0, 0], [0, 2], [4, 6]]


def test_impossible_settings_and_inputs_are_refused():
    with pytest.raises(ArgumentError, match="alpha 8 must equal beta 4"):
        SlowFastSettings(lateral="sum", beta=4)
    with pytest.raises(ArgumentError, match="r50_4x16"):
        SlowFastNet("r50")
    with pytest.raises(ArgumentError, match="4 times as many"):
        SlowFastNet("tiny")([torch.zeros(1, 3, 2, 8, 8), torch.zeros(1, 3, 4, 8, 8)])
    with pytest.raises(ArgumentError, match="four numbers"):
        SlowFastSettings(blocks=(1, 1, 1))
    with pytest.raises(ArgumentError, match="block 6 of res4, which has 6"):
        SlowFastSettings(nonlocal_blocks=(6,))
    with pytest.raises(ArgumentError, match="name of a preset"):
        SlowFastNet({"width": 16})


@pytest.mark.parametrize("values", [{"size": "32"}, {"blocks": 2}, {"blocks": [1, 0]}, {"alpha": 0}])
def test_impossible_values_of_the_motion_pathway_are_named(values):
    with pytest.raises(ArgumentError, match=f"motion: .*{next(iter(values))}.* give"):
        MotionSettings.of(values)


@pytest.mark.parametrize(
    "frames",
    [torch.rand(1, 16, 3, 8, 8), torch.zeros(16, 3, 8, 8, dtype=torch.uint8), np.zeros((1, 16, 3, 8, 8), np.uint8)],
)
def test_frames_of_another_type_or_shape_are_refused(frames):
    """Floats from 0 to 1 would be divided by 255 once more."""
    with pytest.raises(ArgumentError, match=r"give a tensor torch.uint8 \[B, frames, 3, H, W\]"):
        pathways(frames, PRESETS["tiny"])
    with pytest.raises(ArgumentError, match="give normalised floats"):
        SlowFastNet("tiny")([torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8, 8)])


def test_a_network_in_bfloat16_takes_the_frames_of_pathways():
    network = SlowFastNet("tiny").eval()
    clips = pathways(torch.randint(0, 256, (1, 16, 3, 32, 32), dtype=torch.uint8), network.settings)
    expected = network(clips)
    torch.testing.assert_close(network.bfloat16()(clips).float(), expected, atol=2e-2, rtol=5e-2)


def test_a_file_that_is_not_weights_by_name_is_refused():
    network = SlowFastNet("tiny")
    state = {pyslowfast(name): value for name, value in network.state_dict().items()}
    for wrong, said in [
        ({"model_state": state}, "the complete file"),
        ("file.pkl", "file.pkl"),
        ({name: value.numpy() for name, value in state.items()}, "ndarray; give tensors"),
        ({f"module.{name}": value for name, value in state.items()}, "remove a prefix"),
        (network.state_dict(), "use load_state_dict"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            load_zoo(network, wrong)


def test_a_single_pathway_is_a_network_of_its_own():
    settings = replace(PRESETS["tiny"], slow=False, frames=2)
    frames = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8)
    assert SlowFastNet(settings)(pathways(frames, settings)).shape == (2, 4)


@pytest.mark.parametrize("rename", [pyslowfast, pytorchvideo])
def test_weights_load_under_the_names_of_the_zoo(rename):
    torch.manual_seed(0)
    source, target = SlowFastNet("tiny"), SlowFastNet("tiny")
    state = {rename(name): value for name, value in source.state_dict().items()}
    assert load_zoo(target, state).lower() == rename.__name__
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    state.pop(rename("lateral.3.conv.weight"))
    with pytest.raises(CheckpointError, match="1 weights are missing"):
        load_zoo(target, state)


def test_nonlocal_blocks_have_pyslowfasts_names():
    assert pyslowfast("stages.2.slow.nonlocal13.theta.bias") == "s4.pathway0_nonlocal13.conv_theta.bias"
    assert pyslowfast("stages.2.slow.nonlocal13.norm.weight") == "s4.pathway0_nonlocal13.bn.weight"


def test_a_nonlocal_block_equals_the_sum_over_all_places():
    """Against the definition: each place adds the values of all pooled places, weighted by dot products."""
    from keye.motion.network import NonLocal

    torch.manual_seed(0)
    block = NonLocal(4).eval()
    torch.nn.init.ones_(block.norm.weight)
    x = torch.randn(1, 4, 2, 4, 4)
    pooled = torch.nn.functional.max_pool3d(x, (1, 2, 2))
    theta, phi, g = block.theta(x).flatten(2)[0], block.phi(pooled).flatten(2)[0], block.g(pooled).flatten(2)[0]
    mixed = torch.zeros(2, 32)
    for i in range(32):
        for j in range(8):
            mixed[:, i] += (theta[:, i] @ phi[:, j]) * g[:, j] / 8
    wanted = x + block.norm(block.out(mixed.view(1, 2, 2, 4, 4)))
    assert torch.allclose(block(x), wanted, atol=1e-5)


@pytest.fixture(scope="session")
def theirs():
    """`pytorchvideo.models.slowfast`, installed once into .cache; torchvision, which it imports, is not needed."""
    if not (SITE / "pytorchvideo").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(SITE), *PACKAGES]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("pytorchvideo cannot be installed here")
    names = ("torchvision", "torchvision.ops", "torchvision.transforms")
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision.ops"].RoIAlign = torch.nn.Identity
    sys.path.insert(0, str(SITE))
    try:
        return importlib.import_module("pytorchvideo.models.slowfast")
    finally:
        sys.path.remove(str(SITE))
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


@pytest.mark.parametrize("preset", ["r50_4x16", "r50_8x8"])
def test_outputs_equal_those_of_pytorchvideo(theirs, preset):
    settings = PRESETS[preset]
    torch.manual_seed(0)
    network = theirs.create_slowfast(
        slowfast_channel_reduction_ratio=(8,), slowfast_conv_channel_fusion_ratio=2,
        slowfast_fusion_conv_kernel_size=(settings.lateral_kernel, 1, 1),
        slowfast_fusion_conv_stride=(settings.alpha, 1, 1),
        model_depth=50, model_num_class=400, head_pool_kernel_sizes=((settings.frames, 2, 2), (settings.raw, 2, 2)),
    )  # fmt: skip
    for module in network.modules():  # their start has norms of zero, which hide the blocks
        if isinstance(module, torch.nn.BatchNorm3d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.uniform_(-0.2, 0.2)
    ours = SlowFastNet(settings).eval()
    assert load_zoo(ours, network.state_dict()) == "PyTorchVideo"
    clips = [torch.randn(1, 3, settings.frames, 64, 64), torch.randn(1, 3, settings.raw, 64, 64)]
    with torch.no_grad():
        wanted, found = network.eval()([clip.clone() for clip in clips]), ours(clips)
    assert found.std() > 1e-3
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-5
