"""Every measure against something independent of it: hand computation, scikit-image, the released package's loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data
from skimage.color import deltaE_cie76, rgb2lab
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from keye.errors import KeyeError
from keye.slowfast.measures import get_measure
from keye.slowfast.measures.pixelwise import PatchCosine
from keye.slowfast.resizing import resize

PLAIN = ["patch_l1", "patch_cosine", "ssim", "mse", "lab"]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def score(name: str, first: torch.Tensor, second: torch.Tensor) -> float:
    measure = get_measure(name)
    features = measure.prepare(torch.stack([first, second]))
    return float(measure.compare(features[0], features[1:])[0])


def photo() -> torch.Tensor:
    return torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1)[:, :280, :336]


def others() -> list[torch.Tensor]:
    picture = photo()
    return [picture.roll(3, -1), (picture.float() * 0.7).to(torch.uint8), picture.flip(-1), noise(3, 280, 336)]


def flat(level: int, height: int = 224, width: int = 224) -> torch.Tensor:
    return torch.full((3, height, width), level, dtype=torch.uint8)


def released_cosines(hsv: np.ndarray, other: np.ndarray) -> torch.Tensor:
    """The cosines of two HSV pictures [h, w, 3] as the release adds them up, patch by patch: one row per patch."""
    rows, columns = hsv.shape[0] // 28, hsv.shape[1] // 28
    cut = [
        torch.from_numpy(picture).permute(2, 0, 1).float().view(3, rows, 28, columns, 28).permute(1, 3, 0, 2, 4)
        for picture in (hsv, other)
    ]
    one, two = (picture.reshape(rows, columns, -1) for picture in cut)
    lengths = [torch.norm(picture, p=2, dim=-1, keepdim=True) + 1e-8 for picture in (one, two)]
    return ((one / lengths[0]) * (two / lengths[1])).sum(dim=-1)


def test_patch_cosine_is_the_release_to_the_bit_at_the_edge():
    """Grey patches with a fraction of black pixels, so that the cosine is 0.7 up to float32's last digits."""
    cv2 = pytest.importorskip("cv2")
    measure, patches = PatchCosine(), 60
    first, second = np.zeros((2, 28, 28 * patches, 3), np.uint8)
    draw = np.random.default_rng(4)
    for index in range(patches):
        # Two sets of n pixels with k in common have a cosine of k / n: 0.7 of 370, 380, ... 780 pixels, shuffled.
        n = int(draw.integers(37, 78)) * 10
        order, level = draw.permutation(784), draw.integers(1, 256, 2)
        common = n * 7 // 10
        for picture, chosen, grey in (
            (first, order[:n], level[0]),
            (second, np.concatenate([order[:common], order[n : n + n - common]]), level[1]),
        ):
            patch = np.zeros(784, np.uint8)
            patch[chosen[chosen < 784]] = grey
            picture[:, 28 * index : 28 * index + 28] = patch.reshape(28, 28)[..., None]
    frames = torch.from_numpy(np.stack([first, second])).permute(0, 3, 1, 2)
    features = measure.prepare(frames)
    hsv = [cv2.cvtColor(picture, cv2.COLOR_RGB2HSV) for picture in (first, second)]
    theirs = released_cosines(*hsv).flatten()
    assert int(((theirs - 0.7).abs() < 1e-6).sum()) > 20, "the case must be one that rounding decides"
    assert 0 < int((theirs > 0.7).sum()) < patches
    assert float(measure.compare(features[0], features[1:])[0]) == float((theirs > 0.7).float().mean())


