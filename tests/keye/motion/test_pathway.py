"""The motion pathway against convolutions of torch, the published lateral, and itself in other batches."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from keye.aggregation.blocks import make_blocks, timed_blocks
from keye.errors import KeyeError
from keye.model.config import KeyeVisionConfig
from keye.model.vision import KeyeVisionModel
from keye.motion.cost import motion_operations
from keye.motion.network import Lateral
from keye.motion.pathway import GatheredConv, MotionPathway, TimedConv, small_frames
from keye.motion.settings import MotionSettings, SlowFastSettings
from keye.motion.timing import clips_of, lateral_steps, neighbours

SETTINGS = MotionSettings(size=32, width=8, blocks=(1, 1))


def clip(types: list[int], times: list[int], number: int = 0) -> torch.Tensor:
    return torch.tensor([[number, kind, time] for kind, time in zip(types, times, strict=True)])


def strided(frames: int, alpha: int, interval: float, number: int = 0) -> torch.Tensor:
    return clip([int(t % alpha > 0) for t in range(frames)], [round(t * interval) for t in range(frames)], number)


@pytest.mark.parametrize("kernel", [(5, 7, 7), (3, 1, 1), (1, 3, 3)])
def test_a_timed_convolution_is_torchs_over_each_clip(kernel):
    torch.manual_seed(0)
    conv = TimedConv(3, 4, kernel, stride=2)
    x, clips = torch.randn(12, 3, 8, 8), torch.cat((strided(7, 3, 40.0), strided(5, 3, 40.0, 1)))
    found = conv(x, neighbours(clips, kernel[0]))
    plain = nn.Conv3d(3, 4, kernel, (1, 2, 2), conv.padding, bias=False)
    plain.load_state_dict(conv.state_dict())
    wanted = [plain(part.transpose(0, 1)[None])[0].transpose(0, 1) for part in x.split([7, 5])]
    assert torch.allclose(found, torch.cat(wanted), atol=1e-6)


@pytest.mark.parametrize(("alpha", "kernel", "frames"), [(4, 5, 16), (4, 7, 18), (8, 5, 32), (2, 3, 5), (4, 5, 4)])
@pytest.mark.parametrize("interval", [500.0, 1000 / 30, 1000 / 24])
def test_on_a_strided_plan_the_lateral_is_the_papers_strided_convolution(alpha, kernel, frames, interval):
    torch.manual_seed(0)
    paper = Lateral(6, SlowFastSettings(alpha=alpha, beta=8, lateral_kernel=kernel, width=48))
    ours = GatheredConv(6, 12, kernel)
    ours.load_state_dict(paper.conv.state_dict())
    x = torch.randn(2 * frames, 6, 3, 3)
    clips = torch.cat((strided(frames, alpha, interval), strided(frames, alpha, interval, 1)))
    found = ours(x, lateral_steps(clips, alpha, kernel))
    wanted = paper.conv(x.unflatten(0, (2, frames)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)
    assert found.shape == wanted.shape and (found - wanted).abs().max() <= 1e-6


def test_steps_follow_time_where_frames_are_uneven():
    """Slow frames at 0 and 800 ms: a step is 200 ms, and frames at 150 and 250 ms share one."""
    clips = clip([0, 1, 1, 1, 0, 1], [0, 150, 250, 610, 800, 900])
    steps = lateral_steps(clips, alpha=4, kernel=5)
    assert steps.slow.tolist() == [0, 4]
    parts = [part.tolist() for part in steps.frames.split(steps.lengths.tolist())]
    # 610 ms is three steps after the first slow frame (out of reach) and one before the second.
    assert parts[:5] == [[], [], [0], [1, 2], []]
    assert parts[5:] == [[], [3], [4, 5], [], []]  # 900 ms: half a step, which rounds to the slow frame's own


@pytest.mark.parametrize("seed", range(20))
def test_every_frame_up_to_the_last_slow_one_is_read(seed):
    draw = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 40, (1,), generator=draw))
    types = [0, *torch.randint(0, 2, (count,), generator=draw).tolist()]
    times = torch.randint(1, 900, (count + 1,), generator=draw).cumsum(0).tolist()
    steps = lateral_steps(clip(types, times), alpha=4, kernel=5)
    last = max(place for place, kind in enumerate(types) if kind == 0)
    assert set(range(last + 1)) <= set(steps.frames.tolist())


def test_a_step_without_frames_gives_zero_and_no_gradient_that_is_not_a_number():
    conv = GatheredConv(2, 3, 5)
    x = torch.randn(2, 2, 1, 1, requires_grad=True)
    out = conv(x, lateral_steps(clip([0, 0], [0, 1000]), 4, 5))
    out.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.allclose(out[0, :, 0, 0], conv.weight[:, :, 2, 0, 0] @ x[0, :, 0, 0])


def test_frames_are_put_together_from_their_patches():
    frames = torch.randint(0, 256, (2, 3, 28, 56), dtype=torch.uint8)
    patches = frames.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    grid = torch.tensor([[1, 2, 4], [1, 2, 4]])
    found = small_frames(patches, grid, torch.tensor([1]), 14, torch.float32)
    wanted = F.avg_pool2d(frames[1:].float() / 127.5 - 1, (2, 4))
    assert torch.allclose(found, wanted, atol=1e-5)


def batch(draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A still, a clip of five frames of two sizes and one of three; patches, grids, clips."""
    sizes = [(4, 4), (6, 4), (2, 4), (2, 4), (6, 4), (2, 4), (4, 4), (2, 2), (2, 2)]
    grid = torch.tensor([(1, *size) for size in sizes])
    pixels = torch.randint(0, 256, (int(grid.prod(1).sum()), 3, 14, 14), dtype=torch.uint8, generator=draw)
    first, second = clip([0, 1, 1, 0, 1], [0, 500, 1000, 1500, 2000]), clip([0, 1, 1], [0, 500, 1000], 1)
    return pixels, grid, torch.cat((torch.tensor([[-1, 0, 0]]), first, second))


