import hashlib
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image

from keye.batch.cache import Cache
from keye.batch.fingerprint import code_hash
from keye.batch.packed import pack, unpack
from keye.encoder import SlowFastEncoder
from keye.errors import KeyeError, VideoError
from keye.slowfast.measures import get_measure
from tests.keye.video.make import numbered, write_video

ROOT = Path(__file__).resolve().parents[3]
TINY = {"min_tokens_per_frame": 4, "max_tokens_per_frame": 16, "max_tokens": 100}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def video(tmp_path) -> Path:
    frames = noise(30, 64, 96, 3).numpy()
    return write_video(tmp_path / "clip.mp4", frames)


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache")


def same(one, other) -> bool:
    features = one.features is other.features or torch.equal(one.features, other.features)
    pixels = torch.equal(one.pixel_values, other.pixel_values) and one.pixel_values.dtype == other.pixel_values.dtype
    return features and pixels and torch.equal(one.grid_thw, other.grid_thw) and one.plan == other.plan


@pytest.mark.parametrize(
    "more",
    [{}, {"policy": "two_stream:slow=1,fast_tokens=4"}, {"policy": "adaptive_budget:share=0.5"}, {"token_side": 32}],
    ids=lambda more: next(map(str, more.values()), "default"),
)
def test_cached_results_equal_new_ones(video, cache, more):
    encoder = SlowFastEncoder(**TINY, **more)
    plain = encoder(video)
    for round_ in range(2):
        assert cache.plan(encoder, video) == plain.plan
        assert same(cache.encode(encoder, video), plain)
        assert (cache.hits, cache.misses) == (2 * round_, 2)
    kept = [path for path in cache.directory.rglob("*.safetensors")]
    assert len(kept) == 1 and kept[0].stat().st_size < plain.pixel_values.nbytes / 3


def test_features_are_computed_again(video, cache):
    first = SlowFastEncoder(**TINY, tower=lambda pixels, grid: pixels.flatten(1).mean(1)[::4, None])
    second = SlowFastEncoder(**TINY, tower=lambda pixels, grid: pixels.flatten(1).amax(1)[::4, None])
    assert same(cache.encode(first, video), first(video))
    assert same(cache.encode(second, video), second(video)) and cache.hits == 1


def test_pixels_that_are_not_bytes_are_kept_unchanged(tmp_path):
    encoded = SlowFastEncoder(**TINY)(noise(2, 3, 56, 56))
    odd = replace(encoded, pixel_values=encoded.pixel_values + 1e-3)
    pack(odd, tmp_path / "odd.safetensors")
    assert same(unpack(tmp_path / "odd.safetensors"), odd)


def test_content_and_settings_make_the_key(tmp_path, video, cache):
    encoder = SlowFastEncoder(**TINY, max_frames=1)
    cache.plan(encoder, video)
    moved = tmp_path / "sub" / "other.mp4"
    moved.parent.mkdir()
    shutil.move(video, moved)
    plan = cache.plan(encoder, str(moved))
    assert cache.hits == 1 and plan.source == str(moved)
    assert plan == encoder.plan(str(moved))
    for changed in ({"threshold": 0.5}, {"fps": 1.0}, {"policy": "uniform:3"}, {"measure": "ssim"}, {"max_tokens": 99}):
        cache.plan(SlowFastEncoder(**{**TINY, "max_frames": 1, **changed}), moved)
    assert (cache.hits, cache.misses) == (1, 6)
    write_video(moved, noise(30, 64, 96, 3, seed=1).numpy())
    assert cache.plan(encoder, moved) == encoder.plan(moved)
    assert (cache.hits, cache.misses) == (1, 7)


def test_warnings_name_the_requested_file(tmp_path, cache):
    video = write_video(tmp_path / "before.mp4", numbered(60))
    encoder = SlowFastEncoder(fps=10, min_tokens_per_frame=4, max_tokens_per_frame=16, max_tokens=40)
    assert any("before.mp4" in warning for warning in cache.plan(encoder, video).warnings)
    after = video.rename(tmp_path / "after.mp4")
    assert cache.plan(encoder, after).warnings == encoder.plan(after).warnings and cache.hits == 1


