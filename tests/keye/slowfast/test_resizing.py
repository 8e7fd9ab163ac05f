"""Resizing by matrix products, which GPUs use, gives the bytes of torch's kernel for CPUs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.slowfast.resizing import resize, resize_by_products

SIDES = st.integers(2, 150)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@settings(max_examples=40)
@given(before=st.tuples(SIDES, SIDES), after=st.tuples(SIDES, SIDES), seed=st.integers(0, 99))
def test_products_give_the_bytes_of_torchs_kernel(mode, before, after, seed):
    draw = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (2, 3, *before), dtype=torch.uint8, generator=draw)
    interleaved = frames.contiguous(memory_format=torch.channels_last)
    expected = F.interpolate(interleaved, size=after, mode=mode, antialias=True, align_corners=False)
    assert torch.equal(resize_by_products(frames, after, mode), expected)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(140, 336), (432, 980), (432, 336)])
def test_products_give_the_bytes_of_a_resized_photo(mode, size):
    row = torch.linspace(0, 255, 768)
    frame = torch.stack([row.expand(432, -1), (row * 7 % 256).expand(432, -1), row.flip(0).expand(432, -1)])
    frame = (frame + torch.randn(frame.shape, generator=torch.Generator().manual_seed(0)) * 9).clamp(0, 255).byte()
    assert torch.equal(resize_by_products(frame[None], size, mode), resize(frame[None], size, mode))
