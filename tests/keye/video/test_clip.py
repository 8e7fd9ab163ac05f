import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from keye.errors import VideoError
from keye.video.clip import open_clip, read_frames_at
from scripts.clips import clip
from tests.keye.video.make import number_of, numbered, write_video


def read(source, fps=2.0, max_frames=1000, **options):
    with open_clip(source, fps, max_frames, **options) as opened:
        frames = list(opened)
    return opened, frames


def times(frames):
    return [round(frame.time, 3) for frame in frames]


def test_samples_are_the_frames_on_the_screen(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered(50), rate=25)
    opened, frames = read(path, fps=3)
    # 1/3 s is within frame 8 (0.32 to 0.36 s), and so on.
    assert [frame.index for frame in frames] == [0, 8, 16, 25, 33, 41]
    assert times(frames) == [0.0, 0.32, 0.64, 1.0, 1.32, 1.64]
    assert [number_of(frame.pixels) for frame in frames] == [0, 8, 16, 25, 33, 41]
    assert opened.size == (64, 96) and opened.duration == pytest.approx(2.0) and not opened.warnings
    assert frames[0].pixels.shape == (3, 64, 96) and frames[0].pixels.dtype == torch.uint8


def test_b_frames_come_in_presentation_order(tmp_path):
    path = write_video(tmp_path / "b.mp4", numbered(48), rate=24, options={"bf": "3", "g": "24", "b_strategy": "0"})
    _, frames = read(path, fps=24)
    assert [number_of(frame.pixels) for frame in frames] == list(range(48))
    assert times(frames)[:4] == [0.0, 0.042, 0.083, 0.125]


def test_a_variable_frame_rate_keeps_its_own_clock(tmp_path):
    clock = [0, 40, 80, 900, 1700, 1740, 1780, 3000]
    path = write_video(tmp_path / "c.mkv", numbered(8), rate=25, times_ms=clock)
    _, frames = read(path, fps=2)
    # At 0.5 s frame 2 (0.08) is still on the screen, at 1.0 and 1.5 frame 3, at 2.0 and 2.5 frame 6.
    assert [(frame.index, round(frame.time, 2)) for frame in frames][:4] == [(0, 0.0), (2, 0.08), (3, 0.9), (6, 1.78)]
    assert [number_of(frame.pixels) for frame in frames] == [frame.index for frame in frames]


def test_no_more_than_max_frames_evenly(tmp_path):
    path = write_video(tmp_path / "d.mp4", numbered(50), rate=25)
    opened, frames = read(path, fps=25, max_frames=5)
    assert times(frames) == [0.0, 0.4, 0.8, 1.2, 1.6] and (opened.expected, opened.wanted) == (5, 50)


def test_fps_is_at_most_the_clips_own(tmp_path):
    path = write_video(tmp_path / "e.mp4", numbered(6), rate=3)
    assert len(read(path, fps=30)[1]) == 6


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_tenth_of_a_second_has_a_frame(tmp_path, count):
    path = write_video(tmp_path / "f.mp4", numbered(count), rate=30)
    assert times(read(path)[1]) == [0.0]


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotation_metadata_is_applied(tmp_path, turn):
    pixels = np.zeros((5, 64, 96, 3), dtype=np.uint8)
    pixels[:, :32, :48] = 255  # the upper left quarter
    path = write_video(tmp_path / "g.mp4", pixels, rotation=turn)
    opened, frames = read(path)
    expected = np.rot90(pixels[0], turn // 90)  # counter-clockwise, as the display matrix counts
    assert opened.size == expected.shape[:2]
    assert np.abs(frames[0].pixels.permute(1, 2, 0).numpy().astype(int) - expected).mean() < 6


def test_odd_sizes(tmp_path):
    frames = [Image.fromarray(pixels) for pixels in numbered(4, 33, 51)]
    frames[0].save(tmp_path / "h.gif", save_all=True, append_images=frames[1:], duration=200, loop=0)
    opened, read_back = read(tmp_path / "h.gif", fps=5)
    assert opened.size == (33, 51) and len(read_back) == 4
    assert times(read_back) == [0.0, 0.2, 0.4, 0.6]


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".webm", "libvpx"), (".avi", "mpeg4"), (".mov", "mpeg4"), (".ts", "libx264")]
)
def test_containers(tmp_path, suffix, codec):
    path = write_video(tmp_path / f"i{suffix}", numbered(50), codec=codec, rate=25)
    _, frames = read(path, fps=5)
    assert len(frames) in (10, 11)
    assert [number_of(frame.pixels) for frame in frames][:10] == pytest.approx(range(0, 50, 5), abs=1)


