"""The operators and slow networks against 2×2 cases worked by hand, loops over places, and other sizes of a grid."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.hyperzzw import ContextSlowNet, SlowNet, global_product, local_product, twofold_product
from keye.hyperzzw.operators import instance_standardised, resampled_rows, standardised
from keye.hyperzzw.slow import grid_coordinates

X = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
KERNEL = torch.tensor([[[[10.0, 0.0], [1.0, -1.0]]]])


def test_the_global_operator_of_a_2x2_map() -> None:
    # x · K = [[10, 0], [3, −4]]; times [[1, 2], [3, 4]] as matrices.
    assert global_product(X * KERNEL, X).tolist() == [[[[10.0, 20.0], [-9.0, -10.0]]]]


def test_the_local_operator_of_a_2x2_map() -> None:
    # A 3×3 kernel over the map with zeros around it; the centre of the kernel lies on the place.
    kernel = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 2.0, 5.0], [0.0, 0.0, 3.0]]])
    # (0, 0): 2·1 + 5·2 + 3·4; (0, 1): 2·2; (1, 0): 1·1 + 2·3 + 5·4; (1, 1): 1·2 + 2·4.
    assert local_product(kernel, X).tolist() == [[[[24.0, 4.0], [27.0, 10.0]]]]
    two = local_product(torch.stack((kernel, -kernel)), torch.cat((X, X)))
    assert two.tolist() == [[[[24.0, 4.0], [27.0, 10.0]]], [[[-24.0, -4.0], [-27.0, -10.0]]]]


def test_the_twofold_operator_of_a_2x2_map() -> None:
    assert twofold_product(KERNEL, X).tolist() == [[[[10.0, 0.0], [9.0, -16.0]]]]


def test_standardisation_of_a_2x2_map() -> None:
    # Mean 2.5, variance 1.25.
    expected = [(value - 2.5) / math.sqrt(1.25 + 1e-5) for value in (1, 2, 3, 4)]
    assert instance_standardised(X).flatten().tolist() == pytest.approx(expected)
    assert standardised(torch.cat((X, X + 2)), (0, 2, 3)).mean().item() == pytest.approx(0, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 7), width=st.integers(1, 7), seed=st.integers(0, 9))
def test_the_global_operator_of_other_aspects_interpolates_the_rows(height, width, seed) -> None:
    rng = np.random.default_rng(seed)
    weighted, values = rng.normal(size=(2, height, width))
    places = (np.arange(width) + 0.5) * height / width - 0.5
    if width >= height:  # numpy's interpolation, constant beyond the ends
        rows = np.stack([np.interp(places, np.arange(height), values[:, k]) for k in range(width)], axis=1)
    else:
        near = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(height)) * width / height)
        rows = near / near.sum(1, keepdims=True) @ values
    found = global_product(torch.tensor(weighted)[None, None], torch.tensor(values)[None, None])[0, 0]
    np.testing.assert_allclose(found, weighted @ rows, atol=1e-5)
    assert torch.equal(resampled_rows(height, height), torch.eye(height))


@pytest.mark.parametrize("size", [None, (3, 4)])
def test_a_slow_network_at_each_place_is_its_formula(size) -> None:
    torch.manual_seed(0)
    net = SlowNet(2, 5, 2, 3, size)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    kernel = net((3, 4))
    w, b, a, o = (getattr(net, name).double() for name in ("frequencies", "phases", "weights", "offsets"))
    for row in range(3):
        for column in range(4):
            if size is None:
                point = torch.tensor([(2 * row + 1) / 3 - 1, (2 * column + 1) / 4 - 1], dtype=torch.float64)
            else:
                point = torch.tensor([row - 1.0, 2 * column / 3 - 1], dtype=torch.float64)
            state = torch.sin(w[0] @ point + b[0])
            for layer in range(2):
                state = torch.sin(w[layer + 1] @ point + b[layer + 1]) * (a[layer] @ state + o[layer])
                state = state + (0 if size is None else net.place_bias[4 * row + column].double())
            expected = net.out_weight.double() @ state + net.out_bias.double()
            torch.testing.assert_close(kernel[:, row, column].double(), expected, atol=1e-5, rtol=1e-5)


def test_initial_slow_weights_have_the_published_spread() -> None:
    torch.manual_seed(0)
    net = SlowNet(2, 4000, 1, 2, omega=3.0)
    # uniform(±1/√2) has a mean square of 1/6; γ has mean α and variance α for α = 6, 3.
    for layer, rate in enumerate((6.0, 3.0)):
        expected = (2 * math.pi * 3) ** 2 / 6 * (rate + rate**2)
        assert net.frequencies[layer].square().mean().item() == pytest.approx(expected, rel=0.1)
    assert net.weights.abs().max().item() == pytest.approx((3 / 4000) ** 0.5, rel=1e-3)
    assert (net.offsets == 1).all() and (net.phases == 0).all()


def test_grids_of_two_sizes_sample_one_picture() -> None:
    torch.manual_seed(0)
    net = SlowNet(2, 16, 2, 4, omega=0.1)
    small, large = net((5, 7)), net((15, 21))
    # The middle of three cells is the centre of the cell that they divide.
    torch.testing.assert_close(large[:, 1::3, 1::3], small, atol=1e-5, rtol=1e-4)
    assert grid_coordinates((1, 1), ends=False).tolist() == [[0.0, 0.0]]


def test_a_fixed_slow_network_refuses_another_size() -> None:
    with pytest.raises(ValueError, match=r"\(3, 3\).*ours"):
        SlowNet(2, 4, 1, 2, (3, 3))((4, 3))


def test_a_context_kernel_is_its_formula() -> None:
    torch.manual_seed(0)
    net = ContextSlowNet(3, 3, hidden=4, layers=2)
    maps = torch.randn(2, 3, 6, 6)
    kernels = net(maps)
    for batch in range(2):
        pooled = maps[batch].view(3, 3, 2, 3, 2).mean((2, 4)).flatten(1).T  # 2×2 blocks of 6×6 → 9 places
        code = torch.nn.functional.gelu(net.code(net.reduce(pooled)))
        points = grid_coordinates((3, 3), ends=True)
        state = torch.sin(points @ net.frequencies[0].T)
        for layer in range(2):
            state = torch.sin(points @ net.frequencies[layer + 1].T) * (state @ net.weights[layer].T + 1)
            state = state + 0.1 * state / state.norm(dim=0)
            state = state * (code @ net.code_weights[layer].T + 1)
        torch.testing.assert_close(kernels[batch], (state @ net.out_weight.T).T.view(3, 3, 3), atol=1e-5, rtol=1e-4)
