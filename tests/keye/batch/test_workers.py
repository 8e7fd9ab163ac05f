import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch

from keye.batch.cache import Cache
from keye.batch.workers import encode_many, iter_many
from keye.encoder import SlowFastEncoder
from keye.errors import KeyeError, VideoError
from keye.slowfast.measures import register
from keye.slowfast.plan import VideoPlan
from tests.keye.video.make import numbered, write_video

ROOT = Path(__file__).resolve().parents[3]
TINY = {"min_tokens_per_frame": 4, "max_tokens_per_frame": 16, "max_tokens": 100}


@register
class Fatal:
    """Acts as a faulty codec: frames 48 high end the process, 80 high hang it, 112 high allocate 2 GB."""

    name, threshold = "fatal_in_tests", 0.5

    def prepare(self, frames):
        if frames.shape[2] == 48:
            os.kill(os.getpid(), signal.SIGSEGV)
        if frames.shape[2] == 80:
            time.sleep(600)
        if frames.shape[2] == 112:
            memory = torch.ones(2 << 30, dtype=torch.uint8)
            time.sleep(600)
            del memory
        return frames.float().mean((1, 2, 3))

    def compare(self, reference, features):
        return 1 - (features - reference).abs() / 255


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[Path]:
    """Six clips of different lengths; the third is not a video."""
    folder = tmp_path_factory.mktemp("videos")
    paths = [write_video(folder / f"{index}.mp4", numbered(10 + 12 * index)) for index in range(6)]
    paths[2].write_text("no video")
    return paths


def children() -> set[int]:
    """Running worker processes of this process."""
    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile, or a zombie
            if any("keye.batch.worker import serve" in argument for argument in child.cmdline()):
                found.add(child.pid)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_results_in_order_and_failures_at_the_end(videos, workers, tmp_path):
    """A file that is not a video and, where there are workers, one that crashes its process."""
    encoder = SlowFastEncoder(measure="fatal_in_tests", **TINY)
    deadly = [write_video(tmp_path / "deadly.mp4", numbered(20, height=48))] if workers else []
    results = encode_many(encoder, [*videos, *deadly, videos[1]], workers=workers, cache=tmp_path / "cache")
    names = [*map(str, videos), *[None for _ in deadly], str(videos[1])]
    names[2] = None
    assert [plan and plan.source for plan in results] == names
    assert all(plan == encoder.plan(plan.source) for plan in results.succeeded) and len(results.succeeded) == 6
    failure, *died = results.failures
    assert (failure.index, failure.source, failure.kind) == (2, str(videos[2]), "VideoError")
    with pytest.raises(VideoError) as alone:
        encoder.plan(videos[2])
    assert failure.reason == str(alone.value)
    assert [(one.index, one.source, "SIGSEGV" in one.reason) for one in died] == [(6, str(one), True) for one in deadly]
    lines = results.summary().splitlines()
    assert lines[0].startswith(f"6 of {len(names)} videos")
    assert f" {sum(plan.tokens for plan in results.succeeded):,} tokens" in lines[0]
    assert len(lines) == 2 + len(deadly) and str(videos[2]) in lines[1]
    assert not children()


def test_pixels_and_features_from_workers_equal_those_made_here(videos, tmp_path):
    tower = SlowFastEncoder(**TINY, tower=lambda pixels, grid: pixels.flatten(1).mean(1)[::4, None])
    cache = Cache(tmp_path / "cache")
    sources = [videos[0], videos[1].read_bytes(), torch.from_numpy(numbered(3)).permute(0, 3, 1, 2), videos[0]]
    with videos[3].open("rb") as file:
        results = encode_many(tower, [*sources, file], workers=2, cache=cache, pixels=True)
    assert not results.failures
    for source, video in zip([*sources, videos[3]], results, strict=True):
        plain = tower(source)
        assert torch.equal(video.pixel_values, plain.pixel_values) and torch.equal(video.features, plain.features)
        assert torch.equal(video.grid_thw, plain.grid_thw) and video.plan == plain.plan
    assert cache.hits + cache.misses == 5 and cache.misses >= 4
    assert len(list(cache.directory.glob("frames/*/*"))) == cache.misses - (cache.misses == 5)


def test_lists_of_open_objects_are_processed_here(videos):
    """PyAV's frames cannot be sent to another process; such a list once ended the batch."""
    with av.open(str(videos[0])) as container:
        frames = list(container.decode(video=0))
    row = {"path": str(videos[1]), "bytes": None}
    encoder = SlowFastEncoder(**TINY)
    results = encoder.encode_many([frames, [open(videos[0], "rb")], row, videos[0]], workers=2)
    assert [failure.index for failure in results.failures] == [1]
    assert results[0].frame_types.tolist() == results[3].frame_types.tolist()
    assert len(results[2]) == len(encoder.plan(videos[1]))


def test_a_source_that_cannot_be_pickled_fails_alone(videos):
    """An open file in a row of `datasets` is read here; other objects fail, and the batch continues."""
    with videos[0].open("rb") as file:
        odd = np.array([threading.Lock()], dtype=object)
        results = encode_many(
            SlowFastEncoder(**TINY), [videos[0], {"path": None, "bytes": file}, odd, videos[1]], workers=2
        )
    assert [failure.index for failure in results.failures] == [2]
    assert "cannot be sent to another process" in results.failures[0].reason
    assert results[1].frame_types.tolist() == results[0].frame_types.tolist() and len(results[3])
    assert not children()


