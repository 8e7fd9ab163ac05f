"""What packets say about frames, against a full decode and against streams whose structure is known."""

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keye.video.clip import open_clip
from keye.video.decoding.bitstream import CLEAN, NO, PictureType
from keye.video.decoding.packet_facts import PacketFacts, Pictures, packet_facts
from tests.keye.video.make import write_video

# file: (encoder, options)
ENCODINGS = {
    "plain.mp4": ("libx264", {"bf": "0", "g": "12"}),
    "bframes.mkv": ("libx264", {"bf": "3", "g": "16"}),
    "open.ts": ("libx264", {"bf": "2", "g": "14", "x264-params": "open-gop=1"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:pools=1:bframes=3:keyint=20"}),
    "hevc.ts": ("libx265", {"x265-params": "log-level=none:pools=1:keyint=20"}),
    "vp9.webm": ("libvpx-vp9", {"g": "16", "cpu-used": "8"}),
    "av1.mp4": ("libsvtav1", {"preset": "12", "g": "32", "svtav1-params": "lp=1"}),
    "av1.mkv": ("libsvtav1", {"preset": "12", "g": "32", "svtav1-params": "lp=1"}),
}


def moving(count: int) -> np.ndarray:
    """Frames [count, 64, 96, 3]: a texture that moves by two pixels a frame."""
    texture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(texture, 2 * index, 1) for index in range(count)])


def facts_of(path, fps: float = 2.0) -> tuple[PacketFacts, np.ndarray]:
    with open_clip(path, fps, 1000, lazy=True) as clip:
        return clip.packets()


@pytest.fixture(scope="module", params=ENCODINGS)
def coded(request, tmp_path_factory):
    codec, options = ENCODINGS[request.param]
    path = tmp_path_factory.mktemp("packets") / request.param
    return write_video(path, moving(48), codec=codec, options=options)


def test_facts_equal_those_of_a_full_decode(coded):
    with av.open(str(coded)) as container:
        start = container.start_time / 1e6 if container.format.name == "mpegts" else 0.0
        frames = [(frame.time - start, frame.key_frame) for frame in container.decode(video=0)]
    with av.open(str(coded)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        sizes = {packet.pts: packet.size for packet in packets}
    facts, chosen = facts_of(coded)
    assert facts.times == pytest.approx([time for time, _ in frames], abs=1e-6)
    assert facts.keys.tolist() == [key for _, key in frames] and 1 < facts.keys.sum() < len(frames)
    assert facts.sizes.tolist() == [sizes[pts] for pts in sorted(sizes)]
    assert 0.97 * sum(sizes.values()) < facts.coded.sum() <= sum(sizes.values())
    moments = np.arange(0, len(frames) / 25, 0.5)
    assert chosen.tolist() == [max(n for n, (time, _) in enumerate(frames) if time <= t + 1e-4) for t in moments]


def test_any_frames_that_are_kept_equal_those_of_a_full_decode(coded):
    with av.open(str(coded)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(fps=st.sampled_from([3.0, 8.0, 25.0]), draw=st.randoms(use_true_random=False))
    def check(fps, draw):
        with open_clip(coded, fps, 1000, lazy=True) as clip:
            _, sampled = clip.packets()
            places = sorted(draw.sample(range(len(sampled)), draw.randint(1, len(sampled))))
            clip.keep(places)
            kept = list(clip)
            assert [frame.index for frame in kept] == sampled[places].tolist()
            assert all(np.array_equal(frame.pixels.permute(1, 2, 0), frames[frame.index]) for frame in kept)

    check()


def test_distances_of_prediction(tmp_path):
    plain, _ = facts_of(write_video(tmp_path / "p.mp4", moving(24), options={"bf": "0"}))
    assert plain.spans.tolist() == [1] * 24 and not plain.between.any()
    options = {"bf": "2", "b_strategy": "0", "x264-params": "b-pyramid=none", "sc_threshold": "0"}
    reordered, _ = facts_of(write_video(tmp_path / "b.mp4", moving(25), options=options))
    assert reordered.spans[1:].tolist() == [1, 1, 3] * 8
    assert reordered.between[1:].tolist() == [True, True, False] * 8
    options = {"preset": "12", "svtav1-params": "lp=1:hierarchical-levels=4"}
    pyramid, _ = facts_of(write_video(tmp_path / "p.mp4", moving(49), codec="libsvtav1", options=options))
    assert pyramid.spans[1:17].tolist() == [1, 2, 1, 4, 1, 2, 1, 8, 1, 2, 1, 4, 1, 2, 1, 16]
    assert pyramid.between[1:17].tolist() == [True] * 15 + [False]
    assert (pyramid.coded >= 10).all()  # no frame that only repeats a picture remains


def displayed(*packets: tuple[int, PictureType]) -> list[list[int]]:
    pictures = Pictures()
    for number, (size, picture) in enumerate(packets):
        pictures.add(number, size, picture)
    return pictures.displayed().tolist()


def test_an_alternate_reference_belongs_to_the_frame_that_repeats_it():
    inter = PictureType(NO)
    found = displayed(
        (1000, PictureType(CLEAN)),
        (950, PictureType(NO, later=(900,))),
        (40, inter),
        (20, inter),  # its overlay
        (850, PictureType(NO, later=(800,))),
        (21, inter),
        (1100, PictureType(CLEAN)),
    )
    assert found == [[0, 1000], [3, 900], [1, 50], [2, 40], [3, 20], [5, 800], [4, 50], [5, 21], [6, 1100]]


def test_a_pyramid_is_displayed_depth_first():
    repeat = PictureType(NO, repeats=True)
    found = displayed(
        (500, PictureType(CLEAN)),
        (760, PictureType(NO, later=(400, 200, 100))),
        (3, repeat),
        (50, PictureType(NO)),
        (3, repeat),
    )
    assert found == [[0, 500], [1, 400], [4, 200], [2, 100], [1, 60], [3, 50]]


def test_filler_is_no_content():
    assert displayed((1000, PictureType(CLEAN, filler=700)), (990, PictureType(NO, filler=980))) == [[0, 300], [1, 10]]


def test_packets_that_display_nothing_have_no_frame():
    times, frames = np.array([0.0, 0.04]), np.array([0, 2])
    facts = packet_facts(times, frames, np.array([9, 8, 7]), np.array([True, False, False]), np.array([[0, 9], [1, 8]]))
    assert facts.coded.tolist() == [9, 0] and facts.sizes.tolist() == [9, 7]


@pytest.mark.parametrize("cut", [1, 7, 40, 200])
@pytest.mark.parametrize("name", ["vp9.webm", "av1.mp4"])
def test_damaged_headers_are_no_error(name, cut, tmp_path):
    from keye.video.decoding.bitstream import packet_reader

    codec, options = ENCODINGS[name]
    path = write_video(tmp_path / name, moving(20), codec=codec, options=options)
    draw = np.random.default_rng(cut)
    with av.open(str(path)) as container:
        reader = packet_reader(container.streams.video[0].codec_context)
        for packet in container.demux(video=0):
            if packet.size:
                data = bytearray(packet)[:cut]
                for place in draw.integers(0, len(data), 3):
                    data[place] = draw.integers(0, 256)
                reader(av.Packet(bytes(data)))
