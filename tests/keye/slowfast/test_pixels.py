"""Bytes and floats of pixels: the formats that other people's models want, against plain computation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keye.batch.cache import Cache
from keye.batch.packed import pack, unpack
from keye.encoder import EncodedVideo, SlowFastEncoder
from keye.errors import KeyeError
from keye.slowfast.pixels import PixelFormat, as_bytes, normalised
from scripts.clips import clip

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
TINY = {"min_tokens_per_frame": 4, "max_tokens_per_frame": 16, "max_tokens": 100}
LEVELS = torch.arange(256, dtype=torch.uint8)


@pytest.fixture(scope="module")
def encoder():
    return SlowFastEncoder(fps=4, **TINY)


@pytest.fixture(scope="module")
def raw(encoder):
    return encoder(clip("bikes.mp4"), dtype=torch.uint8)


def test_every_level_is_restored():
    levels = LEVELS.repeat(3).view(1, 3, 16, 16)
    assert torch.equal(normalised(LEVELS), LEVELS.float() / 127.5 - 1)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(as_bytes(PixelFormat(dtype).convert(levels)), levels)
    for dtype in (torch.float32, torch.float16):
        other = PixelFormat(dtype, None, MEAN, STD).convert(levels)
        assert torch.equal(as_bytes(other, MEAN, STD), levels)


def test_a_video_has_the_requested_format(encoder, raw):
    path = clip("bikes.mp4")
    assert raw.pixel_values.dtype == torch.uint8 and encoder(path).pixel_values.dtype == torch.float32
    values = raw.pixel_values.numpy().astype(np.float64)
    mean, std = (np.array(three)[:, None, None] for three in (MEAN, STD))
    for options, expected, tolerance in (
        ({}, values / 127.5 - 1, 1e-6),
        ({"dtype": torch.bfloat16}, values / 127.5 - 1, 2**-8),
        ({"dtype": torch.float16, "mean": MEAN, "std": STD}, (values / 255 - mean) / std, 2e-3),
        ({"mean": MEAN, "std": STD, "device": "cpu"}, (values / 255 - mean) / std, 1e-5),
        ({"mean": 0.0, "std": 1.0}, values / 255, 1e-6),
    ):
        video = encoder(path, **options)
        assert video.pixel_values.dtype == options.get("dtype", torch.float32) and video.plan == raw.plan
        assert float(np.abs(video.pixel_values.double().numpy() - expected).max()) <= tolerance
        assert torch.equal(video.pixel_values, raw.to(**options).pixel_values)
        assert all(map(torch.equal, video.pictures(), raw.pictures()))
        assert torch.equal(video.to(dtype=torch.uint8).pixel_values, raw.pixel_values)


def test_a_still_has_the_requested_format():
    picture = torch.randint(0, 256, (3, 56, 84), dtype=torch.uint8)
    bytes_, grid = SlowFastEncoder().image(picture, dtype=torch.uint8)
    floats, _ = SlowFastEncoder().image(picture)
    assert bytes_.dtype == torch.uint8 and grid.tolist() == [[1, 4, 6]]
    assert torch.equal(normalised(bytes_), floats)
    assert torch.equal(bytes_[0], picture[:, :14, :14])


@pytest.mark.parametrize("size", [None, 336, (384, 200)])
def test_uncut_frames_are_those_of_the_plan_resized_once(encoder, size):
    frames = torch.randint(0, 256, (7, 3, 150, 200), dtype=torch.uint8)
    found = encoder.frames(frames, size=size, timestamps=[n / 4 for n in range(7)])
    sizes = found.plan.frame_sizes if size is None else [(size, size) if isinstance(size, int) else size] * 7
    assert found.slow.dtype == torch.uint8 and (len(found.slow), len(found.fast)) == found.plan.counts
    for frame, original, wanted in zip(found.in_order(), frames, sizes, strict=True):
        direct = torch.nn.functional.interpolate(original[None], size=wanted, mode="bicubic", antialias=True)[0]
        assert torch.equal(frame, direct)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_sizes_above_the_plans_are_read_again_and_not_enlarged(monkeypatch, limit):
    """Frames kept at the plan's few tokens would be blurred at 384; then the clip is read a second time."""
    monkeypatch.setattr("keye.slowfast.frame_buffer.FULL_SIZE_BYTES", limit)
    encoder = SlowFastEncoder(policy="uniform:3", **TINY)
    found = encoder.frames(clip("bikes.mp4"), size=384, fast_size=56, dtype=torch.float32, mean=MEAN, std=STD)
    monkeypatch.setattr("keye.slowfast.frame_buffer.FULL_SIZE_BYTES", 1 << 30)
    full_size = encoder.frames(clip("bikes.mp4"), size=384, fast_size=56, dtype=torch.float32, mean=MEAN, std=STD)
    assert found.slow.shape[1:] == (3, 384, 384) and found.fast.shape[1:] == (3, 56, 56)
    assert torch.equal(found.slow, full_size.slow)


