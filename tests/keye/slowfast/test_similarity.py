import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data
from skimage.metrics import structural_similarity

from keye.errors import KeyeError
from keye.slowfast import similarity
from keye.slowfast.colour import hsv_from_tables, rgb_to_hsv
from keye.slowfast.similarity import get_measure, known_measures, patches, register, resize


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def score(name: str, first: torch.Tensor, second: torch.Tensor) -> float:
    measure = get_measure(name)
    features = measure.prepare(torch.stack([first, second]))
    return float(measure.compare(features[0], features[1:])[0])


def photo() -> torch.Tensor:
    return torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1)


def flat(level: int, height: int = 224, width: int = 224) -> torch.Tensor:
    return torch.full((3, height, width), level, dtype=torch.uint8)


def test_hsv_is_opencv_to_the_bit():
    cv2 = pytest.importorskip("cv2")
    steps = torch.cartesian_prod(*[torch.arange(0, 256, 5)] * 3).to(torch.uint8)
    pixels = torch.cat([steps, noise(300_000, 3)])
    theirs = cv2.cvtColor(pixels.numpy()[None], cv2.COLOR_RGB2HSV)[0]
    assert np.array_equal(hsv_from_tables(pixels).numpy(), theirs)
    assert np.array_equal(rgb_to_hsv(pixels[None])[0].numpy(), theirs)


def released_score(first: torch.Tensor, second: torch.Tensor) -> float:
    """The released measure in plain loops, with OpenCV's colour conversion; frames are multiples of 28 already."""
    cv2 = pytest.importorskip("cv2")
    one, two = (
        cv2.cvtColor(frame.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2HSV).astype(float) for frame in (first, second)
    )
    votes = []
    for row in range(0, one.shape[0], 28):
        for column in range(0, one.shape[1], 28):
            a, b = (image[row : row + 28, column : column + 28].ravel() for image in (one, two))
            lengths = np.linalg.norm(a), np.linalg.norm(b)
            if max(lengths) >= 0.01:
                votes.append(min(lengths) > 0 and a @ b / (lengths[0] * lengths[1]) > 0.7)
    return float(np.mean(votes))


def test_patch_cosine_is_the_released_measure():
    picture = photo()[:, :280, :336]
    others = [picture.flip(-1), picture.roll(90, -1), 255 - picture, noise(3, 280, 336)]
    half_black = picture.clone()
    half_black[:, :140] = 0
    for other in [*others, half_black]:
        assert score("patch_cosine", picture, other) == pytest.approx(released_score(picture, other), abs=1e-6)
    both = half_black.flip(-1)
    assert score("patch_cosine", half_black, both) == pytest.approx(released_score(half_black, both), abs=1e-6)


def test_patch_cosine_is_blind_as_the_released_one_is():
    assert score("patch_cosine", flat(60), flat(220)) == 1.0
    assert score("patch_cosine", noise(3, 224, 224), noise(3, 224, 224, seed=1)) == 1.0


def test_black_pairs_count_as_the_same():
    assert score("patch_cosine", flat(0), flat(0)) == 1.0
    assert score("patch_cosine", flat(0), flat(200)) == 0.0


def test_ssim_is_scikit_image():
    weights = np.array([0.299, 0.587, 0.114])
    picture = photo()[:, :280, :336]
    for other in (picture.roll(3, -1), (picture.float() * 0.7).to(torch.uint8), noise(3, 280, 336)):
        grey = [np.round(frame.permute(1, 2, 0).numpy() @ weights) for frame in (picture, other)]
        expected = structural_similarity(*grey, data_range=255)
        assert score("ssim", picture, other) == pytest.approx(max(expected, 0), abs=1e-4)


def test_patch_l1_by_hand():
    """A quarter of the picture goes from black to white, a quarter by 27 of 255: half way between SAME and CHANGED."""
    before, after = flat(0), flat(0)
    after[:, :112, :112] = 255
    assert score("patch_l1", before, after) == pytest.approx(0.75, abs=1e-6)
    after[:, 112:, 112:] = 27
    assert score("patch_l1", before, after) == pytest.approx(1 - 0.25 - 0.25 * (27 - 6) / 42, abs=1e-6)


def test_patch_l1_sees_what_the_released_measure_does_not():
    red, green = flat(0), flat(0)
    red[0], green[1] = 200, 200
    assert score("patch_l1", red, green) < 0.1
    assert score("patch_l1", flat(60), flat(220)) == 0.0
    slide = flat(255)
    text = slide.clone()
    text[:, 40:180:14, 20:200] = 0
    assert score("patch_l1", slide, text) < 0.9
    assert score("patch_l1", slide, text) < score("patch_cosine", slide, text)


def test_patch_l1_overlooks_noise():
    picture = photo()
    grain = torch.randn(picture.shape, generator=torch.Generator().manual_seed(3)) * 5
    assert score("patch_l1", picture, (picture + grain).clamp(0, 255).to(torch.uint8)) > 0.97


@pytest.mark.parametrize("name", ["patch_l1", "patch_cosine", "ssim"])
@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 9))
def test_scores_are_in_range_at_any_size(name, height, width, seed):
    measure = get_measure(name)
    features = measure.prepare(torch.cat([noise(2, 3, height, width, seed=seed), flat(0, height, width)[None]]))
    scores = measure.compare(features[0], features)
    assert scores.dtype == torch.float32
    assert bool(((scores >= 0) & (scores <= 1)).all())
    assert float(scores[0]) == pytest.approx(1, abs=1e-5)


def test_unknown_measure_names_the_known():
    with pytest.raises(KeyeError, match="'patchcosine'.*patch_cosine, patch_l1.*ssim"):
        get_measure("patchcosine")


def test_your_own_measure(monkeypatch):
    monkeypatch.setattr(similarity, "_MEASURES", dict(similarity._MEASURES))

    @register
    class Brightness:
        name, threshold = "brightness", 0.9

        def prepare(self, frames):
            return frames.float().mean((1, 2, 3))

        def compare(self, reference, features):
            return 1 - (features - reference).abs() / 255

    assert "brightness" in known_measures()
    assert score("brightness", flat(0), flat(51)) == pytest.approx(0.8)


def test_patches_are_raster_order():
    frames = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    cut = patches(frames, 2)
    assert cut.shape == (2, 6, 3, 2, 2)
    assert torch.equal(cut[1, 4], frames[1, :, 2:4, 2:4])


def test_resize_memory_layout_does_not_matter():
    frames = noise(2, 3, 90, 70)
    plain = torch.nn.functional.interpolate(frames, size=(56, 28), mode="bilinear", antialias=True)
    assert torch.equal(resize(frames, (56, 28)), plain)
