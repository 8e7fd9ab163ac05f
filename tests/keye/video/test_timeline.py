"""Clocks of the world: joined recordings, gaps, clocks that begin late, frames that stay on the screen for long."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from keye import SlowFastEncoder
from keye.errors import VideoError
from keye.video.clip import open_clip
from keye.video.decoding.containers import open_container
from keye.video.decoding.decoder import Decoder
from keye.video.decoding.timeline import packets_of
from tests.keye.video.make import number_of, numbered, write_video

# What a transport stream is joined of: (suffix, codec, its options, pixel format, whether an index is to be had)
JOINABLE = {
    "h264": (".ts", "libx264", {"bf": "3", "g": "12"}, True),
    "open": (".ts", "libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=12:scenecut=0:b-adapt=0"}, True),
    "no_b": (".ts", "libx264", {"bf": "0", "g": "12"}, True),
    "hevc": (".ts", "libx265", {"preset": "ultrafast", "x265-params": "log-level=none:keyint=12:pools=1"}, True),
    "mpeg2": (".mpg", "mpeg2video", {"bf": "2", "g": "9"}, False),
    "interlaced": (".ts", "libx264", {"bf": "2", "x264-params": "tff=1"}, False),
}
RATE = 10


def read(source, fps=2.0, most=1000, **options):
    with open_clip(source, fps, most, **options) as clip:
        frames = list(clip)
    return clip, frames


def parts(folder: Path, kind: str, counts: list[int], first: int = 0) -> list[Path]:
    """One file for each count, each with a clock of its own from its beginning; frames are numbered throughout."""
    suffix, codec, options, _ = JOINABLE[kind]
    frames = numbered(first + sum(counts))
    written, done = [], first
    for index, count in enumerate(counts):
        path = folder / f"{kind}{index}{suffix}"
        written.append(write_video(path, frames[done : done + count], rate=RATE, codec=codec, options=options))
        done += count
    return written


def join(paths: list[Path]) -> Path:
    """The files one behind the other, as `cat` joins them."""
    path = paths[0].with_name("joined" + paths[0].suffix)
    path.write_bytes(b"".join(part.read_bytes() for part in paths))
    return path


def join_evenly(paths: list[Path]) -> Path:
    """Transport streams joined so that no packet seems to be lost: the counters of the packets run on."""
    counters: dict[int, int] = {}
    joined = bytearray()
    for path in paths:
        content = bytearray(path.read_bytes())
        for at in range(0, len(content), 188):
            pid = int.from_bytes(content[at + 1 : at + 3], "big") & 0x1FFF
            counters[pid] = (counters.get(pid, -1) + bool(content[at + 3] & 0x10)) % 16
            content[at + 3] = content[at + 3] & 0xF0 | counters[pid]
        joined += content
    path = paths[0].with_name("even.ts")
    path.write_bytes(joined)
    return path


def times_in_turn(paths: list[Path]) -> list[float]:
    """When each frame is shown, by PyAV's reading of each file alone, the files shown one after the other."""
    times: list[float] = []
    for path in paths:
        with av.open(str(path)) as container:
            own = [frame.time for frame in container.decode(video=0)]
        times += [time - own[0] + (times[-1] + 1 / RATE if times else 0.0) for time in own]
    return times


