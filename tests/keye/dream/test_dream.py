"""The dream: scenes whose truth is known, losses by hand, a sampler that inverts its schedule, episodes that resume."""

import math

import numpy as np
import pytest
import torch

from keye.dream.diffusion import conditional_errors, draw_noise, kept, noised, sample, unconditional_errors
from keye.dream.episode import WRITES, Episode, FastSettings
from keye.dream.measure import consistency, cuts, from_memory, psnr
from keye.dream.model import DreamConfig, DreamModel
from keye.dream.scenes import ACTIONS, CHUNK, NO_ACTION, any_walk, circling_walk, opposite, returning_walk, walk
from keye.errors import ArgumentError, CheckpointError

SMALL = DreamConfig(width=32, depth=2, heads=2)
FAST = FastSettings(steps=2, draws=3, rank=4, alpha=4, sampling_steps=3)


def model() -> DreamModel:
    """A small model whose output is not zero."""
    torch.manual_seed(0)
    made = DreamModel(SMALL)
    torch.nn.init.normal_(made.paint.weight, std=0.1)
    return made.eval()


def state_of(made: DreamModel) -> list[bytes]:
    return [value.numpy().tobytes() for value in made.state_dict().values()]


# Scenes


def test_a_step_moves_the_picture_by_four_pixels_in_the_actions_direction():
    shift = {"right": (0, 4), "left": (0, -4), "up": (-4, 0), "down": (4, 0)}
    for action, name in enumerate(ACTIONS):
        frames = walk((action,), np.random.default_rng(action)).frames
        assert frames.shape == (1 + CHUNK, 3, 16, 16) and frames.abs().max() <= 1
        rows, columns = shift[name]
        before, after = frames[0].roll((-rows, -columns), (1, 2)), frames[1]
        inside = (
            slice(None),
            slice(max(0, -rows), 16 - max(0, rows)),
            slice(max(0, -columns), 16 - max(0, columns)),
        )
        assert torch.equal(before[inside], after[inside])


@pytest.mark.parametrize("draw", [returning_walk, circling_walk])
def test_a_walk_leaves_its_start_and_returns_to_it(draw):
    for seed in range(20):
        path = draw(np.random.default_rng(seed))
        assert torch.equal(path.frames[0], path.frames[-1])
        middle = path.corners[CHUNK * path.outward]
        assert (middle - path.corners[0]).abs().max() >= 16  # nothing of the start is visible
        assert cuts(path.frames, path) == 0


def test_a_returning_walk_comes_back_the_same_way():
    path = returning_walk(np.random.default_rng(1), chunks=3)
    assert path.actions[3:] == tuple(opposite(action) for action in reversed(path.actions[:3]))


def test_pixels_from_memory_are_those_seen_before_and_not_in_the_context():
    """Right twice and back: the context has the views at 28 … 16 pixels, the chunk those at 12, 8, 4 and 0."""
    path = walk((0, 0, 1, 1), np.random.default_rng(0), outward=2)
    mask = from_memory(path, start=1 + 3 * CHUNK)
    assert mask.shape == (CHUNK, 16, 16)
    for frame, left in enumerate((12, 8, 4, 0)):
        expected = torch.zeros(16, 16, dtype=torch.bool)
        expected[:, : 16 - left] = True
        assert torch.equal(mask[frame], expected), left
    assert not from_memory(path, start=1).any()


# Measures


def test_measures_of_known_pictures():
    black, white = torch.full((3, 16, 16), -1.0), torch.full((3, 16, 16), 1.0)
    assert psnr(black, white) == pytest.approx(0.0) and psnr(white * 0.8, white) == pytest.approx(20.0, abs=1e-4)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    assert math.isnan(psnr(black, white, mask))
    half = black.clone()
    half[:, :8] = 1.0
    mask[:8] = True
    assert psnr(half, white, mask) == pytest.approx(100.0) and psnr(half, white, ~mask) == pytest.approx(0.0)
    assert consistency(half, half) == pytest.approx(1.0) and consistency(half, -half) == pytest.approx(-1.0)


def test_a_foreign_frame_is_two_cuts():
    path = any_walk(np.random.default_rng(3), 2)
    frames = path.frames.clone()
    frames[4] = any_walk(np.random.default_rng(4), 2).frames[0]
    assert cuts(frames, path) == 2


# Model and losses


def test_noise_keeps_the_variance():
    level = torch.linspace(0.02, 1, 50)
    frames, noise = torch.ones(50, 1, 1, 1, 1), torch.full((50, 1, 1, 1, 1), 2.0)
    made = noised(frames, noise, level).flatten()
    torch.testing.assert_close(made, kept(level).sqrt() + 2 * (1 - kept(level)).sqrt())
    assert kept(torch.tensor(0.0)) == 1 and kept(torch.tensor(0.5)) == pytest.approx(0.5)