def test_bytes_and_file_objects_are_the_same_clip(tmp_path):
    path = write_video(tmp_path / "j.mp4", numbered(30))
    expected = [frame.pixels for frame in read(path)[1]]

    class Pipe(io.RawIOBase):
        """Readable, not seekable."""

        def __init__(self, content):
            self.content = io.BytesIO(content)

        def readable(self):
            return True

        def read(self, size=-1):
            return self.content.read(size)

    for source in (
        path.read_bytes(),
        io.BytesIO(path.read_bytes()),
        open(path, "rb"),
        str(path),
        Pipe(path.read_bytes()),
    ):
        got = [frame.pixels for frame in read(source)[1]]
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_arrays_use_every_frame():
    pixels = torch.from_numpy(numbered(7)).permute(0, 3, 1, 2)
    opened, frames = read(pixels, fps=2)
    assert times(frames) == [0, 0.5, 1, 1.5, 2, 2.5, 3] and opened.duration == 3.5
    assert times(read(pixels.numpy(), fps=10, source_fps=10)[1]) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert times(read(pixels, timestamps=torch.arange(7) * 1.5)[1])[-1] == 9
    opened, frames = read(pixels, max_frames=3)
    assert [frame.index for frame in frames] == [0, 2, 4] and (opened.expected, opened.wanted) == (3, 7)


def test_a_folder_of_images_in_natural_order(tmp_path):
    for index, pixels in enumerate(numbered(12)):
        Image.fromarray(pixels).save(tmp_path / f"shot {index}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    opened, frames = read(tmp_path, fps=4)
    assert [number_of(frame.pixels) for frame in frames] == list(range(12))
    assert opened.size == (64, 96) and times(frames)[-1] == 2.75


def test_errors_name_the_file_and_the_remedy(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("this is no video\n" * 100)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    (tmp_path / "bare").mkdir()
    header = tmp_path / "header.mp4"
    header.write_bytes(write_video(tmp_path / "k.mp4", numbered(9)).read_bytes()[:200])
    for source, match in [
        (tmp_path / "none.mp4", "none.mp4 does not exist; check the path"),
        (text, "text.mp4 is not a readable video .*; replace it"),
        (empty, "empty.mp4 is not a readable video"),
        (header, "header.mp4"),
        (tmp_path / "bare", "bare contains no images"),
        (b"", "0 bytes is not a readable video"),
        (3, "the video is a int"),
        (torch.zeros(3, 4, 4, 4, dtype=torch.uint8), r"uint8 \[T, 3, H, W\].*not uint8 \[3, 4, 4, 4\]"),
        (torch.full((3, 3, 4, 4), 2.0), "floats from 2 to 2"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "T >= 1"),
    ]:
        with pytest.raises(VideoError, match=match) as caught:
            read(source)
        assert "\n" not in str(caught.value)


def test_an_unknown_codec_is_an_error(tmp_path):
    content = write_video(tmp_path / "o.mp4", numbered(3)).read_bytes()
    with pytest.raises(VideoError, match="has no decoder here"):
        read(content.replace(b"avc1", b"zzz1"))


def test_wrong_clocks_are_errors(tmp_path):
    pixels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(VideoError, match="3 frames but 2 timestamps"):
        read(pixels, timestamps=[0, 1])
    with pytest.raises(VideoError, match="do not ascend"):
        read(pixels, timestamps=[0, 2, 1])
    with pytest.raises(VideoError, match="its own clock"):
        read(write_video(tmp_path / "l.mp4", numbered(3)), source_fps=2)


def test_images_of_two_sizes_are_an_error(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "1.png")
    Image.new("RGB", (10, 10)).save(tmp_path / "2.png")
    with pytest.raises(VideoError, match="2.png has 10x10 pixels and the first 20x10"):
        read(tmp_path)


def test_a_truncated_file_gives_its_readable_frames_and_a_warning(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (100, 64, 96, 3)).astype(np.uint8)
    path = write_video(tmp_path / "m.mp4", noise, options={"g": "10"})
    container = _moov_first(path.read_bytes())
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(container[: len(container) * 6 // 10])
    opened, frames = read(torn)
    assert 3 <= len(frames) <= 6
    assert any("ends at" in text and "4.00 s" in text for text in opened.warnings)
    assert opened.duration < 3


def _moov_first(content: bytes) -> bytes:
    """The same mp4 with its index moved to the front, as for streaming: chunk offsets grow by the index's length."""
    boxes, at = {}, 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        boxes[content[at + 4 : at + 8]] = content[at : at + length]
        at += length
    moov = bytearray(boxes[b"moov"])
    table = moov.find(b"stco")
    for entry in range(int.from_bytes(moov[table + 8 : table + 12], "big")):
        place = table + 12 + 4 * entry
        moov[place : place + 4] = (int.from_bytes(moov[place : place + 4], "big") + len(moov)).to_bytes(4, "big")
    return boxes[b"ftyp"] + bytes(moov) + b"".join(box for name, box in boxes.items() if name not in (b"ftyp", b"moov"))


def test_damage_in_the_middle_is_survived(tmp_path):
    content = bytearray(clip("bikes.mp4").read_bytes())
    start = len(content) // 3
    content[start : start + 20_000] = os.urandom(20_000)
    opened, frames = read(bytes(content))
    assert len(frames) >= 15
    assert all(later.time > earlier.time for earlier, later in zip(frames, frames[1:], strict=False))


def test_read_frames_at(tmp_path):
    path = write_video(tmp_path / "n.mp4", numbered(50))
    assert [number_of(frame.pixels) for frame in read_frames_at(path, [0.0, 0.4, 1.96])] == [0, 10, 49]


def test_real_clip_times():
    opened, frames = read(clip("bikes.mp4"), fps=25)
    assert [frame.index for frame in frames] == list(range(250))
    assert times(frames)[-1] == 9.96 and opened.size == (272, 640)