def decoded_numbers(path: Path) -> list[int]:
    """The numbers of all frames that a plain loop of PyAV decodes, in its order."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return [round((float(frame.mean()) - 8) / 3) for frame in frames]


@pytest.mark.parametrize("kind", JOINABLE)
def test_joined_recordings_are_read_to_their_end(tmp_path, kind):
    """Three recordings of 2, 3 and 1 s in one file: its container claims the length of one of them at most."""
    paths = parts(tmp_path, kind, [20, 30, 10])
    path = join(paths)
    everything = decoded_numbers(path)
    assert len(everything) == 60
    with open_clip(path, 100.0, 1000) as clip:
        frames, again = list(clip), list(clip)
    assert [number_of(frame.pixels) for frame in frames] == everything
    # FFmpeg guesses the times of most frames in program streams, and the last frame of a part two frames late.
    near = 0.21 if kind == "mpeg2" else 0.011
    assert [frame.time for frame in frames] == pytest.approx(times_in_turn(paths), abs=near)
    assert [(frame.index, frame.time) for frame in again] == [(frame.index, frame.time) for frame in frames]
    assert clip.duration == pytest.approx(6.0, abs=0.25)
    sampled = read(path, 2.0)[1]
    assert len(sampled) in (12, 13)
    late = 3 if kind == "mpeg2" else 1
    assert [number_of(frame.pixels) for frame in sampled][:12] == pytest.approx(range(0, 60, 5), abs=late)
    plan = SlowFastEncoder().plan(path)
    assert len(plan.frame_types) == len(sampled)
    assert any("clock" in text and "jumps 2 times, first at 2." in text for text in plan.warnings), plan.warnings


@pytest.mark.parametrize("kind", ["h264", "interlaced"])
def test_a_range_of_a_joined_recording_is_on_the_continuous_clock(tmp_path, kind):
    path = join(parts(tmp_path, kind, [20, 30, 10]))
    got = read(path, 5.0, start=1.5, end=3.0)[1]
    assert [number_of(frame.pixels) for frame in got] == pytest.approx([15, 17, 19, 21, 23, 25, 27, 29], abs=1)
    assert [frame.time for frame in got] == pytest.approx([1.5 + step / 5 for step in range(8)], abs=0.11)
    assert number_of(read(path, start=5.5)[1][0].pixels) == pytest.approx(55, abs=1)
    with pytest.raises(VideoError, match=r"give a start and an end within"):
        read(path, start=7.0)


def test_a_clock_that_jumps_ahead_is_closed_up(tmp_path):
    """A stream that was cut out in the middle: 40 s of its clock are missing, none of its frames."""
    paths = parts(tmp_path, "h264", [20, 20])
    with av.open(str(tmp_path / "gap.ts"), "w") as target:
        stream = None
        for place, path in enumerate(paths):
            with av.open(str(path)) as source:
                stream = stream or target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + place * 42 * 90_000, packet.dts + place * 42 * 90_000
                        packet.stream = stream
                        target.mux(packet)
    clip, frames = read(tmp_path / "gap.ts", 5.0)
    assert [number_of(frame.pixels) for frame in frames] == list(range(0, 40, 2))
    assert [frame.time for frame in frames] == pytest.approx([step / 5 for step in range(20)], abs=1e-3)
    assert clip.duration == pytest.approx(4.0, abs=0.01)
    assert any("jumps once, at 2.00 s" in text for text in clip.warnings)


def test_a_long_frame_in_another_container_is_no_jump(tmp_path):
    """A slide that is shown for a minute: Matroska's clock is to be believed."""
    path = write_video(tmp_path / "slides.mkv", numbered(4), times_ms=[0, 1000, 61_000, 62_000])
    clip, frames = read(path, 1.0)
    assert [round(frame.time) for frame in frames] == [0, 1, 61, 62] and not clip.warnings


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
@pytest.mark.parametrize("most", [1000, 3])
def test_sampling_follows_time_not_the_average_rate(tmp_path, suffix, most):
    clock = [0, 10_000, 10_500, 11_000, 11_500, 12_000, 30_000]
    path = write_video(tmp_path / f"slides{suffix}", numbered(7), times_ms=clock)
    clip, frames = read(path, 2.0, most)
    if most == 1000:
        assert [frame.time for frame in frames] == pytest.approx([time / 1000 for time in clock], abs=1e-3)
        assert [number_of(frame.pixels) for frame in frames] == list(range(7))
        assert (clip.wanted, clip.expected) == (7, 7)
    else:
        assert clip.wanted == 7 and 1 <= len(frames) <= clip.expected <= 3


def test_bursts_between_long_pauses_are_sampled_at_the_requested_rate(tmp_path):
    """A screen recording: nothing for seconds, then 25 frames a second, against a loop over the moments."""
    generator = np.random.default_rng(3)
    clock = np.cumsum(generator.choice([40, 40, 40, 40, 5000], 60)).tolist()
    clock = [time - clock[0] for time in clock]
    for name in ("screen.mkv", "screen.ts"):
        path = write_video(tmp_path / name, numbered(60), times_ms=clock, options={"bf": "2"})
        for fps in (0.5, 2.0, 8.0, 25.0):
            clip, frames = read(path, fps)
            shown, moment = [], 0.0
            while moment < clip.duration:
                at = max(index for index, time in enumerate(clock) if time / 1000 <= moment + 1e-3)
                shown += [at] if at not in shown else []
                moment = round(moment * fps + 1) / fps
            assert [frame.index for frame in frames] == [number_of(frame.pixels) for frame in frames] == shown
            assert clip.wanted == clip.expected == len(shown)


