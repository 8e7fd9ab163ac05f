"""The classifier: released counts, independence of the batch, any size, every parameter trained and saved."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from keye.errors import KeyeError
from keye.hyperzzw import HyperZZWConfig, HyperZZWNet, Kar3, fast_norms, slow_neural_loss
from keye.hyperzzw.network import slow_parameters

SMALL = {"channels": 1, "factors": (12, 2), "layers": (1, 1), "earlier": (0, 0), "dropout": (0.0, 0.0), "classes": 3}


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


@pytest.fixture(scope="module")
def released() -> HyperZZWNet:
    torch.manual_seed(0)
    return HyperZZWNet(HyperZZWConfig.released()).eval()


@pytest.fixture(scope="module")
def ours() -> HyperZZWNet:
    torch.manual_seed(0)
    return HyperZZWNet(HyperZZWConfig.ours()).eval()


def test_the_released_net_has_the_released_counts(released) -> None:
    blocks = [count(block.parameters()) for block in released.blocks]
    assert blocks == [53_377, 57_824, 105_188, 253_580, 863_996]
    assert count(released.head.parameters()) == 2_890
    assert count(slow_parameters(released)) == 318_976
    assert count(released.parameters()) == 1_336_855


def test_alone_or_in_a_batch_our_logits_are_the_same_and_the_released_ones_are_not(released, ours) -> None:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    others = torch.cat((images[:1], 3 * images[1:]))
    with torch.no_grad():
        for first in (ours(images[:1]), ours(others)):
            torch.testing.assert_close(first.logits[0], ours(images).logits[0], atol=1e-6, rtol=0)
        moved = (released(others).logits[0] - released(images).logits[0]).abs().max()
    assert moved > 1e-3


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (8, 8), (13, 6)])
def test_ours_takes_any_size_and_aspect(ours, size) -> None:
    with torch.no_grad():
        output = ours(torch.randn(2, 3, *size))
    assert output.logits.shape == (2, 10) and output.logits.isfinite().all()
    assert [kernel.shape for kernel in output.kernels] == [(width, *size) for width in (3, 12, 36, 72, 144)]


def test_the_released_net_refuses_another_size(released) -> None:
    with pytest.raises(ValueError, match="any size"):
        released(torch.randn(1, 3, 31, 32))


def test_impossible_configs_are_refused() -> None:
    with pytest.raises(KeyeError, match="one entry per block"):
        HyperZZWNet(HyperZZWConfig(earlier=(0,)))
    with pytest.raises(KeyeError, match="multiple of 12"):
        HyperZZWNet(HyperZZWConfig(channels=1))
    with pytest.raises(KeyeError, match="earlier is 5 in block 2, which has 1 outputs"):
        HyperZZWNet(HyperZZWConfig(earlier=(0, 0, 5, 1, 2)))


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 1, 8, 8), torch.zeros(3, 8, 8)]
)
def test_images_of_another_type_or_shape_are_refused(ours, images) -> None:
    with pytest.raises(KeyeError, match=r"give normalised floats \[B, 3, H, W\]"):
        ours(images)


def test_every_parameter_gets_a_gradient_and_is_saved(ours, tmp_path) -> None:
    double = copy.deepcopy(ours).double()  # rounding is far below the bound
    double(torch.randn(2, 3, 8, 8, dtype=torch.float64)).logits.square().sum().backward()
    gradients = {name: 0 if p.grad is None else p.grad.abs().max() for name, p in double.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient < 1e-9] == []
    save_file(ours.state_dict(), tmp_path / "net.safetensors")
    other = HyperZZWNet(HyperZZWConfig.ours()).eval()
    other.load_state_dict(load_file(tmp_path / "net.safetensors"))
    images = torch.randn(1, 3, 7, 9)
    assert torch.equal(other(images).logits, ours(images).logits)


def test_both_forms_learn_which_half_is_bright() -> None:
    for config in (HyperZZWConfig.ours(**SMALL), HyperZZWConfig.released(size=8, **SMALL)):
        torch.manual_seed(0)
        net = HyperZZWNet(config)
        optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
        labels = torch.arange(64) % 3
        images = 0.3 * torch.randn(64, 1, 8, 8)
        images[labels == 1, :, :4] += 1
        images[labels == 2, :, 4:] += 1
        for _ in range(25):
            loss = F.cross_entropy(net(images[:32]).logits, labels[:32])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert (net.eval()(images[32:]).logits.argmax(1) == labels[32:]).float().mean() > 0.9


def test_the_slow_neural_loss_of_small_kernels() -> None:
    first, second = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 0.0]], [[3.0, 2.0]]])
    third = torch.zeros(2, 1, 2)
    # (0 + 4 + 4 + 0) / 4 + (1 + 4 + 1 + 4) / 4 + (1 + 0 + 9 + 4) / 4
    assert slow_neural_loss([first, second, third]).item() == pytest.approx(2 + 2.5 + 3.5)
    # sums: [1, 2], [4, 2], [0, 0]
    assert slow_neural_loss([first, second, third], summed=True).item() == pytest.approx(4.5 + 2.5 + 10)
    assert slow_neural_loss([first]).item() == 0


def test_fast_norms_are_of_the_parameters_outside_slow_networks(released) -> None:
    slow = {id(parameter) for parameter in slow_parameters(released)}
    expected = sum(p.square().sum().sqrt().item() for p in released.parameters() if id(p) not in slow)
    assert fast_norms(released).item() == pytest.approx(expected, rel=1e-5)


def test_three_steps_of_kar3_by_hand() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = Kar3([parameter], lr=0.1, betas=(0.5, 0.9))
    # Signs of (gradient, short average, long average); averages before the gradient.
    for gradient, expected in (
        ([4.0, 0.0], [0.9, 1.0]),  # + 0 0; averages become 2, 0.4
        ([-3.0, 1.0], [0.8, 0.9]),  # − + +; averages become −0.5, 0.06
        ([1.0, -9.0], [0.7, 0.8]),  # + − +; and − + +
    ):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        assert parameter.tolist() == pytest.approx(expected)
    with pytest.raises(KeyeError, match="betas"):
        Kar3([parameter], betas=(0.5, 1.0))
