"""Measure `packets`: cuts without decoding, what is no cut, files without such information, and plans against calls."""

from dataclasses import dataclass, replace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from keye import SlowFastEncoder
from keye.encoded import encode_patches
from keye.encoder_config import EncoderConfig
from keye.slowfast.measures.packets import Packets
from keye.slowfast.policies import FAST, SLOW, Decisions, Policy
from keye.video import clip as clips
from keye.video.decoding.packet_facts import PacketFacts
from keye.video.decoding.picture import FrameConverter
from keye.world.render import write_mp4
from tests.keye.video.make import write_video

RATE, SECONDS, CUT = 25, 8, 4.0
ENCODINGS = {
    "scene cuts.mp4": ("libx264", {"bf": "2"}),
    "fixed.mp4": ("libx264", {"bf": "0", "g": "30", "sc_threshold": "0"}),
    "open.mkv": ("libx264", {"bf": "3", "g": "30", "x264-params": "open-gop=1"}),
    "rate.ts": ("libx264", {"b": "30k", "maxrate": "40k", "bufsize": "40k", "g": "40"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:pools=1:keyint=45"}),
    "vp9.webm": ("libvpx-vp9", {"g": "45", "cpu-used": "8"}),
}


def scenery(seed: int) -> np.ndarray:
    """A texture [96, 140, 3] of soft blobs."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((140, 96), Image.Resampling.BICUBIC))


def drawn(cut: float | None = CUT, rate: int = RATE) -> np.ndarray:
    """Frames [T, 96, 140, 3]: a small square that moves over a still scene, which changes at `cut` seconds."""
    scenes, frames = (scenery(0), scenery(1)), []
    for index in range(SECONDS * rate):
        picture = scenes[cut is not None and index >= cut * rate].copy()
        left = 20 + abs(80 - index % 160)  # to and fro
        picture[40:52, left : left + 12] = (240, 20, 20)
        frames.append(picture)
    return np.stack(frames)


def encoder(**settings) -> SlowFastEncoder:
    return SlowFastEncoder(measure="packets", **settings)


def slow_times(plan) -> list[float]:
    return plan.timestamps[plan.frame_types == SLOW].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packets")


@pytest.fixture(scope="module")
def coded(folder):
    kept = {}

    def get(name: str, cut: float | None = CUT):
        if (name, cut) not in kept:
            codec, options = ENCODINGS[name]
            path = folder / f"{'static' if cut is None else 'cut'} {name}"
            kept[name, cut] = write_video(path, drawn(cut), codec=codec, options=options)
        return kept[name, cut]

    return get


@pytest.fixture
def contexts(monkeypatch):
    """The decoders of all opened files; a decoder is opened with the first packet that it decodes."""
    found, plain = [], clips.open_container

    def opened(*args):
        container = plain(*args)
        found.append(container.streams.video[0].codec_context)
        return container

    monkeypatch.setattr(clips, "open_container", opened)
    return found


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_cut_is_found_and_nothing_else(coded, name):
    plan = encoder().plan(coded(name))
    assert plan.warnings == () and len(plan) == 2 * SECONDS
    first, *others = slow_times(plan)
    assert first == pytest.approx(0, abs=0.01)
    assert others and all(CUT - 0.01 <= time <= CUT + 0.75 for time in others), others


@pytest.mark.parametrize("name", sorted({*ENCODINGS} - {"rate.ts"}))  # spare bits refine a still picture
def test_periodic_key_frames_of_a_static_clip_are_no_cuts(coded, name):
    assert len(slow_times(encoder().plan(coded(name, None)))) == 1


def test_key_frames_that_are_forced_are_no_cuts(folder):
    """As for streaming: a key frame every second, and others at cuts in between."""
    path = folder / "forced.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"g": "250", "forced-idr": "1"})
        stream.width, stream.height, stream.pix_fmt = 140, 96, "yuv420p"
        for index, pixels in enumerate(drawn(3.4)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if index % RATE == 0:
                frame.pict_type = av.video.frame.PictureType.I
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert slow_times(encoder().plan(path)) == pytest.approx([0.0, 3.48])


def test_filler_of_a_constant_bit_rate_hides_nothing(folder):
    path = folder / "filler.mp4"
    write_mp4(path, drawn(rate=10), 10, uniform=True)
    with av.open(str(path)) as container:
        assert len({packet.size for packet in container.demux(video=0) if packet.size}) == 1
    assert slow_times(encoder(policy="adaptive_budget:share=0.13").plan(path)) == [0.0, CUT]


@pytest.mark.parametrize("name", ENCODINGS)
def test_planning_decodes_nothing_and_equals_the_plan_of_a_call(coded, contexts, name):
    plan = encoder().plan(coded(name))
    assert [context.is_open for context in contexts] == [False]
    video = encoder()(coded(name), dtype=torch.uint8)
    assert contexts[1].is_open or name == "rate.ts"  # this container is opened again to be read again
    assert video.plan == plan and len(video.grid_thw) == len(plan)
    pixels = SlowFastEncoder(policy="all_slow").plan(coded(name))
    assert torch.equal(plan.timestamps, pixels.timestamps) and torch.equal(plan.frame_indices, pixels.frame_indices)
    assert plan.source_size == pixels.source_size and plan.duration == pixels.duration


def test_pixels_equal_those_of_a_measure_that_decodes(coded):
    name = "open.mkv"
    found = encoder(policy="uniform:4")(coded(name), dtype=torch.uint8)
    expected = SlowFastEncoder(policy="uniform:4")(coded(name), dtype=torch.uint8)
    assert torch.equal(found.pixel_values, expected.pixel_values)
    frames = encoder().frames(coded(name), size=56)
    assert len(frames.in_order()) == len(frames.plan)


@dataclass(frozen=True)
class First(Policy):
    """Shows the first of every two frames."""

    name = "first"
    online = False

    def decide(self, clip, limits):
        shown = list(range(0, len(clip), 2))
        return Decisions([SLOW] + [FAST] * (len(shown) - 1), [float("nan")] + [1.0] * (len(shown) - 1), shown)


def test_frames_that_the_plan_drops_are_not_converted(coded, monkeypatch):
    painted, plain = [], FrameConverter.paint

    def paint(self, frame, time):
        painted.append(time)
        return plain(self, frame, time)

    monkeypatch.setattr(FrameConverter, "paint", paint)
    video = encoder(policy=First())(coded("open.mkv"), dtype=torch.uint8)
    assert painted == pytest.approx(video.plan.timestamps.tolist(), abs=1e-6) and len(painted) == SECONDS
    kept = SlowFastEncoder(policy="all_slow", fps=1)(coded("open.mkv"), dtype=torch.uint8)
    size = video.plan.slow_tokens * 4
    assert torch.equal(video.pixel_values[:size], kept.pixel_values[:size])


@pytest.mark.parametrize("name", ENCODINGS)
def test_pixels_where_frames_are_dropped_equal_those_of_a_full_decode(coded, name):
    video = encoder(policy=First())(coded(name), dtype=torch.uint8)
    with av.open(str(coded(name))) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    pixels = torch.from_numpy(np.stack([decoded[index] for index in video.plan.frame_indices])).permute(0, 3, 1, 2)
    expected, grid = encode_patches(pixels, video.plan.frame_sizes, 28, video.format)
    assert torch.equal(video.pixel_values, expected) and torch.equal(video.grid_thw, grid)


def test_a_damaged_file_still_has_every_frame_of_its_plan(coded, folder):
    content = bytearray(coded("fixed.mp4").read_bytes())
    draw = np.random.default_rng(0)
    start = content.find(b"mdat") + 4
    for place in draw.integers(start + (len(content) - start) // 3, len(content) - 6000, 400):
        content[place] ^= 1 << int(draw.integers(8))
    path = folder / "damaged.mp4"
    path.write_bytes(content)
    plan = encoder().plan(path)
    video = encoder()(path, dtype=torch.uint8)
    assert torch.equal(video.plan.timestamps, plan.timestamps) and len(video.grid_thw) == len(plan)
    assert any("damaged" in text for text in video.plan.warnings)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("rotation", [0, 90, 180])
def test_the_size_is_that_of_the_container(folder, rotation, suffix):
    path = write_video(folder / f"{rotation}.{suffix}", drawn()[:30], rotation=rotation)
    plan, pixels = encoder().plan(path), SlowFastEncoder().plan(path)
    assert plan.source_size == pixels.source_size and encoder()(path).plan == plan


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_video_of_one_frame(folder):
    write_mp4(folder / "one.mp4", [scenery(0)], 25)
    assert encoder().plan(folder / "one.mp4").frame_types.tolist() == [SLOW]


def test_a_range_and_a_number_of_frames(coded):
    options = {"start": 3.0, "end": 6.0, "num_frames": 6}
    plan = encoder().plan(coded("scene cuts.mp4"), **options)
    assert plan.timestamps.tolist() == pytest.approx([3.0, 3.48, 4.0, 4.48, 5.0, 5.48])
    assert slow_times(plan) == [3.0, 4.0]
    assert encoder()(coded("scene cuts.mp4"), **options).plan == plan


def test_policies_that_need_all_frames(coded):
    plan = encoder(policy="adaptive_budget:share=0.25").plan(coded("hevc.mp4"))
    assert 1 < len(slow_times(plan)) <= 4 and any(CUT - 0.01 <= time <= CUT + 0.75 for time in slow_times(plan))
    assert encoder(policy="adaptive:cut=0.3").plan(coded("hevc.mp4")).counts[0] >= 2


def without_packets(kind: str, folder):
    frames = drawn()[::5] if kind != "layers.mp4" else drawn(None)
    if kind == "array":
        return torch.from_numpy(frames).permute(0, 3, 1, 2), {"source_fps": 5}
    if kind == "folder":
        (folder / "images").mkdir(exist_ok=True)
        for index, pixels in enumerate(frames[::4]):
            Image.fromarray(pixels).save(folder / "images" / f"{index:03}.png")
        return folder / "images", {"source_fps": 2}
    if kind == "animation.gif":
        pictures = [Image.fromarray(pixels) for pixels in frames]
        pictures[0].save(folder / kind, save_all=True, append_images=pictures[1:], duration=200)
        return folder / kind, {}
    codec, options = {
        "intra.mp4": ("libx264", {"g": "1"}),
        "intra.avi": ("mjpeg", {}),
        "unknown.asf": ("wmv2", {}),
        "pyramids.mp4": ("libsvtav1", {"preset": "12", "svtav1-params": "lp=1"}),
        "layers.mp4": ("libsvtav1", {"preset": "12", "crf": "35", "svtav1-params": "lp=1:pred-struct=1"}),
    }[kind]
    form = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    return write_video(folder / kind, frames, rate=5, codec=codec, options=options, pixel_format=form), {}


REASONS = {
    "intra.mp4": "all packets are key frames",
    "intra.avi": "all packets are key frames",
    "unknown.asf": "no packets say",
    "pyramids.mp4": "pyramids of pictures hide",
    "layers.mp4": "unusual sizes recur",
    "array": "no packets say",
    "folder": "no packets say",
    "animation.gif": "no packets say",
}


@pytest.mark.parametrize("kind", REASONS)
def test_other_sources_fall_back_to_the_default_measure_with_a_warning(folder, kind):
    source, options = without_packets(kind, folder)
    plan, expected = encoder().plan(source, **options), SlowFastEncoder().plan(source, **options)
    (warning,) = [text for text in plan.warnings if text not in expected.warnings]
    assert REASONS[kind] in warning and "change with threshold 0.85 is used" in warning
    assert torch.equal(plan.frame_types, expected.frame_types)
    assert torch.equal(plan.similarity, expected.similarity) or plan.similarity[0].isnan()
    assert encoder()(source, **options).plan == plan


def test_the_fallback_is_the_default_measure():
    assert Packets().pixels.name == EncoderConfig.measure


def test_a_stream_of_frames_decides_as_their_plan():
    frames = torch.from_numpy(drawn()[::12]).permute(0, 3, 1, 2)
    plan = encoder().plan(frames, source_fps=2)
    assert [decision.frame_type for decision in encoder().stream(frames)] == plan.frame_types.tolist()


def facts(coded: list[int], keys: list[int]) -> PacketFacts:
    count = len(coded)
    flags = np.isin(np.arange(count), keys)
    ones = np.ones(count, dtype=np.int64)
    return PacketFacts(np.arange(count) / 10, np.array(coded), flags, np.array(coded), ones, ones < 0)


def test_packets_of_one_size_say_nothing():
    assert Packets().lacks(facts([5000] + [900] * 20, [0])) == "all packets have one size"
    assert Packets().lacks(facts([5000] + [20] * 20, [0])) is None  # a still picture
    assert Packets().lacks(facts([5000] + [900] * 10 + [4000] + [900] * 9, [0])) is None


def test_few_deep_pictures_are_pyramids():
    """As in libaom's alternate references, of which 4 to 18 % are this deep."""
    deep = np.arange(100) % 25 == 20
    plain = facts([5000] + [900, 500] * 49 + [900], [0])
    assert Packets().lacks(plain) is None
    pyramids = replace(plain, spans=np.where(deep, 8, 1), between=deep)
    assert Packets().lacks(pyramids) == "pyramids of pictures hide when a change happens"


def test_scores_follow_the_most_unusual_picture():
    measure = Packets()
    sizes = [7968, *[168] * 10, 768, *[168] * 9]  # 32 bytes more are 8000, 200 and 800: a tenth of the key frame
    features = measure.read(facts(sizes, [0]), np.arange(0, 21, 5))
    scores = measure.compare(features[0], features[1:])
    expected = 1 / (1 + np.log(4) * (1 + measure.NEW / 10))
    assert scores.tolist() == pytest.approx([1, 1, expected, expected]) and scores.dtype == torch.float32
    assert measure.compare(features[3], features[3:]).tolist() == [1, 1]


def test_a_picture_with_the_bytes_of_a_key_frame_is_more_than_one_with_few():
    """Both have five times their usual bytes; the first shows another scene."""
    sizes = [5968, *[1168] * 20, 5968, *[1168] * 20, *[68] * 20, 468, *[68] * 20]
    surprise = Packets().surprise(facts(sizes, [0]))
    assert surprise[21] == pytest.approx((1 + Packets.NEW) * np.log(5))
    assert surprise[62] == pytest.approx((1 + Packets.NEW / 12) * np.log(5))


def test_key_frames_at_their_distance_count_by_their_sizes():
    measure = Packets()
    plain = np.array([968, *[100] * 9] * 4)
    periodic = measure.surprise(facts(plain.tolist(), [0, 10, 20, 30]))
    assert periodic.max() == 0
    plain[20] = 3968  # 4 times the bytes, and a quarter at the next one
    other = measure.surprise(facts(plain.tolist(), [0, 10, 20, 30]))
    assert other[20] == pytest.approx(np.log(4)) and other[10] == 0
    early = measure.surprise(facts(plain.tolist(), [0, 10, 14, 24, 34]))
    assert early[14] == Packets.CUT and early[24] < Packets.CUT


def test_a_key_frame_that_may_end_the_first_period_is_less_than_a_cut():
    """As in clips of a few seconds with fixed groups of pictures: a change between two key frames comes first."""
    sizes = [5968, *[168] * 20, 3968, *[168] * 19, 5968, *[168] * 20]
    surprise = Packets().surprise(facts(sizes, [0, 41]))
    assert surprise[41] == Packets.UNSURE < surprise[21]
    assert 1 / (1 + Packets.UNSURE) < Packets.threshold  # where nothing else happens, it is slow


def test_the_warnings_of_the_container_are_those_of_a_call(folder):
    """HDR and interlaced files."""
    files = {
        "hdr.mp4": ("libx265", {"x265-params": "log-level=none:pools=1:transfer=smpte2084"}),
        "interlaced.mp4": ("libx264", {"flags": "+ildct+ilme", "x264-params": "tff=1"}),
    }
    for name, (codec, options) in files.items():
        path = write_video(folder / name, drawn()[:30], codec=codec, options=options)
        plan = encoder().plan(path)
        assert encoder()(path).plan == plan and len(plan.warnings) == 1, plan.warnings