def test_raise_stops_at_the_first(videos):
    with pytest.raises(VideoError, match="2.mp4"):
        encode_many(SlowFastEncoder(**TINY), videos, workers=0, on_error="raise")


def test_a_long_stream_of_sources_is_read_as_needed(videos):
    given = 0

    def sources():
        nonlocal given
        while True:
            given += 1
            yield videos[0]

    running = iter_many(SlowFastEncoder(**TINY), sources(), workers=0)
    assert [next(running).index for _ in range(5)] == [0, 1, 2, 3, 4] and given == 5
    running.close()


def test_memory_is_bounded_and_closing_does_not_wait_for_a_clip_that_hangs(tmp_path):
    hanging = write_video(tmp_path / "hangs.mp4", numbered(10, height=80))
    quick = write_video(tmp_path / "quick.mp4", numbered(10))
    given, before = 0, threading.active_count()

    def sources():
        nonlocal given
        for source in [hanging, *[quick] * 30, hanging, *[quick] * 100]:
            given += 1
            yield source

    running = iter_many(SlowFastEncoder(measure=Fatal(), **TINY), sources(), workers=2)
    for taken in range(30):
        assert isinstance(next(running).result, VideoPlan) and given <= taken + 4
    assert len(children()) == 2
    running.close()
    assert not children() and threading.active_count() == before


SCRIPT = """
import sys
from keye.batch.workers import encode_many
from keye.encoder import SlowFastEncoder
from tests.keye.batch.test_workers import Fatal
print(encode_many(SlowFastEncoder(measure=Fatal()), sys.argv[1:], workers=2, progress=True))
"""


@pytest.mark.slow
def test_a_video_that_takes_too_long_or_too_much_fails_alone(tmp_path):
    """A clip that hangs and one that allocates too much, among good clips: an error for each, results for the rest."""
    sizes = {"hangs": 80, "hoards": 112, "one": 64, "two": 64, "three": 64}
    paths = [write_video(tmp_path / f"{name}.mp4", numbered(10, height=height)) for name, height in sizes.items()]
    encoder = SlowFastEncoder(measure="fatal_in_tests", **TINY)
    for pixels in (False, True):
        results = encode_many(encoder, paths, workers=2, pixels=pixels, max_seconds=4, max_memory=1 << 30)
        assert [item is None for item in results] == [True, True, False, False, False]
        reasons = [failure.reason for failure in results.failures]
        assert "takes longer than max_seconds=4; leave it out" in reasons[0]
        assert f"needs more than max_memory={1 << 30}; leave it out" in reasons[1]
        assert not children()


def test_limits_apply_without_workers_and_to_unsendable_sources(videos):
    encoder = SlowFastEncoder(measure="fatal_in_tests", **TINY)
    results = encode_many(encoder, [videos[0], open(videos[0], "rb")], workers=0, max_seconds=60)
    assert len(results[0]) and "give a path or bytes" in results.failures[0].reason
    for wrong in ({"max_seconds": 0}, {"max_seconds": float("nan")}, {"max_memory": 2.5}, {"max_memory": -1}):
        with pytest.raises(KeyeError, match=f"{next(iter(wrong))} is"):
            encode_many(encoder, videos, **wrong)


def test_ctrl_c_ends_everything(tmp_path):
    videos = [write_video(tmp_path / f"{i}.mp4", numbered(10, height=80 if i else 64)) for i in range(10)]
    command = [sys.executable, "-c", SCRIPT, *map(str, videos)]
    # A shell starts its background jobs with SIGINT ignored, which children inherit.
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=listen
    )
    for line in process.stderr:
        if line.startswith("1 of 10 videos"):
            break
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) != 0
    rest = process.stderr.read()  # ends only once no worker has the pipe open
    assert "KeyboardInterrupt" in rest and rest.count("Traceback") == 1
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 0)
        pytest.fail("a worker was left behind")


def test_impossible_settings_are_reported_first(videos):
    encoder = SlowFastEncoder(**TINY)
    with pytest.raises(KeyeError, match="workers is -1"):
        encode_many(encoder, videos, workers=-1)
    with pytest.raises(KeyeError, match="on_error"):
        encode_many(encoder, videos, on_error="ignore")
    for one in (str(videos[0]), videos[0], b"video"):
        with pytest.raises(VideoError, match=r"give a list of videos: \[path\]"):
            encode_many(encoder, one)
    for wrong, match in (
        ({"fps": 1}, r"fps is a setting of the encoder; use encoder.with_settings\(fps="),
        ({"worker": 2}, "worker is not an option; did you mean workers"),
        ({"on_eror": "raise"}, "did you mean on_error"),
        ({"dtype": torch.uint8}, "dtype is an option of pixels, and a plan has none"),
        ({"pixels": True, "dtpye": torch.uint8}, "did you mean dtype"),
    ):
        with pytest.raises(KeyeError, match=match):
            encoder.encode_many(videos, **wrong)
    encoder.measure = type("Local", (Fatal,), {"__module__": "__main__"})()
    with pytest.raises(KeyeError, match="defined in the script itself"):
        encode_many(encoder, videos, workers=2)
    assert len(encode_many(encoder, videos).failures) == 1  # by default it is processed here


def test_progress_goes_to_stderr_and_only_when_wanted(videos, capsys):
    encode_many(SlowFastEncoder(**TINY), videos, workers=0)
    assert capsys.readouterr() == ("", "")
    encode_many(SlowFastEncoder(**TINY), videos, workers=0, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "6 of 6 videos, 1 failed" in shown.err
