import subprocess
import sys

import pytest
import torch

from keye.errors import KeyeError
from keye.slowfast.measures import base, get_measure, known_measures, register
from keye.slowfast.resizing import patches, resize
from keye.slowfast.threads import over_threads


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def flat(level: int, height: int = 224, width: int = 224) -> torch.Tensor:
    return torch.full((3, height, width), level, dtype=torch.uint8)


@pytest.fixture
def three_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def test_an_unknown_measure_is_an_error_that_names_the_known_ones():
    with pytest.raises(KeyeError, match="'patchcosine'.*patch_cosine, patch_l1.*ssim"):
        get_measure("patchcosine")


def test_your_own_measure(monkeypatch):
    monkeypatch.setitem(base.REGISTRY, "brightness", None)  # removed again when the test ends

    @register
    class Brightness:
        name, threshold = "brightness", 0.9

        def prepare(self, frames):
            return frames.float().mean((1, 2, 3))

        def compare(self, reference, features):
            return 1 - (features - reference).abs() / 255

    assert "brightness" in known_measures()
    measure = get_measure("brightness")
    features = measure.prepare(torch.stack([flat(0), flat(51)]))
    assert float(measure.compare(features[0], features[1:])[0]) == pytest.approx(0.8)


def test_patches_are_raster_order():
    frames = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    cut = patches(frames, 2)
    assert cut.shape == (2, 6, 3, 2, 2)
    assert torch.equal(cut[1, 4], frames[1, :, 2:4, 2:4])


def test_resize_memory_layout_does_not_matter():
    frames = noise(2, 3, 90, 70)
    plain = torch.nn.functional.interpolate(frames, size=(56, 28), mode="bilinear", antialias=True)
    assert torch.equal(resize(frames, (56, 28)), plain)


def test_a_registered_name_can_be_replaced():
    """Also when you register before anything else of the package is imported."""
    code = """
from keye.slowfast.measures import get_measure, known_measures, register

@register
class Mine:
    name, threshold = "ssim", 0.5

assert isinstance(get_measure("ssim"), Mine)
assert {"change", "patch_cosine"} <= set(known_measures())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(28, 28), (56, 84), (89, 70), (112, 140)])
def test_resize_of_planes_equals_that_of_interleaved_colours(three_threads, size, mode):
    for shape in ((1, 3, 90, 71), (3, 3, 90, 71), (1, 3, 144, 256)):
        planes = noise(*shape)
        interleaved = planes.contiguous(memory_format=torch.channels_last)
        plain = torch.nn.functional.interpolate(interleaved, size=size, mode=mode, antialias=True)
        assert torch.equal(resize(planes, size, mode), plain) and torch.equal(resize(interleaved, size, mode), plain)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resize_over_threads_gives_the_same_bytes(three_threads, mode):
    frames = noise(7, 3, 90, 70)
    plain = torch.nn.functional.interpolate(frames, size=(56, 28), mode=mode, antialias=True)
    assert torch.equal(resize(frames, (56, 28), mode), plain)
    assert torch.equal(resize(frames[:1], (56, 28), mode), plain[:1])
    assert resize(frames[:0], (56, 28), mode).shape == (0, 3, 56, 28)


def test_over_threads_does_every_row_once_and_passes_errors_on(three_threads):
    rows, squares = torch.arange(50), torch.zeros(50, dtype=torch.long)
    over_threads(lambda row, square: square.copy_(row * row), rows, squares)
    assert torch.equal(squares, rows * rows)

    def refuse(row: torch.Tensor) -> None:
        raise ValueError(f"row {int(row)}")

    with pytest.raises(ValueError, match="row 0"):
        over_threads(refuse, rows)
