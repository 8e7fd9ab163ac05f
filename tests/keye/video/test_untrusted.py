"""Files of strangers: formats that are not read, sizes that are refused before a pixel is decoded, names, covers."""

import io
import os
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from keye import SlowFastEncoder, VideoPlan
from keye.cli import main
from keye.errors import VideoError
from keye.video.clip import open_clip
from keye.video.decoding import containers
from keye.video.decoding import decoder as decode
from keye.video.images import MAX_PIXELS, load_image
from tests.keye.video.make import number_of, numbered, write_video
from tests.keye.video.test_fetch import server  # noqa: F401


def read(source, fps=2.0, **options):
    with open_clip(source, fps, 1000, **options) as clip:
        return clip, list(clip)


def test_formats_that_start_other_programs_are_refused(tmp_path):
    """PostScript is a program, which Pillow gives to Ghostscript to run."""
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(path, format="EPS")
    with Image.open(path) as opened:
        assert opened.format == "EPS"  # what makes this test worth something
    for source in (path, path.read_bytes(), path.open("rb")):
        with pytest.raises(VideoError, match="is not a readable image .no known format."):
            load_image(source)
        with pytest.raises(VideoError, match="no known format"):
            read([source])
    with pytest.raises(VideoError):
        read(path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "MPO", "GIF", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000"])
def test_the_usual_formats_are_read(tmp_path, form):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 40, 90)).save(file, format=form)
    pixels = load_image(file.getvalue()).float().mean((1, 2))
    assert np.abs(pixels.numpy() - (200, 40, 90)).max() < 6


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of this size whose pixels are not there: whoever decodes it finds damage."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"nothing") + chunk(b"IEND", b"")


def test_pictures_too_large_are_refused_by_their_header(tmp_path):
    content = png_claiming(8192, 8192)
    (tmp_path / "large.png").write_bytes(content)
    match = f"has 8192x8192 pixels, and at most {MAX_PIXELS:,} are allowed"
    for source in (content, tmp_path / "large.png"):
        with pytest.raises(VideoError, match=match):
            load_image(source)
        for clip in (source, [source]):
            with pytest.raises(VideoError, match=match):
                read(clip)
    with pytest.raises(VideoError, match=match):
        SlowFastEncoder().image(content)
    with pytest.raises(VideoError, match="not a readable image"):  # within the limit it is the damage that is found
        load_image(png_claiming(8000, 8000))


def test_too_large_videos_are_refused_before_decoding(tmp_path):
    path = tmp_path / "large.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2, options={"preset": "ultrafast", "bf": "0"})
        stream.width = stream.height = 6016
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame(6016, 6016, "yuv420p")
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for source in (path, path.read_bytes()):
        with pytest.raises(VideoError, match=r"has 6016x6016 pixels, and at most 36,000,000 are allowed"):
            read(source)


def test_pixels_that_are_not_square_count_as_they_are_shown(tmp_path, monkeypatch):
    path = tmp_path / "wide.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 4
        container.mux(stream.encode(av.VideoFrame(96, 64, "yuv420p")))
        container.mux(stream.encode(None))
    assert read(path)[0].size == (64, 384)
    monkeypatch.setattr(containers, "MAX_FRAME_PIXELS", 20_000)
    with pytest.raises(VideoError, match="has 384x64 pixels, and at most 20,000 are allowed"):
        read(path)


def test_frames_that_become_too_large_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MAX_FRAME_PIXELS", 8000)
    paths = [
        write_video(tmp_path / f"{size[0]}.webm", numbered(10, *size), codec="libvpx", rate=10)
        for size in ((64, 96), (96, 160))
    ]
    with av.open(str(tmp_path / "both.webm"), "w") as both:
        stream = None
        for part, path in enumerate(paths):
            with av.open(str(path)) as source:
                stream = stream or both.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts, packet.dts, packet.stream = packet.pts + 1000 * part, None, stream
                        both.mux(packet)
    clip, frames = read(tmp_path / "both.webm", 10.0)
    assert [number_of(frame.pixels) for frame in frames] == pytest.approx(range(10), abs=1)
    assert any("damaged pieces" in text for text in clip.warnings)


def test_few_large_frames_are_prefetched():
    assert decode.ahead_of((480, 640)) == 3 and decode.ahead_of((4320, 7680)) == 1