def test_patch_cosine_is_the_released_fraction():
    cv2 = pytest.importorskip("cv2")
    for other in [*others(), photo() // 9]:
        hsv = [cv2.cvtColor(np.ascontiguousarray(x.permute(1, 2, 0)), cv2.COLOR_RGB2HSV) for x in (photo(), other)]
        assert score("patch_cosine", photo(), other) == float((released_cosines(*hsv) > 0.7).float().mean())


def test_patch_cosine_misses_what_the_release_misses():
    assert score("patch_cosine", flat(60), flat(220)) == 1.0
    assert score("patch_cosine", noise(3, 224, 224), noise(3, 224, 224, seed=1)) == 1.0


def test_black_patches_do_not_count():
    assert score("patch_cosine", flat(0), flat(0)) == 1.0
    assert score("patch_cosine", flat(0), flat(200)) == 0.0
    half, quarter = flat(0), flat(0)
    half[:, :112], quarter[:, :56] = 90, 90
    assert score("patch_cosine", half, quarter) == 0.5


def test_ssim_is_scikit_image():
    weights = np.array([0.299, 0.587, 0.114])
    for other in others():
        grey = [np.round(frame.permute(1, 2, 0).numpy() @ weights) for frame in (photo(), other)]
        expected = structural_similarity(*grey, data_range=255)
        assert score("ssim", photo(), other) == pytest.approx(max(expected, 0), abs=1e-4)


def test_mse_is_scikit_image():
    for other in others():
        decibels = peak_signal_noise_ratio(photo().numpy(), other.numpy())
        assert 50 * score("mse", photo(), other) == pytest.approx(decibels, abs=1e-3)
    assert score("mse", flat(0), flat(255)) == pytest.approx(0, abs=1e-6)
    assert 50 * score("mse", flat(100), flat(110)) == pytest.approx(10 * math.log10(255**2 / 100), abs=1e-4)


def test_lab_is_scikit_image():
    half = [resize(frame[None], (140, 168))[0].permute(1, 2, 0).numpy() for frame in (photo(), *others())]
    for index, other in enumerate(others(), start=1):
        difference = deltaE_cie76(rgb2lab(half[0]), rgb2lab(half[index]))
        cells = difference.reshape(10, 14, 12, 14).mean((1, 3))
        expected = 1 - np.clip((cells - 2.3) / (20 - 2.3), 0, 1).mean()
        assert score("lab", photo(), other) == pytest.approx(expected, abs=1e-3)


def test_patch_l1_by_hand():
    """A quarter of the picture goes from black to white, a quarter by 27 of 255: half way between SAME and CHANGED."""
    before, after = flat(0), flat(0)
    after[:, :112, :112] = 255
    assert score("patch_l1", before, after) == pytest.approx(0.75, abs=1e-6)
    after[:, 112:, 112:] = 27
    assert score("patch_l1", before, after) == pytest.approx(1 - 0.25 - 0.25 * (27 - 6) / 42, abs=1e-6)


def test_patch_l1_detects_what_the_release_misses():
    red, green = flat(0), flat(0)
    red[0], green[1] = 200, 200
    assert score("patch_l1", red, green) < 0.1
    assert score("patch_l1", flat(60), flat(220)) == 0.0
    slide = flat(255)
    text = slide.clone()
    text[:, 40:180:14, 20:200] = 0
    assert score("patch_l1", slide, text) < min(0.9, score("patch_cosine", slide, text))


def test_patch_l1_and_lab_ignore_noise():
    picture = photo()
    grain = torch.randn(picture.shape, generator=torch.Generator().manual_seed(3)) * 3
    noisy = (picture + grain).clamp(0, 255).to(torch.uint8)
    assert score("patch_l1", picture, noisy) > 0.97
    assert score("lab", picture, noisy) > 0.9


def test_features_are_the_cosine_of_the_towers_tokens():
    """The stand-in tower gives a token its mean colour and, where it is mid-grey, nothing: cosines by hand."""

    def tower(pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        pictures = pixel_values.split(grid_thw.prod(-1).tolist())
        rows, columns = grid_thw[0, 1:].tolist()
        means = torch.stack(pictures).mean((-1, -2)).view(-1, rows // 2, 2, columns // 2, 2, 3).mean((2, 4))
        return torch.where(means.abs() < 0.01, 0, means).flatten(0, 2)

    measure = get_measure("features")
    measure.attach(tower)
    red, cyan, grey = flat(0, 196, 196), flat(255, 196, 196), flat(127, 196, 196)
    red[0], cyan[0] = 255, 0
    half = red.clone()
    half[1, :84] = 255  # three rows of seven become yellow: (1, 1, -1) against (1, -1, -1)
    features = measure.prepare(torch.stack([red, cyan, half, grey, grey]))
    expected = [1, 0, 4 / 7 + 3 / 7 / 3, 0, 0]
    assert measure.compare(features[0], features).tolist() == pytest.approx(expected, abs=2e-3)
    assert measure.compare(features[3], features[4:]).tolist() == pytest.approx([1.0])


def test_features_need_a_valid_tower():
    measure = get_measure("features")
    with pytest.raises(KeyeError, match="tower="):
        measure.prepare(noise(1, 3, 56, 56))
    measure.attach(lambda pixels, grid: torch.zeros(3, 8))
    with pytest.raises(KeyeError, match=r"\[3, 8\] for"):
        measure.prepare(noise(1, 3, 56, 56))
    measure.attach(lambda pixels, grid: torch.full((len(pixels) // 4, 8), math.nan))
    with pytest.raises(KeyeError, match="not finite"):
        measure.prepare(noise(1, 3, 56, 56))


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=12, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 9))
def test_scores_are_in_range_at_any_size(name, height, width, seed):
    measure = get_measure(name)
    frames = torch.cat([noise(2, 3, height, width, seed=seed), flat(0, height, width)[None]])
    features = measure.prepare(frames)
    scores = measure.compare(features[0], features)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    assert bool(((scores >= 0) & (scores <= 1)).all())
    assert float(scores[0]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_a_batch_scores_as_its_frames_do(name):
    """One by one, together, over threads and in another memory layout, features and scores are the same bytes."""
    measure = get_measure(name)
    frames = noise(5, 3, 90, 130)
    threads = torch.get_num_threads()
    together = measure.prepare(frames)
    try:
        torch.set_num_threads(3)
        threaded = measure.prepare(frames.contiguous(memory_format=torch.channels_last))
    finally:
        torch.set_num_threads(threads)
    singly = torch.cat([measure.prepare(frame[None]) for frame in frames])
    assert torch.equal(together, singly) and torch.equal(together, threaded)
    scores = measure.compare(together[0], together)
    assert scores.tolist() == [float(measure.compare(together[0], row[None])[0]) for row in together]
