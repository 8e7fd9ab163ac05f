"""The encoder and the model on a GPU agree with the CPU.

Without a GPU the tests are skipped; `pytest --noconftest` runs them on the CPU, to test the tests.
"""

import pytest
import torch

from keye.encoder import SlowFastEncoder
from keye.slowfast.measures import get_measure
from keye.slowfast.resizing import patches, resize
from scripts.clips import clip
from tests.keye.model.test_generation import MIXED, answers, sensible
from tests.keye.test_encoder import TINY, noise

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEASURES = ("change", "patch_l1", "mse")


def frames(count: int = 12) -> torch.Tensor:
    """Frames of a moving picture and of its negative: uint8 [T, 3, 120, 200]."""
    picture = noise(3, 15, 40, seed=1).repeat_interleave(8, 1).repeat_interleave(8, 2)
    moving = torch.stack([picture[:, :, 4 * place : 4 * place + 200] for place in range(count)])
    return torch.cat([moving[: count // 2], 255 - moving[count // 2 :]])


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(56, 84), (140, 280)])
def test_frames_and_patches_of_a_gpu_are_those_of_the_cpu(mode, size) -> None:
    found = patches(resize(frames().to(DEVICE), size, mode), 14)
    assert found.device.type == DEVICE.type
    assert torch.equal(found.cpu(), patches(resize(frames(), size, mode), 14))


@pytest.mark.parametrize("name", MEASURES)
def test_scores_of_a_gpu_are_those_of_the_cpu(name) -> None:
    measure, scores = get_measure(name), []
    for pictures in (frames().to(DEVICE), frames()):
        features = measure.prepare(pictures)
        scores.append(measure.compare(features[0], features).cpu())
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)
    assert float(scores[1].max() - scores[1].min()) > 0.01  # the frames differ


def test_pixels_are_normalised_on_the_gpu_as_on_the_cpu() -> None:
    encoder = SlowFastEncoder(**TINY)
    options = [{"dtype": dtype} for dtype in (torch.uint8, torch.float32, torch.bfloat16)]
    for option in options:
        found, expected = (encoder(clip("carphone_pristine.mp4"), device=d, **option) for d in (DEVICE, "cpu"))
        assert found.pixel_values.device.type == DEVICE.type
        torch.testing.assert_close(found.pixel_values.cpu(), expected.pixel_values, atol=1e-6, rtol=0)
        assert torch.equal(found.picture(0).cpu(), expected.picture(0))


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_answers_of_a_gpu_are_those_of_the_cpu(name) -> None:
    model = sensible(name)
    expected = answers(model, MIXED)
    # The hook that keeps placeholders out of the answers has their ids on the CPU.
    with torch.device(DEVICE):
        other = sensible(name)
    other.load_state_dict(model.state_dict())
    assert answers(other, {name: value.to(DEVICE) for name, value in MIXED.items()}) == expected