def test_an_unchanged_file_is_not_read_again(video, cache, monkeypatch):
    monkeypatch.setattr("keye.batch.cache._FRESH", -1)
    encoder, read = SlowFastEncoder(**TINY), []
    digest = hashlib.file_digest
    monkeypatch.setattr("keye.batch.cache.hashlib.file_digest", lambda *given: read.append(1) or digest(*given))
    plan = cache.plan(encoder, video)
    assert cache.plan(encoder, video) == cache.plan(encoder, video) == plan and len(read) == 1
    os.utime(video, (1e9, 1e9 + 1))
    assert cache.plan(encoder, video) == plan and len(read) == 2
    full = Cache(cache.directory, verify="full")
    assert full.plan(encoder, video) == full.plan(encoder, video) == plan and len(read) == 4
    with pytest.raises(KeyeError, match='use "quick" or "full"'):
        Cache(cache.directory, verify="mtime")


@pytest.mark.parametrize("how", ["written over", "moved there"])
def test_a_file_with_the_size_and_time_of_another_is_distinguished(tmp_path, cache, monkeypatch, how):
    """`cp -p`, `rsync --times` and archives make such files; once, the plan of the old file was returned."""
    monkeypatch.setattr("keye.batch.cache._FRESH", -1)
    encoder, path, other = SlowFastEncoder(**TINY), tmp_path / "a.bmp", tmp_path / "b.bmp"
    for level, file in ((10, path), (200, other)):
        Image.fromarray(np.full((560, 560, 3), level, np.uint8)).save(file)
        os.utime(file, (1e9, 1e9))
    before = cache.encode(encoder, path)
    if how == "written over":
        path.write_bytes(other.read_bytes())
        os.utime(path, (1e9, 1e9))
    else:
        os.replace(other, path)
    after = cache.encode(encoder, path)
    assert before.pixel_values.mean() == pytest.approx(10 / 127.5 - 1)
    assert after.pixel_values.mean() == pytest.approx(200 / 127.5 - 1)