def random_pathway(width: int = 24) -> MotionPathway:
    torch.manual_seed(0)
    pathway = MotionPathway(SETTINGS, width)
    nn.init.normal_(pathway.output.weight)
    return pathway.eval()


def test_a_clip_reads_nothing_of_its_batch():
    pixels, grid, clips = batch(torch.Generator().manual_seed(1))
    pathway = random_pathway()
    together = pathway(pixels, grid, clips).split(grid.prod(1).tolist())
    for begin, end in ((0, 1), (1, 6), (6, 9)):
        part = [pixels.split(grid.prod(1).tolist())[row] for row in range(begin, end)]
        alone = pathway(torch.cat(part), grid[begin:end], clips[begin:end])
        assert torch.allclose(alone, torch.cat(together[begin:end]), atol=1e-5)
    assert [bool(part.any()) for part in together] == [False, True, False, False, True, False, True, False, False]


def test_only_frames_of_its_own_clip_change_a_slow_frame():
    pixels, grid, clips = batch(torch.Generator().manual_seed(1))
    pathway, ends = random_pathway(), grid.prod(1).cumsum(0)
    before = pathway(pixels, grid, clips)
    changed = pixels.clone()
    changed[ends[1] : ends[2]] = 255 - changed[ends[1] : ends[2]]  # the first fast frame of the first clip
    parts = (pathway(changed, grid, clips) - before).detach().abs().split(grid.prod(1).tolist())
    assert float(parts[1].max()) > 1e-3 and float(parts[4].max()) > 1e-3 and float(parts[6].max()) == 0


@pytest.mark.parametrize("stills", [0, 2])
def test_without_clips_every_parameter_still_gets_a_gradient(stills):
    pathway = random_pathway().train()
    grid = torch.tensor([[1, 2, 2]] * stills).reshape(-1, 3)
    out = pathway(torch.zeros(4 * stills, 3, 14, 14), grid, None)
    assert out.shape == (4 * stills, 24) and not out.any()
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in pathway.parameters())


@pytest.mark.parametrize("settings", [SETTINGS, MotionSettings(), MotionSettings(size=45, width=4, blocks=(2, 1))])
def test_operations_of_a_frame_are_those_that_torch_counts(settings):
    with torch.device("meta"):
        pathway = MotionPathway(settings, 24)
        x = torch.zeros(3, 3, settings.size, settings.size)
    wide, narrow = (neighbours(strided(3, 3, 40.0), kernel) for kernel in (5, 3))
    with FlopCounterMode(display=False) as counter:
        x = F.max_pool2d(pathway.stem(x, wide), 3, 2, 1)
        for stage in pathway.stages:
            for block in stage:
                x = block(x, narrow)
    assert counter.get_total_flops() == 3 * motion_operations(settings)


def test_the_default_pathway_is_small():
    with torch.device("meta"):
        pathway = MotionPathway(MotionSettings(), 1152)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in pathway.named_children()}
    assert sum(counts.values()) == 948_232 and counts["output"] == 465 * 1152


def tower(motion: dict | None) -> KeyeVisionModel:
    torch.manual_seed(3)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return KeyeVisionModel(KeyeVisionConfig(**sizes, motion=motion)).eval()


def test_a_new_pathway_leaves_the_tower_as_it_is_and_chunks_change_nothing(monkeypatch):
    pixels, grid, clips = batch(torch.Generator().manual_seed(2))
    plain, moving = tower(None), tower({"size": 32, "blocks": [1, 1]})
    missing = moving.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(name.startswith("motion.") for name in missing)
    wanted = plain(pixels, grid)
    assert torch.equal(moving(pixels, grid, clips=clips), wanted)
    nn.init.normal_(moving.motion.output.weight)
    moved = moving(pixels, grid, clips=clips)
    assert not torch.allclose(moved, wanted)
    monkeypatch.setattr("keye.model.vision.FRAME_PATCHES", 20)
    with torch.no_grad():
        assert torch.allclose(moving(pixels, grid, clips=clips), moved, atol=1e-5)


def test_clips_of_blocks():
    """Two videos, the second aggregated: its one frame is a slow and a fast entry."""
    first = timed_blocks(make_blocks(2, [(0, 2, 2, 0), (1, 1, 1, 0)]), [0, 1], [0.0, 0.5])
    second = timed_blocks(make_blocks(1, [(0, 1, 1, 0), (0, 2, 2, 0)]), [1, 0], [2.0, 2.0])
    found = clips_of(1, 3, torch.cat((first, second)))
    assert found.tolist() == [[-1, 0, 0], [0, 0, 0], [0, 1, 500], [1, 0, 2000]]
    with pytest.raises(KeyeError, match="aggregation"):
        clips_of(0, 2, make_blocks(2, [(0, 2, 2, 0), (1, 1, 1, 0)]))
    twice = timed_blocks(make_blocks(2, [(0, 2, 2, 0), (1, 1, 1, 0)]), [0, 1], [1.0, 1.0])
    with pytest.raises(KeyeError, match="shows one time twice"):
        clips_of(0, 2, twice)


def test_impossible_settings_are_refused():
    with pytest.raises(KeyeError, match="must be odd"):
        MotionSettings(lateral_kernel=4)
    with pytest.raises(KeyeError, match="too small for 3 stages"):
        MotionSettings(size=16)
    with pytest.raises(KeyeError, match="some of the keys size"):
        MotionSettings.of({"sizes": 3})
