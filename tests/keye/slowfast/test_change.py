import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from skimage import data

from keye.slowfast.measures import get_measure
from keye.slowfast.measures.change import Change

MEASURE = Change()


def photo(name: str = "astronaut", size: tuple[int, int] = (640, 360)) -> torch.Tensor:
    """A photograph of `size` (width, height), [3, H, W] uint8."""
    image = Image.fromarray(getattr(data, name)()).convert("RGB").resize(size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def score(first: torch.Tensor, second: torch.Tensor) -> float:
    features = MEASURE.prepare(torch.stack([first, second]))
    return float(MEASURE.compare(features[0], features[1:])[0])


def rounded(frame: torch.Tensor) -> torch.Tensor:
    return frame.clamp(0, 255).round().to(torch.uint8)


def flat(level: int, height: int = 224, width: int = 224) -> torch.Tensor:
    return torch.full((3, height, width), level, dtype=torch.uint8)


def with_person(frame: torch.Tensor, height: int, x: int = 400, foot: int = 300) -> torch.Tensor:
    """A dark figure `height` pixels tall and a third as wide."""
    image = Image.fromarray(frame.permute(1, 2, 0).numpy())
    ImageDraw.Draw(image).ellipse((x, foot - height, x + height // 3, foot), fill=(30, 40, 90))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def with_text(frame: torch.Tensor, text: str, at: tuple[int, int], size: int) -> torch.Tensor:
    image = Image.fromarray(frame.permute(1, 2, 0).numpy())
    ImageDraw.Draw(image).text(at, text, fill=(10, 10, 10), font=ImageFont.load_default(size=size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_it_is_registered_and_the_default():
    from keye import SlowFastEncoder

    assert isinstance(get_measure("change"), Change)
    assert SlowFastEncoder().settings["measure"] == "change"


def test_a_corner_that_turns_white_by_hand():
    """Half of the picture, 4x8 of 8x8 tokens, turns white. Of 15x15 places half a token apart 7x15 are white, one row
    of 15 is half so, its upper half and the cells smeared by averaging 2x2: 2 of 4 rows. Weights are a half each."""
    before = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)  # features: mean colours of the cells
    after = before.clone()
    after[..., :16, :] = 255
    local = ((7 * 15 + 15 * 0.5**4) / 15**2) ** 0.25
    assert float(MEASURE.compare(before[0], after)[0]) == pytest.approx(1 - 0.5 * local - 0.5 * 0.5, abs=1e-6)


def test_cuts_are_far_below_the_threshold():
    pictures = [photo(name) for name in ("astronaut", "coffee", "chelsea", "rocket", "camera", "coins")]
    for i, first in enumerate(pictures):
        for second in pictures[:i]:
            assert score(first, second) < 0.7


@pytest.mark.parametrize("gain", [0.55, 0.8, 1.2])
def test_light_is_no_change(gain):
    for name in ("coffee", "chelsea", "brick"):
        picture = photo(name).float()
        assert score(rounded(picture), rounded(picture * gain)) > 0.95
        warm = torch.tensor([1.1, 1.0, 0.85])[:, None, None]
        assert score(rounded(picture), rounded(picture * gain * warm + 8)) > 0.95


def test_a_new_object_is_detected_although_the_light_changes():
    picture = photo("chelsea")
    dimmed = rounded(with_person(picture, 140).float() * 0.6)
    assert score(picture, dimmed) < MEASURE.threshold < score(picture, rounded(picture.float() * 0.6))


def test_noise_and_coding_are_no_change():
    for name in ("coffee", "brick", "moon"):
        picture = photo(name)
        grain = torch.randn(picture.shape, generator=torch.Generator().manual_seed(3)) * 12
        assert score(picture, rounded(picture + grain)) > 0.97
        file = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=20)
        coded = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        assert score(picture, coded) > 0.95


def test_camera_shake_and_slow_pans_are_compensated():
    wide = photo("chelsea", (760, 360))
    start = wide[..., :640]
    for pixels in (1, 3, 9, 15):
        assert score(start, wide[..., pixels : pixels + 640]) > MEASURE.threshold
    assert score(start, wide[..., 90:730]) < MEASURE.threshold  # further than the eye keeps its place


@pytest.mark.parametrize("background", ["coffee", "chelsea", "moon"])
def test_a_person_of_little_over_one_per_cent_is_detected(background):
    still = photo(background)
    height = 106
    assert (with_person(still, height) != still).any(0).float().mean() < 0.0145
    assert score(still, with_person(still, height)) < MEASURE.threshold
    assert score(with_person(still, height), with_person(still, height, x=430)) < MEASURE.threshold + 0.03  # a step
    assert get_measure("patch_cosine").threshold < released(still, with_person(still, height))  # which sees nothing


def released(first: torch.Tensor, second: torch.Tensor) -> float:
    measure = get_measure("patch_cosine")
    features = measure.prepare(torch.stack([first, second]))
    return float(measure.compare(features[0], features[1:])[0])


def test_concentrated_change_weighs_more_than_scattered_change():
    before = flat(100, 336, 588)
    gathered, scattered = before.clone(), before.clone()
    gathered[:, 100:156, 100:156] = 180
    places = torch.randperm(336 * 588, generator=torch.Generator().manual_seed(0))[: 56 * 56]
    scattered.flatten(1)[:, places] = 180
    assert score(before, gathered) < MEASURE.threshold
    assert score(before, scattered) > 0.97


def test_a_line_of_text_on_a_slide_is_detected():
    slide = with_text(flat(250, 360, 640), "A title", (30, 20), 32)
    line = with_text(slide, "- another line with several words", (40, 120), 26)
    assert score(slide, line) < MEASURE.threshold
    replaced = with_text(slide, "- quite a different line, but of the same size", (40, 120), 26)
    assert score(line, replaced) < 0.95


def test_pairs_of_flat_pictures():
    for first in (0, 1, 128, 255):
        assert score(flat(first), flat(first)) == 1.0
        assert score(flat(first), flat(min(first + 2, 255))) == 1.0
    assert score(flat(0), flat(255)) < 0.2
    red, green = flat(0), flat(0)
    red[0], green[1] = 200, 200
    assert score(red, green) < 0.2


def test_large_pictures_score_as_small_ones_do():
    small = photo("coffee"), with_person(photo("coffee"), 80)
    large = [
        torch.from_numpy(np.array(Image.fromarray(f.permute(1, 2, 0).numpy()).resize((1920, 1080)))).permute(2, 0, 1)
        for f in small
    ]
    assert score(*large) == pytest.approx(score(*small), abs=0.02)


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 400), width=st.integers(1, 400), seed=st.integers(0, 9))
def test_scores_are_in_range_and_one_for_the_same_at_any_size(height, width, seed):
    frames = torch.cat([noise(2, 3, height, width, seed=seed), flat(0, height, width)[None]])
    frames = torch.cat([frames, (frames[:1].float() * 0.5).to(torch.uint8)])
    features = MEASURE.prepare(frames)
    for i in range(len(frames)):
        scores = MEASURE.compare(features[i], features)
        assert scores.dtype == torch.float32 and scores.shape == (4,)
        assert bool(((scores >= 0) & (scores <= 1)).all())  # false for NaN
        assert scores[i] == 1


@pytest.mark.parametrize("size", [(360, 640), (37, 91), (500, 20)])
def test_a_frame_scores_the_same_in_any_batch(size):
    pictures = [photo(name, size[::-1]) for name in ("astronaut", "coffee", "chelsea")]
    frames = torch.stack([*pictures, *(rounded(p * g) for p in pictures for g in (0.5, 0.9)), noise(3, *size)])
    features = MEASURE.prepare(frames)
    together = MEASURE.compare(features[0], features)
    for i in range(len(frames)):
        alone = MEASURE.prepare(frames[i : i + 1])
        assert torch.equal(alone[0], features[i])
        assert MEASURE.compare(features[0], alone)[0] == together[i]
    assert torch.equal(together[2:5], MEASURE.compare(features[0], features[2:5]))
    assert MEASURE.compare(features[0], features[:0]).shape == (0,)


def test_features_are_small():
    features = MEASURE.prepare(noise(1, 3, 720, 1280))
    assert features.dtype == torch.uint8 and features[0].numel() < 16_000