def test_levels_are_spread_evenly_over_their_range():
    noise, level = draw_noise(torch.zeros(10, 2, 3, 16, 16), torch.Generator().manual_seed(0))
    assert noise.shape == (10, 2, 3, 16, 16) and level.min() >= 0.02 and level.max() <= 1
    torch.testing.assert_close(level.sort().values.diff(), torch.full((9,), 0.098), atol=1e-5, rtol=0)


class Recorder(torch.nn.Module):
    """Predicts `factor` × its input and records what it was given."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, frames, level, action):
        self.given = (frames, level, action)
        return self.factor * frames


def test_the_slow_loss_is_that_of_the_new_frames_alone():
    torch.manual_seed(0)
    past, new, noise = torch.randn(2, 3, 3, 16, 16), torch.randn(2, 4, 3, 16, 16), torch.randn(2, 4, 3, 16, 16)
    level, action = torch.tensor([0.3, 0.9]), torch.zeros(2, 7, dtype=torch.long)
    recorder = Recorder()
    errors = conditional_errors(recorder, past, new, action, noise, level)
    share = torch.cos(level * math.pi / 2) ** 2
    by_hand = [
        ((0.5 * (share[i].sqrt() * new[i] + (1 - share[i]).sqrt() * noise[i]) - noise[i]) ** 2).mean() for i in (0, 1)
    ]
    torch.testing.assert_close(errors, torch.stack(by_hand))
    frames, levels, _ = recorder.given
    assert torch.equal(frames[:, :3], past)  # clean
    torch.testing.assert_close(levels, torch.tensor([[0.0] * 3 + [0.3] * 4, [0.0] * 3 + [0.9] * 4]))


def test_no_gradient_reaches_the_predictions_of_past_frames():
    predicted = torch.zeros(1, 7, 3, 16, 16, requires_grad=True)
    new, noise, past = torch.randn(1, 4, 3, 16, 16), torch.randn(1, 4, 3, 16, 16), torch.randn(1, 3, 3, 16, 16)
    action = torch.zeros(1, 7, dtype=torch.long)
    conditional_errors(lambda *_: predicted, past, new, action, noise, torch.tensor([0.5])).sum().backward()
    assert predicted.grad[:, :3].abs().max() == 0
    torch.testing.assert_close(predicted.grad[:, 3:], -2 * noise / noise[0].numel())


def test_the_fast_loss_noises_every_frame_and_has_no_condition():
    frames, noise, recorder = torch.zeros(2, 5, 3, 16, 16), torch.ones(2, 5, 3, 16, 16), Recorder(1.0)
    errors = unconditional_errors(recorder, frames, noise, torch.tensor([0.5, 1.0]))
    given, levels, action = recorder.given
    root = (1 - kept(torch.tensor([0.5, 1.0]))).sqrt()
    torch.testing.assert_close(given[:, :, 0, 0, 0], root[:, None].expand(2, 5))
    torch.testing.assert_close(levels, torch.tensor([[0.5] * 5, [1.0] * 5]))
    assert (action == NO_ACTION).all()
    torch.testing.assert_close(errors, (root - 1) ** 2)


def test_the_sampler_finds_the_frames_of_an_exact_predictor():
    """A model that knows the answer predicts ε from it; DDIM then ends at the answer from any start."""
    truth = torch.rand(2, 4, 3, 16, 16) * 1.8 - 0.9

    def exact(frames, level, action):
        assert (level[:, :1] == 0).all()  # the past is clean
        share = kept(level[:, 1:])[..., None, None, None]
        noise = (frames[:, 1:] - share.sqrt() * truth) / (1 - share).sqrt()
        return torch.cat([torch.full_like(frames[:, :1], torch.nan), noise], dim=1)

    past, action = torch.zeros(2, 1, 3, 16, 16), torch.zeros(2, 5, dtype=torch.long)
    found = sample(exact, past, action, 4, torch.Generator().manual_seed(0), steps=5)
    torch.testing.assert_close(found, truth, atol=1e-4, rtol=0)


def test_the_model_takes_windows_of_any_length_and_knows_places_by_its_actions():
    made = model()
    frames, level = torch.randn(2, 5, 3, 16, 16), torch.rand(2, 5)
    for count in (1, 5):
        action = torch.full((2, count), NO_ACTION)
        assert made(frames[:, :count], level[:, :count], action).shape == (2, count, 3, 16, 16)
    rotation = made._rotation(torch.tensor([[NO_ACTION, 0, 0, 1]]))[0, 0, 0].unflatten(0, (4, 16))
    torch.testing.assert_close(rotation[1], rotation[3])  # right, right, left: where it was after one step
    assert not torch.allclose(rotation[0], rotation[1])
    with pytest.raises(ArgumentError, match="exceed the window"):
        made(torch.zeros(1, 9, 3, 16, 16), torch.zeros(1, 9), torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ArgumentError, match="multiple of patch"):
        DreamConfig(size=15)


def test_a_model_is_saved_and_read(tmp_path):
    made = model()
    made.save_pretrained(tmp_path / "model")
    assert state_of(DreamModel.from_pretrained(tmp_path / "model")) == state_of(made)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        DreamModel.from_pretrained(tmp_path / "nothing")


# Episodes


@pytest.mark.parametrize("write", WRITES)
def test_an_episode_writes_its_memory_and_leaves_the_model_as_it_was(write):
    made = model()
    before, path = state_of(made), circling_walk(np.random.default_rng(0))
    with Episode(made, path.frames[:1], FastSettings(write, 2, 3, rank=4, sampling_steps=3), seed=1) as episode:
        episode.watch(path.frames[1:5], path.actions[0])
        new = episode.dream(path.actions[1])
        assert new.shape == (4, 3, 16, 16) and torch.equal(episode.frames[:5], path.frames[:5])
        assert (episode.memory is None) == (write == "none")
        if episode.memory is not None:
            assert episode.memory.writes == 4
    assert state_of(made) == before
    assert not any(module._forward_hooks for module in made.modules())


@pytest.mark.parametrize("write", ["temporary", "text", "past"])
def test_a_write_trains_on_what_its_name_says(write):
    made, seen = model(), []
    frames = any_walk(np.random.default_rng(0), 3).frames
    made.register_forward_pre_hook(lambda _, given: seen.append(given))
    with Episode(made, frames[:1], FastSettings(write, 1, 4, rank=2)) as episode:
        for chunk, length in zip(range(3), (5, 8, 8), strict=True):
            episode.watch(frames[1 + 4 * chunk : 5 + 4 * chunk], 0)
            given, level, action = seen.pop()
            assert given.shape == (4, length, 3, 16, 16) and not seen
            clean = (level == 0).all(0).tolist()
            assert clean == ([True] * (length - 4) + [False] * 4 if write == "text" else [False] * length)
            assert ((action == NO_ACTION).all().item()) == (write != "text")


def test_the_backward_half_of_a_write_is_the_walk_reversed():
    """Its windows equal those of the walk back, drawn with opposite actions."""
    made, seen = model(), []
    path = walk((0, 3), np.random.default_rng(0))
    frames, actions = path.frames, [action for action in path.actions for _ in range(CHUNK)]
    made.register_forward_pre_hook(lambda _, given: seen.append(given))
    with Episode(made, frames[:1], FastSettings("both", 1, 4, rank=2)) as episode:
        episode.watch(frames[1:5], 0)
        episode.watch(frames[5:], 3)
    (first, _, _), (back, _, _), (forwards, _, ahead), (backwards, level, given) = seen
    assert len(first) == len(back) == len(forwards) == len(backwards) == 2
    assert torch.equal(back[:, :4], frames[1:5].flip(0).expand(2, -1, -1, -1, -1)) and back.shape[1] == 5
    assert torch.equal(forwards[0, :4], frames[1:5]) and ahead[0].tolist() == actions
    assert torch.equal(backwards[0, :4], frames[5:].flip(0)) and (level[:, 4:] > 0).all() and (level[:, :4] == 0).all()
    # Down undone is up (2), right undone is left (1); the frame before the turn is reached by undoing down.
    assert given[0].tolist() == [NO_ACTION, 2, 2, 2, 2, 1, 1, 1]


def test_a_resumed_walk_continues_with_the_same_bits(tmp_path):
    made, path = model(), circling_walk(np.random.default_rng(0))
    with Episode(made, path.frames[:1], FAST, seed=1) as episode:
        episode.watch(path.frames[1:5], path.actions[0])
        episode.save(tmp_path)
        episode.dream(path.actions[1])
        episode.save(tmp_path)
        episode.dream(path.actions[2])
        whole = episode.dream(path.actions[3])
    with Episode(made, path.frames[:1], FAST, seed=9) as again:
        again.load(tmp_path)
        again.dream(path.actions[2])
        assert torch.equal(again.dream(path.actions[3]), whole)
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == [
        "frames-2.safetensors", "memory-2.safetensors",
    ]  # fmt: skip
    with Episode(made, path.frames[:1], FastSettings("none")) as other:
        with pytest.raises(CheckpointError, match="'temporary', not 'none'"):
            other.load(tmp_path)
        with pytest.raises(CheckpointError, match="has no walk"):
            other.load(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="is not one of"):
        FastSettings("always")