def test_cache_workers_and_files_keep_every_format(tmp_path, encoder, raw):
    path, cache = clip("bikes.mp4"), Cache(tmp_path / "cache")
    for options in ({"dtype": torch.uint8}, {}, {"dtype": torch.bfloat16}, {"mean": MEAN, "std": STD}):
        direct = encoder(path, **options)
        for video in (
            cache.encode(encoder, path, **options),
            encoder.encode_many([path], workers=2, pixels=True, **options)[0],
            encoder.encode_many([path], workers=0, pixels=True, **options)[0],
        ):
            assert video.pixel_values.dtype == direct.pixel_values.dtype and video.format == direct.format
            assert torch.equal(video.pixel_values, direct.pixel_values) and video.plan == direct.plan
    assert cache.counts[:2] == (3, 1)  # one entry serves all of them
    for video in (raw, raw.to()):
        pack(video, tmp_path / "a.safetensors")
        assert (tmp_path / "a.safetensors").stat().st_size < 1.1 * raw.pixel_values.nbytes + 20_000
        again = unpack(tmp_path / "a.safetensors")
        assert torch.equal(again.pixel_values, video.pixel_values) and again.format == video.format


@given(st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
def test_filling_is_converting(count, dtype):
    pixels = torch.randint(0, 256, (count, 3, 14, 14), dtype=torch.uint8)
    form = PixelFormat(dtype) if dtype == torch.uint8 else PixelFormat(dtype, None, MEAN, STD)
    target = form.empty(count, 3, 14, 14)
    form.fill(target, pixels)
    assert torch.equal(target, form.convert(pixels))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": torch.int64}, "dtype is torch.int64; give torch.uint8, float32"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16"),
        ({"dtype": torch.uint8, "mean": 0.4}, "bytes are not normalised"),
        ({"std": 0}, "std is .*give numbers above 0"),
        ({"mean": (0.5, 0.5)}, "one number, or one for each"),
        ({"std": float("nan")}, "std is nan"),
        ({"mean": "a"}, "mean is 'a'; give one number"),
        ({"mean": (None, 1, 2)}, "mean is .None, 1, 2.; give one number"),
    ],
)
def test_impossible_formats(encoder, options, says):
    with pytest.raises(KeyeError, match=says):
        encoder(clip("bikes.mp4"), **options)
    with pytest.raises(KeyeError, match=says):
        encoder.encode_many([clip("bikes.mp4")], workers=2, pixels=True, **options)
    with pytest.raises(KeyeError, match="size is"):
        encoder.frames(clip("bikes.mp4"), size=(3, 4, 5))


def test_a_video_made_by_hand_has_the_default_format(raw):
    video = EncodedVideo(raw.to().pixel_values, raw.grid_thw, raw.plan)
    assert torch.equal(video.pictures()[0], raw.pictures()[0])
