"""Decoding only what is needed gives what decoding everything gives: the same frames, times and pixels, to the bit."""

import gc
import io
import os
import threading
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keye.errors import VideoError
from keye.video.decoding import decoder as decode
from keye.video.decoding.bitstream import CLEAN, FLUSH, packet_reader
from keye.video.decoding.containers import open_container
from keye.video.decoding.decoder import Decoder
from keye.video.decoding.packet_index import read_index
from scripts.clips import clip
from tests.keye.video.make import write_video

X264 = {"preset": "veryfast", "g": "12", "threads": "1"}
X265 = {"preset": "ultrafast"}
OPEN = "open-gop=1:scenecut=0:b-adapt=0:b-pyramid=normal:keyint=12"

# name: (codec, its options, whether an index is to be had)
ENCODINGS = {
    "no_b.mp4": ("libx264", X264 | {"bf": "0", "sc_threshold": "0"}, True),
    "b.mkv": ("libx264", X264 | {"bf": "3"}, True),
    "pyramid.ts": ("libx264", X264 | {"bf": "5", "x264-params": "b-pyramid=normal:b-adapt=0"}, True),
    "open.mp4": ("libx264", X264 | {"bf": "3", "x264-params": OPEN}, True),
    "open.ts": ("libx264", X264 | {"bf": "3", "x264-params": OPEN}, True),
    "refresh.mp4": ("libx264", X264 | {"x264-params": "intra-refresh=1:keyint=12"}, True),
    "slices.mp4": ("libx264", X264 | {"bf": "2", "x264-params": "slices=3"}, True),
    "interlaced.mp4": ("libx264", X264 | {"bf": "2", "x264-params": "tff=1"}, True),
    "interlaced.ts": ("libx264", X264 | {"bf": "2", "x264-params": "tff=1"}, False),
    "bare.h264": ("libx264", X264 | {"bf": "2"}, False),
    "hevc.mp4": ("libx265", X265 | {"x265-params": "log-level=none:bframes=4:keyint=12:pools=1"}, True),
    "layers.mkv": ("libx265", X265 | {"x265-params": "log-level=none:bframes=4:keyint=12:temporal-layers=3"}, True),
    "mpeg2.mp4": ("mpeg2video", {"bf": "2", "g": "9"}, True),
    "mpeg2.mpg": ("mpeg2video", {"bf": "2", "g": "9"}, True),
    "mpeg4.mkv": ("mpeg4", {"bf": "2", "g": "9"}, True),
    "vp8.webm": ("libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "10", "cpu-used": "5"}, True),
    "vp9.webm": ("libvpx-vp9", {"g": "12", "lag-in-frames": "12", "cpu-used": "8"}, True),
    "av1.mp4": ("libsvtav1", {"preset": "13", "g": "12"}, True),
    "jpeg.avi": ("mjpeg", {}, True),
    "ffv1.mkv": ("ffv1", {"g": "6"}, True),
}


def encode(path: Path, codec: str, options: dict[str, str], count: int = 40, times_ms=None) -> Path:
    """The beginning of a real clip at 160x96, in another coding."""
    frames = []
    with av.open(str(clip("bikes.mp4"))) as source:
        for frame in source.decode(video=0):
            frames.append(frame.reformat(160, 96, "rgb24").to_ndarray())
            if len(frames) == count:
                break
    form = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    return write_video(path, np.stack(frames), codec=codec, options=options, times_ms=times_ms, pixel_format=form)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("encodings")


@pytest.fixture(scope="module")
def encoded(folder):
    """name -> (path, everything in it: [(seconds, pixels)], seconds at the end), encoded and decoded once."""
    kept = {}

    def get(name: str):
        if name not in kept:
            codec, options, _ = ENCODINGS[name]
            path = encode(folder / name, codec, options)
            kept[name] = (path, *decode_all(path))
        return kept[name]

    return get


def decode_all(source) -> tuple[list[tuple[float, np.ndarray]], float]:
    """Every frame of a file by the shortest way that PyAV offers."""
    with av.open(source if isinstance(source, io.BytesIO) else str(source)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 25)
        # A transport or program stream's clock begins anywhere: its second 0 is the beginning of the file.
        start = container.start_time / 1e6 if container.format.name in ("mpegts", "mpeg") else 0.0
        found = []
        for frame in container.decode(stream):
            time = len(found) / rate if frame.pts is None else float(frame.pts * frame.time_base) - start
            found.append((time, frame.to_ndarray(format="rgb24")))
            length = float(frame.duration * frame.time_base) if frame.duration else 1 / rate
    return found, found[-1][0] + length


def opened(source, fps=2.0, max_frames=1000, **options):
    return Decoder(open_container(source, str(source)), str(source), fps, max_frames, **options)


def expected_frames(times: list[float], moments: list[float], end: float) -> list[int]:
    """The frame on the screen at each moment, one after the other, by looking at every frame."""
    shown = []
    for moment in moments:
        at = max(index for index, time in enumerate(times) if time <= moment + 1e-4)
        if moment < end and at not in shown:
            shown.append(at)
    return shown


def compare(decoder, frames, end) -> None:
    got = list(decoder.frames())
    assert [frame.index for frame in got] == expected_frames([time for time, _ in frames], decoder.times, end)
    for frame in got:
        time, pixels = frames[frame.index]
        assert frame.time == pytest.approx(time, abs=1e-6)
        assert np.array_equal(frame.pixels.permute(1, 2, 0).numpy(), pixels), frame.index


SPARSE = {"max_examples": 8, "deadline": None, "derandomize": True}


@pytest.mark.parametrize("name", ENCODINGS)
def test_any_sampling_of_any_coding_equals_decoding_everything(encoded, name):
    path, frames, end = encoded(name)
    indexed = ENCODINGS[name][2]

    @settings(**SPARSE, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        fps=st.sampled_from([0.7, 2.0, 5.3, 60.0]),
        begin=st.floats(0, 1.4),
        length=st.floats(0.05, 2),
        count=st.none() | st.integers(1, 6),
        far=st.sampled_from([0, decode._FAR]),
        passes=st.integers(1, 2),
    )
    def check(fps, begin, length, count, far, passes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "_FAR", far)  # 0: every gap is jumped over, not read
            decoder = opened(path, fps, start=begin, end=begin + length, num_frames=count)
            for _ in range(passes):
                compare(decoder, frames, end)
            assert decoder.selective == indexed
            decoder.close()

    check()


def index_of(path):
    container = open_container(path, str(path))
    return read_index(container, container.streams.video[0], 25.0)


def test_only_what_is_needed_is_decoded(encoded):
    """Counted by hand: groups of 12 without B-frames, and I B B B P … in groups of 12 whose B-frames lead nowhere."""
    index = index_of(encoded("no_b.mp4")[0])
    assert np.flatnonzero(index.restarts).tolist() == [0, 12, 24, 36] and not index.needless.any()
    assert np.flatnonzero(index.plan(np.array([14])).decode).tolist() == [12, 13, 14]
    assert np.flatnonzero(index.plan(np.array([1, 24, 37])).decode).tolist() == [0, 1, 24, 36, 37]
    options = X264 | {"bf": "3", "x264-params": "b-adapt=0:b-pyramid=none:scenecut=0"}
    index = index_of(encode(encoded("no_b.mp4")[0].parent / "plain_b.mp4", "libx264", options, count=13))
    # In presentation order I B B B P B B B P B B P I; a P comes before the B-frames that are shown before it.
    assert np.argsort(index.frames).tolist() == [0, 4, 1, 2, 3, 8, 5, 6, 7, 11, 9, 10, 12]
    assert np.flatnonzero(index.needless).tolist() == [2, 3, 4, 6, 7, 8, 10, 11]
    assert np.flatnonzero(index.plan(np.array([6])).decode).tolist() == [0, 1, 5, 7]


def test_an_open_group_needs_the_one_before_for_what_leads_it(encoded):
    index = index_of(encoded("open.mp4")[0])
    start = int(np.flatnonzero(index.restarts)[1])
    key = int(np.flatnonzero(index.frames == start)[0])
    assert index.restarts[0] == CLEAN and index.restarts[start] == FLUSH and index.pts[start + 1] < index.pts[start]
    assert np.flatnonzero(index.plan(np.array([key])).decode).tolist() == [start]
    joined = np.flatnonzero(index.plan(np.array([key - 1])).decode)
    assert joined[0] == 0 and start in joined and not index.needless[joined[joined < start]].any()


def test_where_decoding_begins_and_what_can_be_skipped(encoded):
    refresh = index_of(encoded("refresh.mp4")[0])  # its key frames are gradual: only the first is a beginning
    assert np.flatnonzero(refresh.restarts).tolist() == [0]
    layers = index_of(encoded("layers.mkv")[0])
    container = open_container(encoded("layers.mkv")[0], "layers")
    read = packet_reader(container.streams.video[0].codec_context)
    natures = [read(packet) for packet in container.demux(video=0) if packet.size]
    deepest = max(nature.layer for nature in natures)
    assert deepest == 2 and layers.needless.sum() > 5
    assert all(natures[at].layer == deepest and not natures[at].reference for at in np.flatnonzero(layers.needless))


@pytest.mark.parametrize("name", ["late.mkv", "late.mp4", "late.ts"])
def test_a_variable_rate_and_a_late_start(tmp_path, name):
    clock = (5000 + np.cumsum(np.random.default_rng(0).choice([20, 40, 40, 700], 40))).tolist()
    path = encode(tmp_path / name, "libx264", X264 | {"bf": "3"}, times_ms=clock)
    frames, end = decode_all(path)
    origin = clock[0] if name == "late.ts" else 0
    assert [time for time, _ in frames] == pytest.approx((np.array(clock) - origin) / 1000, abs=1e-3)
    for fps in (0.5, 3.0, 25.0):
        decoder = opened(path, fps)
        compare(decoder, frames, end)
        assert decoder.selective and decoder.duration == pytest.approx(end, abs=0.05)
        decoder.close()


def test_num_frames_and_a_range(encoded):
    path, frames, _ = encoded("no_b.mp4")
    decoder = opened(path, start=0.4, end=1.2, num_frames=4)
    assert decoder.times == pytest.approx([0.4, 0.6, 0.8, 1.0]) and (decoder.expected, decoder.wanted) == (4, 4)
    assert [frame.index for frame in decoder.frames()] == [10, 15, 20, 25]
    assert [frame.index for frame in decoder.frames_at([0.0, 0.05, 1.59])] == [0, 1, 39]
    decoder.close()
    decoder = opened(path, max_frames=2, num_frames=4)
    assert (decoder.expected, decoder.wanted) == (2, 4) and [frame.index for frame in decoder.frames()] == [0, 20]
    decoder.close()
    with pytest.raises(VideoError, match="lasts 1.60 s; give a start and an end within it"):
        opened(path, start=2.0)


def remux(source: Path, target: Path, keep) -> Path:
    """Copy the packets for which keep(number, packet) is true."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.size and keep(number, packet):
                packet.stream = stream
                new.mux(packet)
    return target


def test_a_film_cut_at_an_open_group_begins_with_what_can_be_decoded(encoded, tmp_path):
    start = int(np.flatnonzero(index_of(encoded("open.mp4")[0]).restarts)[1])
    path = remux(encoded("open.mp4")[0], tmp_path / "cut.mkv", lambda number, _: number >= start)
    frames, end = decode_all(path)
    decoder = opened(path, 60.0)
    compare(decoder, frames, end)
    assert decoder.selective
    decoder.close()


def ascending(frames) -> bool:
    pairs = zip(frames, frames[1:], strict=False)
    return all(later.time > earlier.time and later.index > earlier.index for earlier, later in pairs)


@pytest.mark.parametrize("name", ["open.mp4", "hevc.mp4", "no_b.mp4"])
def test_an_edit_list_cuts_frames_off(encoded, name):
    """The frames before the cut are decoded for those after it, but neither shown nor counted."""
    content = bytearray(encoded(name)[0].read_bytes())
    place = content.find(b"elst") + 12  # duration in milliseconds, first time in the media's time scale
    length, first = (int.from_bytes(content[at : at + 4], "big") for at in (place, place + 4))
    scale = content.find(b"mdhd") + 16
    frame = int.from_bytes(content[scale : scale + 4], "big") // 25
    content[place : place + 8] = (length - 600).to_bytes(4, "big") + (first + 7 * frame).to_bytes(4, "big")
    frames, end = decode_all(io.BytesIO(bytes(content)))
    assert len(frames) == 25
    for fps in (60.0, 3.0):
        decoder = opened(io.BytesIO(bytes(content)), fps)
        compare(decoder, frames, end)
        assert decoder.selective and not decoder.warnings
        decoder.close()


@pytest.mark.parametrize("name", ["b.mkv", "no_b.mp4", "vp9.webm"])
def test_missing_and_broken_packets_equal_decoding_everything(encoded, tmp_path, name):
    """Where the index turns out wrong, what has been given stays, and the rest is that of decoding everything."""
    suffix = Path(name).suffix
    gone = remux(encoded(name)[0], tmp_path / f"gone{suffix}", lambda number, _: number not in (14, 15, 16))
    content = bytearray(gone.read_bytes())
    with av.open(str(gone)) as container:
        place, size = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][20]
    content[place + 8 : place + size] = bytes(size - 8)
    decoder = opened(io.BytesIO(bytes(content)), 12.5)
    got = list(decoder.frames())
    assert len(got) >= 12 and ascending(got)
    again = list(decoder.frames())
    assert [frame.time for frame in again] == [frame.time for frame in got]
    decoder.close()


def test_nothing_decodable_says_why(encoded):
    content = bytearray(encoded("no_b.mp4")[0].read_bytes())
    start = content.find(b"mdat") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    content[start : start + length] = bytes(length)
    with pytest.raises(VideoError, match=r"no frame of .* can be decoded \(.+\); replace it or encode it again"):
        opened(io.BytesIO(bytes(content)))


def test_the_thread_ends_with_its_reader(encoded):
    before = threading.active_count()
    path = encoded("no_b.mp4")[0]
    decoder = opened(path, 25.0)
    frames = decoder.frames()
    next(frames)
    assert threading.active_count() == before + 1
    frames.close()
    assert threading.active_count() == before
    for _ in range(20):  # wherever in the file the thread is when it is stopped
        frames = decoder.frames()
        next(frames)
        frames.close()
    second = decoder.frames()
    assert next(second).index == 0 and decoder.selective
    third = decoder.frames()
    assert next(third).index == 0  # a new pass ends the one before
    with pytest.raises(VideoError, match="is being read again"):
        list(second)
    decoder.close()
    assert threading.active_count() == before
    dropped = opened(path, 25.0).frames()
    next(dropped)
    del dropped
    gc.collect()
    assert threading.active_count() == before


def test_few_frames_are_prefetched(encoded, monkeypatch):
    made = []
    paint = decode.FrameConverter.paint
    monkeypatch.setattr(decode.FrameConverter, "paint", lambda self, *rest: keep(made, paint(self, *rest)))
    decoder = opened(encoded("no_b.mp4")[0], 25.0)
    most = 0
    for count, frame in enumerate(decoder.frames(), 1):
        assert len(made) <= count + decode._AHEAD + 1
        del frame
        most = max(most, sum(reference() is not None for reference in made))
    decoder.close()
    assert count == 40 and most <= decode._AHEAD + 2


def keep(made, pixels):
    made.append(weakref.ref(pixels))
    return pixels


def test_interlaced_frames_are_used_with_a_warning(encoded):
    decoder = opened(encoded("interlaced.mp4")[0])
    assert len(list(decoder.frames())) == 4
    assert any("is interlaced" in warning for warning in decoder.warnings)
    decoder.close()


def test_truncated_and_damaged_files_never_hang(encoded):
    generator = np.random.default_rng(0)
    for name in ("b.mkv", "open.ts", "hevc.mp4", "vp9.webm", "mpeg4.mkv", "jpeg.avi"):
        content = encoded(name)[0].read_bytes()
        for _ in range(6):
            bitten = bytearray(content[: generator.integers(len(content) // 4, len(content))])
            for place in generator.integers(0, len(bitten), generator.integers(0, 40)):
                bitten[place] ^= 1 << generator.integers(8)
            try:
                decoder = opened(io.BytesIO(bytes(bitten)), 5.0)
            except VideoError:
                continue
            frames = list(decoder.frames())
            assert ascending(frames)
            assert all(tuple(frame.pixels.shape[1:]) == decoder.size for frame in frames)
            decoder.close()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_a_file_that_cannot_be_sampled_is_closed_right_away(encoded, tmp_path):
    """A data loader meets many such files between two garbage collections."""
    path = encoded("no_b.mp4")[0]
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    content[start : start + length] = bytes(length)
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(content)
    gc.collect()
    gc.disable()
    try:
        for source, options in ((path, {"start": 50.0}), (empty, {"end": 0.04})):
            with pytest.raises(VideoError):
                opened(source, **options)
            names = [os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()]
            assert str(source) not in names
    finally:
        gc.enable()