def test_a_rate_above_the_clips_own_gives_every_frame_once(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered(50))
    for fps in (25.0, 30.0, 1000.0):
        clip, frames = read(path, fps)
        assert [frame.index for frame in frames] == list(range(50)) and (clip.wanted, clip.expected) == (50, 50)
    assert (read(path, 1000.0, 5)[0].wanted, read(path, num_frames=400)[0].wanted) == (50, 50)


def delayed(folder: Path, suffix: str, seconds: float) -> Path:
    """A clip of 2 s with numbered frames whose pictures begin `seconds` after its sound."""
    path = folder / f"late{suffix}"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        stream = container.add_stream("libx264", rate=RATE, options={"bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        silence = np.zeros((1, 1024), np.float32)
        for index in range(int((2 + seconds) * 8000 / 1024)):
            samples = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = 8000, index * 1024, Fraction(1, 8000)
            container.mux(sound.encode(samples))
        container.mux(sound.encode(None))
        for index, pixels in enumerate(numbered(20)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(1000 * (seconds + index / RATE)), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts"])
def test_times_are_the_containers(tmp_path, suffix):
    """As PyAV reads them; in a transport stream, whose clock begins anywhere, from the beginning of the file."""
    path = delayed(tmp_path, suffix, 1.5)
    with av.open(str(path)) as container:
        start = container.start_time / 1e6 if suffix == ".ts" else 0.0
        expected = [frame.time - start for frame in container.decode(video=0)]
    assert expected[0] == pytest.approx(1.5, abs=0.2) and len(expected) == 20
    clip, frames = read(path, 100.0)
    assert [frame.time for frame in frames] == pytest.approx(expected, abs=1e-4)
    assert clip.duration == pytest.approx(expected[-1] + 1 / RATE, abs=0.01)
    sampled = read(path, 2.0)[1]  # from the first frame on, every half second
    assert [number_of(frame.pixels) for frame in sampled] == [0, 5, 10, 15]
    ranged = read(path, 10.0, start=expected[4], end=expected[8])[1]
    assert [number_of(frame.pixels) for frame in ranged] == [4, 5, 6, 7]
    assert number_of(read(path, start=0.0)[1][0].pixels) == 0  # nothing is shown before the first frame
    with pytest.raises(VideoError, match="begins at 1"):
        read(path, start=0.0, end=1.0)
    plan = SlowFastEncoder().plan(path)
    assert plan.timestamps.tolist() == pytest.approx([frame.time for frame in sampled], abs=1e-4)
    assert plan.span == pytest.approx((expected[0], clip.duration), abs=0.01)


@pytest.mark.parametrize("kind", ["h264", "open", "no_b", "hevc"])
@pytest.mark.parametrize("index", [True, False])
def test_an_index_and_decoding_everything_have_one_clock(tmp_path, kind, index, monkeypatch):
    """Joined so that the container sees no damage, the packets tell what to decode, whichever part they are of."""
    path = join_evenly(parts(tmp_path, kind, [20, 30, 10]))
    if not index:
        monkeypatch.setattr("keye.video.decoding.decoder.read_index", lambda *rest: None)
    for fps, step in ((100.0, 1), (2.0, 5), (1 / 2.4, 24)):
        decoder = Decoder(open_container(path, "clip"), "clip", fps, 1000)
        for _ in range(2):
            got = list(decoder.frames())
            assert [number_of(frame.pixels) for frame in got] == list(range(0, 60, step))
            assert [frame.time for frame in got] == pytest.approx([n / RATE for n in range(0, 60, step)], abs=1e-3)
        assert decoder.selective == index and decoder.duration == pytest.approx(6.0, abs=1e-3)
        decoder.close()


def test_packets_of_streams_that_appear_later_are_skipped():
    class Stumbling:
        """Reads on behind a packet that PyAV does not know the stream of, as a container does."""

        left = iter([1, 2, None, 3, None, 4])

        def demux(self, stream):
            for packet in self.left:
                if packet is None:
                    raise IndexError("list index out of range")
                yield packet

    assert list(packets_of(Stumbling(), None)) == [1, 2, 3, 4]
