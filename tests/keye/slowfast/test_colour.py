import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from keye.slowfast.measures import colour
from keye.slowfast.measures.colour import hsv_from_tables, rgb_to_hsv, rgb_to_lab


def test_hsv_is_opencv_to_the_bit():
    cv2 = pytest.importorskip("cv2")
    steps = torch.cartesian_prod(*[torch.arange(0, 256, 5)] * 3).to(torch.uint8)
    noise = torch.randint(0, 256, (300_000, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = torch.cat([steps, noise])
    theirs = cv2.cvtColor(pixels.numpy()[None], cv2.COLOR_RGB2HSV)[0]
    assert np.array_equal(hsv_from_tables(pixels).numpy(), theirs)
    assert np.array_equal(rgb_to_hsv(pixels[None])[0].numpy(), theirs)


@pytest.mark.slow
def test_hsv_is_opencv_to_the_bit_in_every_colour():
    cv2 = pytest.importorskip("cv2")
    levels = torch.arange(256, dtype=torch.uint8)
    for red in levels:
        pixels = torch.cartesian_prod(red[None], levels, levels)
        theirs = cv2.cvtColor(pixels.numpy()[None], cv2.COLOR_RGB2HSV)[0]
        assert np.array_equal(hsv_from_tables(pixels).numpy(), theirs)


def test_hsv_by_hand_without_opencv(monkeypatch):
    monkeypatch.setattr(colour, "_opencv", lambda: None)
    pixels = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 0, 255], [0, 0, 0], [200, 200, 200], [40, 20, 20]]
    expected = [[0, 255, 255], [60, 255, 255], [120, 255, 255], [150, 255, 255], [0, 0, 0], [0, 0, 200], [0, 128, 40]]
    assert rgb_to_hsv(torch.tensor(pixels, dtype=torch.uint8).view(7, 1, 3)).view(7, 3).tolist() == expected


def test_hsv_takes_any_memory_layout():
    frame = torch.randint(0, 256, (3, 9, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    across = frame.permute(1, 2, 0)
    assert torch.equal(rgb_to_hsv(across), rgb_to_hsv(across.contiguous()))
    assert torch.equal(hsv_from_tables(across), rgb_to_hsv(across))


def test_lab_is_scikit_image():
    pixels = torch.randint(0, 256, (3, 60, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    pixels[:, :4] = torch.arange(4, dtype=torch.uint8)[None, :, None]  # the dark end, where the root is a line
    expected = rgb2lab(pixels.permute(1, 2, 0).numpy())
    assert np.abs(rgb_to_lab(pixels).permute(1, 2, 0).numpy() - expected).max() < 0.02