def test_the_sample_detects_a_change_at_either_end_or_of_a_part(tmp_path, cache, monkeypatch):
    """On a file system without useful times."""
    monkeypatch.setattr("keye.batch.cache._FRESH", -1)
    monkeypatch.setattr("keye.batch.cache.marks", lambda about: (about.st_size,))
    path, size = tmp_path / "a.bin", 3 << 20
    for place in (0, 60_000, size // 16, size // 2, size - 60_000, size - 1):
        content = bytearray(size)
        path.write_bytes(content)
        before = cache._path_content(path)
        content[place] = 1
        path.write_bytes(content)
        assert cache._path_content(path) != before, place


def test_a_folder_that_changes_while_it_is_read_is_not_cached(tmp_path, cache):
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(np.full((56, 56, 3), 10 + index, np.uint8)).save(folder / f"{index}.png")

    class Changing(SlowFastEncoder):
        def plan(self, source, **options):
            plan = super().plan(source, **options)
            Image.fromarray(np.full((56, 56, 3), 200, np.uint8)).save(folder / "1.png")
            return plan

    for source in (folder, sorted(folder.iterdir())):
        cache.plan(Changing(**TINY), source)
    assert not [*cache.directory.glob("plans/*/*")]


def test_a_file_that_may_still_change_is_read_again(tmp_path, cache):
    encoder, path = SlowFastEncoder(**TINY), tmp_path / "frames" / "0.bmp"
    path.parent.mkdir()
    now = time.time_ns()
    for level in (10, 200):  # the same size, and the same time to the nanosecond
        Image.fromarray(np.full((56, 56, 3), level, np.uint8)).save(path)
        os.utime(path, ns=(now, now))
        assert cache.encode(encoder, path.parent).pixel_values.mean() == pytest.approx(level / 127.5 - 1)
    assert cache.hits == 0


def test_every_kind_of_source(tmp_path, video, cache):
    folder = tmp_path / "frames"
    folder.mkdir()
    pictures = noise(4, 56, 56, 3).numpy()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index}.png")
    encoder = SlowFastEncoder(**TINY)
    array = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    images = [Image.fromarray(picture).quantize(8) for picture in pictures]
    sources = [video, video.read_bytes(), folder, array, array.numpy(), array.flip(0), images, images[:3]]
    for _ in range(2):
        for source in sources:
            assert same(cache.encode(encoder, source), encoder(source))
        with video.open("rb") as file:
            plan = cache.plan(encoder, file)
            assert plan.source == str(video) and plan.tokens == encoder.plan(video).tokens
    assert (cache.hits, cache.misses) == (9, 9)
    Image.fromarray(pictures[0] // 2).save(folder / "3.png")
    assert same(cache.encode(encoder, folder), encoder(folder))
    assert cache.plan(encoder, array, timestamps=[0, 1, 2, 3]) == encoder.plan(array, timestamps=[0, 1, 2, 3])
    cache.plan(encoder, array, timestamps=torch.arange(4))
    assert cache.plan(encoder, array, timestamps=[0, 1, 2, 4]).timestamps[-1] == 4
    assert (cache.hits, cache.misses) == (10, 12)


def test_a_missing_file_is_the_encoders_error(tmp_path, cache):
    with pytest.raises(VideoError, match="none.mp4 does not exist"):
        cache.plan(SlowFastEncoder(), tmp_path / "none.mp4")
    (tmp_path / "file").touch()
    with pytest.raises(KeyeError, match="give a folder that you may write to"):
        Cache(tmp_path / "file")


def test_an_entry_that_another_process_removes_while_it_is_opened_is_not_damaged(video, cache, monkeypatch):
    encoder = SlowFastEncoder(**TINY)
    first = cache.encode(encoder, video)

    def evicted(path, framework):
        Path(path).unlink()
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: No such file or directory (2)")

    monkeypatch.setattr(safetensors, "safe_open", evicted)
    again = cache.encode(encoder, video)
    assert torch.equal(again.pixel_values, first.pixel_values) and cache.counts == (0, 2, 0)


def test_damaged_entries_are_made_again(video, cache):
    encoder, pick = SlowFastEncoder(**TINY), random.Random(0)
    plain = encoder(video)
    cache.encode(encoder, video)
    entries = [*cache.directory.glob("plans/*/*"), *cache.directory.glob("frames/*/*")]
    assert len(entries) == 2
    damages = 0
    for entry in entries:
        for kind in ["empty", "short", "long", *["flip"] * 12]:
            data = bytearray(entry.read_bytes())
            if kind == "flip":
                data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
            changed = {"empty": b"", "short": data[: len(data) // 2], "long": data + b"x", "flip": data}[kind]
            entry.write_bytes(changed)
            assert cache.plan(encoder, video) == plain.plan, (entry, kind)
            assert same(cache.encode(encoder, video), plain), (entry, kind)
            damages += 1
    assert cache.rebuilt == damages


def test_the_least_recently_used_go_first(tmp_path):
    limit, block = 20, 4096
    cache = Cache(tmp_path / "cache", max_bytes=limit * block)
    encoder, pick = SlowFastEncoder(**TINY), random.Random(1)
    model: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for _ in range(300):
        which = min(pick.randrange(40), pick.randrange(40))
        cache.plan(encoder, torch.full((1, 3, 28, 28), which, dtype=torch.uint8))
        if which in model:
            hits += 1
            model.move_to_end(which)
        else:
            model[which] = None
            if len(model) > limit:
                while len(model) > 0.9 * limit:
                    model.popitem(last=False)
        assert cache.hits == hits
        assert cache.bytes == len(model) * block <= cache.max_bytes
    on_disk = sum(-(-path.stat().st_size // block) for path in cache.directory.glob("*/*/*"))
    assert on_disk == len(model) and hits > 100


def test_an_old_cache_and_large_entries_stay_within_the_bound(tmp_path):
    encoder = SlowFastEncoder(**TINY)
    cache = Cache(tmp_path / "cache")
    for level in range(30):
        cache.plan(encoder, torch.full((1, 3, 28, 28), level, dtype=torch.uint8))
    (cache.directory / "usage").unlink()
    smaller = Cache(tmp_path / "cache", max_bytes=10 * 4096)
    assert len(list(smaller.directory.glob("plans/*/*"))) == 9
    large = noise(6, 3, 112, 112)
    assert same(smaller.encode(encoder, large), encoder(large))
    assert not list(smaller.directory.glob("frames/*/*"))
    with pytest.raises(KeyeError, match="max_bytes is 10; give a whole number of 4096 or more"):
        Cache(tmp_path / "cache", max_bytes=10)


class Nameless:
    threshold = 0.5

    def prepare(self, frames):
        return frames.float().mean((1, 2, 3))

    def compare(self, reference, features):
        return 1 - (features - reference).abs() / 255


class Named(Nameless):
    name = "named"


class Disguised(Nameless):
    name = "patch_l1"


def test_an_encoder_that_its_settings_do_not_identify_is_refused(video, cache):
    policy = SlowFastEncoder(policy="uniform:3").policy
    assert cache.plan(SlowFastEncoder(policy=policy), video).settings["policy"] == "uniform:3"
    refused = {Nameless: "has no name", Named: "its settings do not build it", Disguised: "register it under"}
    for measure, says in refused.items():
        with pytest.raises(KeyeError, match=says):
            cache.plan(SlowFastEncoder(measure=measure()), video)
    encoder = SlowFastEncoder()
    encoder.measure.threshold = 0.123
    encoder.policy = Nameless()
    with pytest.raises(KeyeError, match="policy has no spec"):
        cache.encode(encoder, video)


MEASURE = """
import torch
from keye.slowfast.measures import register

@register
class Mine:
    name, threshold = "mine_in_a_file", {threshold}

    def prepare(self, frames):
        return frames.float().mean((1, 2, 3))

    def compare(self, reference, features):
        return 1 - (features - reference).abs() / 255 * {strength}
"""


def test_other_code_of_a_measure_is_another_key(tmp_path, video, cache, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    plans = []
    for number, strength in enumerate((1, 1, 200)):
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        (tmp_path / "mine.py").write_text(MEASURE.format(threshold=0.5, strength=strength))
        os.utime(tmp_path / "mine.py", (number, number))  # else the compiled file of the same second is taken
        importlib.invalidate_caches()
        importlib.import_module("mine")
        code_hash.cache_clear()  # as in a new process
        encoder = SlowFastEncoder(measure="mine_in_a_file", **TINY)
        plans.append(cache.plan(encoder, video))
        assert plans[-1] == encoder.plan(video) and get_measure("mine_in_a_file").threshold == 0.5
    assert (cache.hits, cache.misses) == (1, 2) and plans[0] == plans[1] != plans[2]


TWO = """
import sys, torch
from keye.batch.cache import Cache
from keye.encoder import SlowFastEncoder
encoder = SlowFastEncoder(min_tokens_per_frame=4, max_tokens_per_frame=16, max_tokens=100)
cache = Cache(sys.argv[1], max_bytes=30 * 4096)
right = 0
for step in range(120):
    level = step * int(sys.argv[2]) % 50
    frames = torch.full((2, 3, 28, 28), level, dtype=torch.uint8)
    video = cache.encode(encoder, frames)
    right += torch.allclose(video.pixel_values, torch.tensor(level / 127.5 - 1))
    right += cache.plan(encoder, frames) == video.plan
print(right, cache.hits, cache.rebuilt)
"""


@pytest.mark.parametrize(
    "times",
    [range(3), (0, 1, 2), [0, 1.0, 2], torch.arange(3), np.arange(3.0), [np.float32(0), np.int64(1), Fraction(2)]]
    + [list(torch.arange(3))],
)
def test_times_of_any_kind_are_options(tmp_path, times):
    cache, encoder = Cache(tmp_path / "cache"), SlowFastEncoder(**TINY)
    frames = torch.from_numpy(numbered(3)).permute(0, 3, 1, 2)
    plan = cache.plan(encoder, frames, timestamps=times, start=Fraction(1, 2))
    assert plan == encoder.plan(frames, timestamps=[0.0, 1.0, 2.0], start=0.5)
    assert cache.plan(encoder, frames, timestamps=times, start=Fraction(1, 2)) == plan and cache.hits == 1


@pytest.mark.parametrize("wrong", [float("nan"), "1G", None, 4096.5])
def test_the_size_of_a_cache_is_a_number(tmp_path, wrong):
    with pytest.raises(KeyeError, match="max_bytes is .*; give a whole number"):
        Cache(tmp_path / "cache", max_bytes=wrong)


def test_two_processes_share_a_cache(tmp_path):
    command = [sys.executable, "-c", TWO, str(tmp_path / "cache")]
    running = [subprocess.Popen([*command, step], stdout=subprocess.PIPE, cwd=ROOT) for step in ("1", "3")]
    counts = [list(map(int, process.communicate()[0].split())) for process in running]
    for right, hits, rebuilt in counts:
        assert right == 240 and hits >= 120 and rebuilt == 0
    assert not list((tmp_path / "cache").rglob("*.part"))
    for path in (tmp_path / "cache").glob("plans/*/*"):
        json.loads(path.read_text())
    assert len(list((tmp_path / "cache").glob("*/*/*"))) <= 33