def sound(path: Path, cover: bool, film: bool = False) -> Path:
    """A second of sound with a cover picture, or a film with a cover picture before it."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, format="PNG")
    with av.open(str(path), "w", format="mp4") as container:
        audio = container.add_stream("aac", rate=8000)
        stream = container.add_stream("png" if cover else "libx264", rate=1)
        stream.width = stream.height = 64
        stream.pix_fmt = "rgb24" if cover else "yuv420p"
        if cover:
            stream.disposition = av.stream.Disposition.attached_pic
        moving = container.add_stream("libx264", rate=10) if film else None
        if film:
            moving.width, moving.height, moving.pix_fmt = 96, 64, "yuv420p"
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 8000
        container.start_encoding()
        packet = av.Packet(picture.getvalue())
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, 0, 0, True
        container.mux(packet)
        container.mux(audio.encode(samples))
        container.mux(audio.encode(None))
        if film:
            for index, pixels in enumerate(numbered(10)):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = index
                container.mux(moving.encode(frame))
            container.mux(moving.encode(None))
    return path


@pytest.mark.parametrize("suffix", [".m4a", ".mp4"])
def test_sound_with_a_cover_is_no_video(tmp_path, suffix):
    path = sound(tmp_path / f"song{suffix}", cover=True)
    with av.open(str(path)) as container:
        assert container.streams.video[0].disposition & av.stream.Disposition.attached_pic
    with pytest.raises(VideoError, match="is sound with a cover picture; give a file with a video in it"):
        read(path)


def test_a_cover_picture_is_not_taken_for_the_video(tmp_path):
    path = sound(tmp_path / "film.mp4", cover=True, film=True)
    with av.open(str(path)) as container:
        assert any(stream.disposition & av.stream.Disposition.attached_pic for stream in container.streams.video)
    _, frames = read(path, 10.0)
    assert [number_of(frame.pixels) for frame in frames] == list(range(10))


def test_names_that_are_not_utf8(tmp_path, capsys):
    """Linux names are bytes: whatever they are, the file is read, and what is written and printed is text."""
    folder = tmp_path / "shots"
    folder.mkdir()
    path = Path(str(tmp_path) + "/caf\udce9.mp4")
    write_video(tmp_path / "plain.mp4", numbered(10), rate=5).rename(path)
    for index, pixels in enumerate(numbered(3)):
        Image.fromarray(pixels).save(tmp_path / "a.png")
        (tmp_path / "a.png").rename(Path(str(folder) + f"/\udcff{index}.png"))
    encoder = SlowFastEncoder(max_tokens=1000)
    for source in (path, str(path)):
        plan = encoder.plan(source)
        plan.source.encode()
        assert plan.source.endswith("caf\\xe9.mp4") and VideoPlan.from_json(plan.to_json()) == plan
        plan.save(tmp_path / "plan.json")
        assert VideoPlan.load(tmp_path / "plan.json") == plan
    assert len(encoder.plan(folder)) == len(encoder.plan(sorted(folder.iterdir()))) == 3
    missing = str(tmp_path) + "/\udcff.mp4"
    for source in (missing, [missing]):
        with pytest.raises(VideoError, match=r"\\xff.mp4 does not exist") as caught:
            encoder.plan(source)
        str(caught.value).encode()
    Path(missing).write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"\\xff.mp4 is not a readable video") as caught:
        encoder.plan(missing)
    str(caught.value).encode()
    assert main(["encode", str(path), "--json", str(tmp_path / "plans"), "--workers", "1"]) == 0
    assert "caf" in capsys.readouterr().out.encode().decode()


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Four seconds at 10 frames per second."""
    return write_video(tmp_path_factory.mktemp("video") / "a b.mp4", numbered(40), rate=10)


# ffmpeg's ways to name another source in a file, all of which it follows by default.
PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n{0}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{0}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"'
    ' mediaPresentationDuration="PT4S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011">'
    '<Period><AdaptationSet mimeType="video/mp4">'
    '<Representation id="1" bandwidth="1"><BaseURL>{0}</BaseURL></Representation></AdaptationSet></Period></MPD>',
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", [".mp4", ".m3u8"])
def test_only_the_file_itself_is_opened(kind, suffix, tmp_path, video, server):  # noqa: F811
    segment = tmp_path / "segment.ts"
    segment.write_bytes(video.read_bytes())
    os.utime(segment, (0, 1))  # the next reading sets the time of the last one
    for place in (server.url("whole"), segment.name, str(segment), segment.as_uri()):
        path = tmp_path / f"list{suffix}"
        path.write_text(PLAYLISTS[kind].format(place))
        for source in (path, path.read_bytes(), path.open("rb")):
            with pytest.raises(VideoError, match="is a playlist, which contains no video; give the video itself"):
                read(source)
    assert not server.requests and segment.stat().st_atime == 0


def test_the_playlists_would_be_followed_without_the_guard(tmp_path, video):
    # Without the guard FFmpeg plays the other file, so the test above is meaningful.
    (tmp_path / "segment.mp4").write_bytes(video.read_bytes())
    (tmp_path / "list.mp4").write_text(PLAYLISTS["concat"].format("segment.mp4"))
    with av.open(str(tmp_path / "list.mp4")) as container:
        assert container.format.name == "concat" and next(container.decode(video=0)).width == 96


def test_names_that_ffmpeg_reads_as_protocols_and_patterns_are_names(tmp_path, video, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a|b.mp4", "subfile,,start,0,end,9,,:a.mp4", "pipe:0", "%03d.mp4", "-i", "a b?#%41.mp4"):
        Path(name).write_bytes(video.read_bytes())
        with open_clip(name, 1.0, 10) as opened:
            assert len(list(opened)) == len(list(opened)) == 4
