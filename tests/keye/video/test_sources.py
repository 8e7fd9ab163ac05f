"""Every kind of source gives the same frames, on the same clock, as often as it is read; and opens nothing else."""

import base64
import io

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from keye.errors import VideoError
from keye.video.clip import open_clip, read_frames_at
from keye.video.fetch import UrlRules
from keye.video.images import load_image
from tests.keye.video.make import number_of, numbered, write_video
from tests.keye.video.test_fetch import server  # noqa: F401

PIXELS = numbered(8, 48, 64)


def read(source, fps=2.0, max_frames=1000, **options):
    with open_clip(source, fps, max_frames, **options) as opened:
        frames = list(opened)
    return opened, frames


def numbers(source, fps=2.0, max_frames=1000, **options):
    return [number_of(frame.pixels) for frame in read(source, fps, max_frames, **options)[1]]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Four seconds at 10 frames per second."""
    return write_video(tmp_path_factory.mktemp("video") / "a b.mp4", numbered(40), rate=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shots")
    for index, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(path / f"{index + 3}.png")
    return path


def _tensor():
    return torch.from_numpy(PIXELS).permute(0, 3, 1, 2)


# How to give the same eight frames, each a function of a folder of them.
STILLS = {
    "folder": lambda folder: folder,
    "folder_url": lambda folder: folder.as_uri(),
    "tensor": lambda folder: _tensor(),
    "tensor_last": lambda folder: torch.from_numpy(PIXELS),
    "array": lambda folder: PIXELS.transpose(0, 3, 1, 2),
    "array_last": lambda folder: PIXELS,
    "array_backwards": lambda folder: PIXELS[::-1].copy()[::-1],
    "paths": lambda folder: [str(folder / f"{index + 3}.png") for index in range(8)],
    "tuple_of_pathlib": lambda folder: tuple(folder / f"{index + 3}.png" for index in range(8)),
    "pil": lambda folder: [Image.fromarray(pixels) for pixels in PIXELS],
    "tensors": lambda folder: list(_tensor()),
    "arrays": lambda folder: list(PIXELS),
    "contents": lambda folder: [(folder / f"{index + 3}.png").read_bytes() for index in range(8)],
    "data_urls": lambda folder: [
        "data:image/png;base64," + base64.b64encode((folder / f"{index + 3}.png").read_bytes()).decode()
        for index in range(8)
    ],
    "mixed": lambda folder: [PIXELS[0], _tensor()[1], Image.fromarray(PIXELS[2]), folder / "6.png", *PIXELS[4:]],
    "iterator": lambda folder: (Image.fromarray(pixels) for pixels in PIXELS),
    "map": lambda folder: map(torch.from_numpy, PIXELS),
}


@pytest.mark.parametrize("kind", STILLS)
def test_frames_without_a_clock(kind, folder):
    with open_clip(STILLS[kind](folder), 4.0, 100) as opened:
        first, second = list(opened), list(opened)
    assert [frame.time for frame in first] == [index / 4 for index in range(8)]
    assert [number_of(frame.pixels) for frame in first] == list(range(8))
    assert [frame.index for frame in second] == [frame.index for frame in first] == list(range(8))
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(first, second, strict=True))
    assert first[0].pixels.shape == (3, 48, 64) and first[0].pixels.dtype == torch.uint8
    assert (opened.size, opened.duration, opened.expected, opened.wanted) == ((48, 64), 2.0, 8, 8)


@pytest.mark.parametrize("kind", ["folder", "array", "paths", "iterator"])
def test_ranges_and_counts_of_frames_without_a_clock(kind, folder):
    def source():
        return STILLS[kind](folder)

    assert numbers(source(), fps=4, source_fps=4, start=0.5, end=1.5) == [2, 3, 4, 5]  # 0.5, 0.75, 1, 1.25 s
    assert numbers(source(), fps=4, source_fps=4, start=0.6) == [2, 3, 4, 5, 6, 7]  # frame 2 is on the screen at 0.6 s
    assert numbers(source(), fps=4, source_fps=4, end=0.5) == [0, 1]
    assert numbers(source(), source_fps=4, num_frames=4) == [0, 2, 4, 6]
    assert numbers(source(), source_fps=4, num_frames=3, start=0.5) == [2, 4, 6]
    assert numbers(source(), num_frames=100) == list(range(8))
    assert numbers(source(), max_frames=3) == [0, 2, 5]
    assert numbers(source(), num_frames=6, max_frames=2) == [0, 4]
    clock = [0, 1, 5, 6, 7, 8, 9, 20]
    assert numbers(source(), timestamps=clock, start=4, end=8) == [1, 2, 3, 4]  # frame 1 stays until 5 s
    assert numbers(source(), timestamps=torch.tensor(clock), start=20) == [7]


def _contents(path):
    return path.read_bytes()


class Stream(io.RawIOBase):
    """Readable, not seekable, in small pieces."""

    def __init__(self, content):
        self.content = io.BytesIO(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.content.readinto(memoryview(buffer)[:1000])


VIDEOS = {
    "path": lambda path: path,
    "string": str,
    "url": lambda path: path.as_uri(),
    "bytes": _contents,
    "bytearray": lambda path: bytearray(_contents(path)),
    "memoryview": lambda path: memoryview(_contents(path)),
    "data_url": lambda path: "data:video/mp4;base64," + base64.b64encode(_contents(path)).decode(),
    "file": lambda path: open(path, "rb"),
    "memory": lambda path: io.BytesIO(_contents(path)),
    "stream": lambda path: Stream(_contents(path)),
}


@pytest.mark.parametrize("kind", VIDEOS)
def test_videos_of_every_kind_in_two_passes(kind, video):
    source = VIDEOS[kind](video)
    with open_clip(source, 2.0, 100) as opened:
        first, second = list(opened), list(opened)
        assert opened.duration == pytest.approx(4.0) and opened.size == (64, 96) and not opened.warnings
    assert [round(frame.time, 3) for frame in first] == [index / 2 for index in range(8)]
    assert [number_of(frame.pixels) for frame in first] == list(range(0, 40, 5))
    assert [(frame.index, frame.time) for frame in first] == [(frame.index, frame.time) for frame in second]
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(first, second, strict=True))
    if kind in ("file", "memory"):  # they are the caller's, and are read from their beginning again
        assert numbers(source, 1.0) == [0, 10, 20, 30] and not source.closed
        source.close()


def test_a_pass_can_be_stopped_and_started_again(video):
    with open_clip(video, 2.0, 100) as opened:
        left = [number_of(frame.pixels) for frame, _ in zip(opened, range(3), strict=False)]
        assert left == [0, 5, 10]
        assert [number_of(frame.pixels) for frame in opened] == list(range(0, 40, 5))


def test_ranges_and_counts_of_videos(video):
    assert numbers(video, 2.0, start=1.0, end=3.0) == [10, 15, 20, 25]
    assert numbers(video, 2.0, start=1.27) == [12, 17, 22, 27, 32, 37]
    assert numbers(video, 2.0, end=0.05) == [0]
    assert numbers(video, num_frames=4) == [0, 10, 20, 30]
    assert numbers(video, num_frames=4, start=2, end=4) == [20, 25, 30, 35]
    assert numbers(video, num_frames=8, max_frames=2) == [0, 20]
    assert numbers(video, end=1000) == list(range(0, 40, 5))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"start": 2, "end": 1}, "start=2 is not before end=1"),
        ({"start": 2, "end": 2}, "not before"),
        ({"end": 0}, "start=0 is not before end=0"),
        ({"start": 40}, "lasts 4.00 s; give a start"),
        ({"start": -1}, "start is -1; give seconds from the beginning"),
        ({"end": float("nan")}, "end is nan"),
        ({"start": float("inf")}, "start is inf"),
        ({"num_frames": 0}, "num_frames is 0; give a whole number of 1 or more"),
        ({"num_frames": 2.5}, "num_frames is 2.5"),
        ({"max_frames": 0}, "max_frames is 0"),
        ({"fps": 0}, "fps is 0; give a rate above 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"source_fps": -1}, "source_fps is -1"),
    ],
)
def test_impossible_requests_are_errors(options, match, video, folder):
    for source in (video, folder):
        with pytest.raises(VideoError, match=match):
            read(source, **{"fps": 2.0, "source_fps": None if source is video else 2, **options})


@pytest.mark.parametrize(("suffix", "options"), [(".gif", {}), (".webp", {"lossless": True}), (".png", {})])
def test_animations_keep_their_delays(tmp_path, suffix, options):
    path = tmp_path / f"moving{suffix}"
    delays = [100, 300, 100, 500]
    frames = [Image.fromarray(pixels) for pixels in PIXELS[:4]]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=delays, **options)
    for source in (path, path.read_bytes(), path.open("rb"), Image.open(path)):
        with open_clip(source, 100.0, 100) as opened:
            shown = [(round(frame.time, 3), number_of(frame.pixels)) for frame in opened]
            assert (
                shown
                == [(0.0, 0), (0.1, 1), (0.4, 2), (0.5, 3)]
                == [(round(frame.time, 3), number_of(frame.pixels)) for frame in opened]
            )
            assert (opened.size, opened.expected) == ((48, 64), 4) and opened.duration == pytest.approx(1.0)
    # At 0, 0.5 s; and from 0.35 s (where frame 1 is still on the screen), 0.85 s.
    assert numbers(path, 2.0) == [0, 3] and numbers(path, 2.0, start=0.35) == [1, 3]
    assert numbers(path, num_frames=10) == [0, 1, 2, 3]  # ten times, four frames: none twice
    with pytest.raises(VideoError, match="has its own clock"):
        read(path, source_fps=2)


def test_a_damaged_animation_gives_its_readable_frames(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (9, 40, 40, 3)).astype(np.uint8)
    frames = [Image.fromarray(pixels) for pixels in noise]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    content = (tmp_path / "a.gif").read_bytes()
    opened, read_back = read(content[: len(content) // 2], 10.0)
    assert 3 <= len(read_back) <= 5 and opened.duration == pytest.approx(len(read_back) / 10)


@given(
    delays=st.lists(st.integers(2, 40), min_size=2, max_size=12),  # hundredths of a second, as GIF has them
    fps=st.sampled_from([0.7, 2.0, 3.0, 8.0, 100.0]),
    most=st.integers(1, 14),
    span=st.tuples(st.floats(0, 0.9), st.floats(0.05, 1.2)),
    count=st.none() | st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_animations_are_sampled_by_definition(delays, fps, most, span, count):
    frames = [Image.fromarray(pixels) for pixels in numbered(len(delays), 4, 4)]
    file = io.BytesIO()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:], duration=[10 * delay for delay in delays])
    starts = np.cumsum([0, *delays])
    start, end = span[0] * starts[-1] / 100, (span[0] + span[1]) * starts[-1] / 100
    opened, read_back = read(file, fps, most, start=start, end=end, num_frames=count)
    length = min(end, starts[-1] / 100) - start
    rate = min(fps, 100 / min(delays))

    def shown(times):
        return sorted({int(np.searchsorted(starts[:-1] / 100, time + 1e-4, side="right")) - 1 for time in times})

    if count is None:
        expected = shown(start + i / rate for i in range(max(1, int(np.ceil(length * rate - 1e-4)))))
    else:
        expected = shown(start + i * length / count for i in range(count))
    wanted = len(expected)
    if wanted > most:
        expected = shown(start + i * length / most for i in range(most))
    assert [number_of(frame.pixels) for frame in read_back] == [frame.index for frame in read_back] == expected
    assert (opened.wanted, opened.expected) == (wanted, len(expected)) and len(expected) <= most


@pytest.mark.parametrize(("delay", "lasts"), [(0, 0.1), (10, 0.1), (20, 0.02)])
def test_very_short_delays(tmp_path, delay, lasts):
    frames = [Image.fromarray(pixels) for pixels in PIXELS[:3]]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=delay)
    assert read(tmp_path / "a.gif")[0].duration == pytest.approx(3 * lasts)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tiff", ".gif", ".ppm", ".avif"])
def test_a_still_is_a_clip_of_one_frame(tmp_path, suffix):
    path = tmp_path / f"still{suffix}"
    Image.fromarray(PIXELS[5]).save(path)
    for source in (path, path.read_bytes(), path.open("rb"), [path], Image.open(path)):
        opened, frames = read(source, 4.0)
        assert [number_of(frame.pixels) for frame in frames] == [5] and frames[0].time == 0.0
        assert (opened.size, opened.duration, opened.expected) == ((48, 64), 0.25, 1)
    for values in (PIXELS[5], _tensor()[5], PIXELS[5, :, :, 0]):
        assert numbers(values) == [5]


def test_greyscale_alpha_depth_and_rotation_are_the_same_everywhere(tmp_path):
    grey = Image.fromarray(PIXELS[6, :, :, 0])
    assert numbers([grey, grey.convert("LA"), PIXELS[6, :, :, 0]]) == [6, 6, 6]
    deep = Image.fromarray(PIXELS[6, :, :, 0].astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    assert numbers(tmp_path / "deep.png") == [6]
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    for mode, image in (("png", clear), ("webp", clear)):
        image.save(tmp_path / f"clear.{mode}", lossless=True)
        assert read(tmp_path / f"clear.{mode}")[1][0].pixels.unique().tolist() == [255]
    clear.save(tmp_path / "moving.webp", save_all=True, append_images=[half], duration=100, lossless=True)
    frames = read(tmp_path / "moving.webp", 10.0)[1]
    assert frames[0].pixels.unique().tolist() == [255]
    red, green, _ = frames[1].pixels[:, 4, 4].tolist()
    assert red == 255 and 126 <= green <= 128  # half of white shows through
    corner = np.zeros((20, 30, 3), np.uint8)
    corner[:10, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show it
    Image.fromarray(corner).save(tmp_path / "turned.png", exif=exif)
    opened, (frame,) = read([tmp_path / "turned.png"])
    assert opened.size == (30, 20) and torch.equal(
        frame.pixels.permute(1, 2, 0), torch.from_numpy(np.rot90(corner, -1).copy())
    )


def test_pictures_of_two_sizes_name_the_one_at_fault(tmp_path):
    Image.new("RGB", (10, 20)).save(tmp_path / "odd.png")
    for source, match in [
        ([PIXELS[0], tmp_path / "odd.png"], "odd.png has 10x20 pixels and the first 64x48; give images of one size"),
        ([PIXELS[0], PIXELS[0, :40]], "frame 1 of a list of 2 pictures has 64x40 pixels and the first 64x48"),
        (iter([PIXELS[0], PIXELS[0, :40]]), "frame 1 of an iterator of pictures has 64x40"),
    ]:
        with pytest.raises(VideoError, match=match):
            read(source)


def test_errors_name_bad_pictures_and_values(tmp_path, folder):
    (tmp_path / "torn.png").write_bytes((folder / "3.png").read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("no picture")
    for source, match in [
        (tmp_path / "torn.png", "torn.png is not a readable image .*; replace it or convert it to png"),
        ([tmp_path / "text.jpg"], "text.jpg is not a readable image .no known format."),
        ([tmp_path / "gone.png"], "gone.png does not exist"),
        ([PIXELS[0], PIXELS[0].astype(float) + 8], r"frame 1 of a list.*has floats from 16 to 16, .* values.round"),
        ([PIXELS[0], 7], "frame 1 of a list of 2 pictures: the image is a int"),
        ([], "a list of 0 pictures has no picture"),
        (iter(()), "an iterator of pictures has no picture"),
        ({"video": "a.mp4"}, "the video is a dict; give a path"),
        (np.zeros((2, 4, 4, 4), np.uint8), r"not uint8 \[2, 4, 4, 4\]"),
        (np.full((2, 3, 4, 4), -7.0), "floats from -7 to -7"),
        (io.StringIO("text"), "is open in text mode; open it in binary mode"),
        ("x" * 5000, "cannot be read|does not exist"),
        ("a\0b.mp4", "cannot be read|does not exist"),
        ("https://example.com/a.mp4", "https://example.com/a.mp4 is a URL, and downloads are off by default"),
        (["https://example.com/a.png"], "example.com/a.png is a URL"),
        ("rtsp://example.com/a", "is not an http or https URL"),
        ("concat:a.mp4|b.mp4", "does not exist"),
        ("/dev/zero", "is not a regular file"),
    ]:
        with pytest.raises(VideoError, match=match) as caught:
            read(source)
        assert "\n" not in str(caught.value)


def test_frames_at_given_times_of_every_kind(video, folder, tmp_path):
    frames = [Image.fromarray(pixels) for pixels in PIXELS]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=200)
    for source, times, expected in [
        (video, [0.05, 1.0, 3.95], [0, 10, 39]),
        (tmp_path / "a.gif", [0.1, 0.5, 0.55, 1.5], [0, 2, 7]),
        (folder, [0.0, 2.5], [0, 2]),  # at one frame per second
    ]:
        assert [number_of(frame.pixels) for frame in read_frames_at(source, times)] == expected


def test_urls_are_downloaded_with_rules(server, video, monkeypatch):  # noqa: F811
    monkeypatch.setattr("tests.keye.video.test_fetch.BODY", video.read_bytes())
    rules = UrlRules(allow_private=True)
    opened, frames = read(server.url("whole?token=secret"), urls=rules)
    assert len(frames) == 8 and opened.name == server.url("whole")
    (frame,) = read_frames_at(server.url("whole"), [1.0], urls=rules)
    assert number_of(frame.pixels) == 10
    still = io.BytesIO()
    Image.fromarray(PIXELS[5]).save(still, "png")
    monkeypatch.setattr("tests.keye.video.test_fetch.BODY", still.getvalue())
    assert numbers([server.url("whole")] * 2, urls=rules) == [5, 5]
    assert number_of(load_image(server.url("whole"), urls=rules)) == 5


def test_a_title_in_an_unknown_encoding_is_accepted(video, tmp_path):
    path = tmp_path / "titled.mkv"
    with av.open(str(video)) as source, av.open(str(path), "w") as container:
        container.metadata["title"] = "a film by Bjork"
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    path.write_bytes(path.read_bytes().replace(b"Bjork", b"Bj\xf6rk"))
    assert numbers(path) == list(range(0, 40, 5))
