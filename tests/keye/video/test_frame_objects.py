"""Frames of other libraries and arrays of every kind, against the same frames read from a file or as plain uint8."""

from dataclasses import dataclass

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from keye.encoder import SlowFastEncoder
from keye.errors import VideoError
from keye.video.clip import open_clip
from keye.video.images import load_image
from scripts.clips import clip
from tests.keye.video.make import number_of, numbered, write_video

RATE, COUNT = 25, 83


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """The numbered frames as a file of 25 frames per second, coded without loss of the numbers."""
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered(COUNT), rate=RATE, options={"crf": "1"})


def read(source, fps=2.0, max_frames=1000, **options):
    with open_clip(source, fps, max_frames, **options) as opened:
        return opened, list(opened)


def seen(source, **options):
    """(index, time, number drawn) of the frames that are used."""
    return [(frame.index, round(frame.time, 4), number_of(frame.pixels)) for frame in read(source, **options)[1]]


def decoded(path):
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def generated(path):
    with av.open(str(path)) as container:
        yield from container.decode(video=0)


@dataclass
class FrameBatch:
    """With the fields of torchcodec's class of this name; the library itself needs a system FFmpeg."""

    data: torch.Tensor
    pts_seconds: torch.Tensor
    duration_seconds: torch.Tensor

    def __iter__(self):
        return zip(self.data, self.pts_seconds, self.duration_seconds, strict=True)


@dataclass
class Frame:
    """With the fields of torchcodec's class of this name."""

    data: torch.Tensor
    pts_seconds: float
    duration_seconds: float


def tensor():
    return torch.from_numpy(numbered(COUNT)).permute(0, 3, 1, 2)


def batch(path):
    times = torch.arange(COUNT, dtype=torch.float64) / RATE
    return FrameBatch(tensor(), times, torch.full((COUNT,), 1 / RATE, dtype=torch.float64))


CLOCKED = {
    "array": lambda path: (tensor(), {"source_fps": RATE}),
    "list": lambda path: (list(numbered(COUNT)), {"source_fps": RATE}),
    "iterator": lambda path: (iter(numbered(COUNT)), {"source_fps": RATE}),
    "pyav list": lambda path: (decoded(path), {}),
    "pyav iterator": lambda path: (generated(path), {}),
    "pairs": lambda path: ([(index / RATE, pixels) for index, pixels in enumerate(numbered(COUNT))], {}),
    "torchcodec batch": lambda path: (batch(path), {}),
    "torchcodec frames": lambda path: ([Frame(d, t, 1 / RATE) for t, d in enumerate(tensor())], {"source_fps": RATE}),
    "opencv": lambda path: (cv2.VideoCapture(str(path)), {}),
}


REQUESTS = [
    *({}, {"fps": 5.0}, {"fps": 100.0}, {"start": 1.1}, {"start": 0.5, "end": 2.0}),
    *({"num_frames": 7}, {"max_frames": 4}),
]


@pytest.mark.parametrize("kind", CLOCKED)
@pytest.mark.parametrize("options", REQUESTS)
def test_frames_with_a_clock_are_sampled_like_their_file(video, kind, options):
    source, clock = CLOCKED[kind](video)
    found, wanted = seen(source, **clock, **options), seen(video, **options)
    if "max_frames" not in options or kind not in ("iterator", "pyav iterator", "opencv"):
        assert found == wanted
    else:  # of frames that come once, which are thinned from those sampled: the length was not known in time
        assert len(found) == len(wanted) and all(index == number for index, _, number in found)
        assert all(abs(one[1] - other[1]) <= 0.5 for one, other in zip(found, wanted, strict=True))


def test_a_clip_as_frames_and_as_a_file_give_one_plan(video):
    """The audit's case: 25 frames per second gave 11 frames as a file and all as an array."""
    path = clip("bikes.mp4")
    frames = decoded(path)
    rate = float(frames[0].time_base.denominator / frames[1].pts)
    encoder, pixels = SlowFastEncoder(), torch.stack([load_image(frame) for frame in frames])
    plan = encoder.plan(path)
    for source, clock in ((pixels, {"source_fps": rate}), (frames, {}), (generated(path), {})):
        other = encoder.plan(source, **clock)
        assert len(other) == len(plan) < len(frames) / 5 and not other.warnings
        for name in ("frame_types", "frame_indices"):
            assert torch.equal(getattr(other, name), getattr(plan, name))
        assert torch.allclose(other.timestamps, plan.timestamps)
        assert torch.equal(other.similarity.nan_to_num(9), plan.similarity.nan_to_num(9))


def test_an_iterator_keeps_on_disk_only_what_is_sampled():
    taken = []

    def frames():
        for index, pixels in enumerate(numbered(COUNT)):
            taken.append(index)
            yield index / RATE, pixels

    with open_clip(frames(), 2.0, 1000) as opened:
        spool = opened._reader.pictures
        assert len(taken) == COUNT and len(spool) == 7
        assert spool.file.seek(0, 2) == 7 * spool[0].numel()


def test_frames_that_were_sampled_before_are_all_used():
    """Timestamps mark frames as sampled; frames with a clock of about the requested rate are all used, too."""
    jittered = [0.0, 0.48, 1.04, 1.48, 2.04]
    pictures = numbered(5)
    assert [time for _, time, _ in seen(pictures, timestamps=jittered)] == jittered
    assert [time for _, time, _ in seen(list(zip(jittered, pictures, strict=True)))] == jittered
    assert len(seen(numbered(40), timestamps=[index / 25 for index in range(40)])) == 40
    assert len(seen(pictures, source_fps=1.0)) == 5


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("given", [list, iter])
def test_times_that_are_not_finite_are_refused(wrong, place, given):
    times = [0.0, 1.0, 2.0]
    times[place] = wrong
    frames = [(time, torch.zeros(3, 40, 40, dtype=torch.uint8)) for time in times]
    with pytest.raises(VideoError, match="sort the frames by time|give finite seconds"):
        SlowFastEncoder().plan(given(frames))


@pytest.mark.parametrize("wrong", [5, ["a", "b"], [None, 1], torch.zeros(2, 2), [[0], [1]]])
def test_timestamps_that_are_not_numbers_are_refused(wrong):
    with pytest.raises(VideoError, match="the timestamps of .* are not numbers .*; give the seconds of each frame"):
        SlowFastEncoder().plan(torch.zeros(2, 3, 40, 40, dtype=torch.uint8), timestamps=wrong)


def test_an_assumed_clock_is_a_warning():
    plan = SlowFastEncoder(fps=4).plan(tensor()[:6])
    assert plan.timestamps.tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25]
    assert plan.warnings == (
        "frames has no clock: its frames are assumed 0.25 s apart (fps=4); give source_fps or timestamps",
    )
    for known in ({"source_fps": 4}, {"timestamps": [0, 1, 2, 3, 4, 5]}):
        assert not SlowFastEncoder(fps=4).plan(tensor()[:6], **known).warnings
    assert not SlowFastEncoder().plan(tensor()[:1]).warnings  # a still has no need of one


EXACT = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)


def _grey(pixels):
    return np.repeat(pixels[..., :1], 3, axis=-1)


SAME = {
    "float64": lambda p: (p / 255, p),
    "float32": lambda p: ((p / 255).astype(np.float32), p),
    "half": lambda p: (torch.from_numpy(p).permute(0, 3, 1, 2).half() / 255, p),
    "bfloat16, two levels": lambda p: (torch.from_numpy(p // 128).bfloat16(), p // 128 * 255),
    "int64": lambda p: (p.astype(np.int64), p),
    "int32 tensor": lambda p: (torch.from_numpy(p).int(), p),
    "uint32": lambda p: (p.astype(np.uint32), p),
    "big endian": lambda p: (p.astype(">i2"), p),
    "needs grad": lambda p: ((torch.from_numpy(p).float() / 255).requires_grad_(), p),
    "grey": lambda p: (p[..., 0], _grey(p)),
    "grey last": lambda p: (p[..., :1], _grey(p)),
    "grey first": lambda p: (p[..., :1].transpose(0, 3, 1, 2), _grey(p)),
    "opaque": lambda p: (np.concatenate([p, np.full_like(p[..., :1], 255)], -1), p),
    "opaque first": lambda p: (np.concatenate([p, np.full_like(p[..., :1], 255)], -1).transpose(0, 3, 1, 2), p),
    "clear": lambda p: (np.concatenate([p, np.zeros_like(p[..., :1])], -1), np.full_like(p, 255)),
    "batch of one": lambda p: (p[None].transpose(0, 1, 4, 2, 3), p),
    "jax and others": lambda p: (Foreign(p), p),
}


class Foreign:
    """An array of another framework: it has a shape and turns into numpy's."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def __array__(self, dtype=None, copy=None):
        return self.values


@pytest.mark.parametrize("kind", SAME)
def test_arrays_of_other_kinds_are_the_same_pictures(kind):
    given, same = SAME[kind](EXACT[[0, 1, 2, 3, 0]])
    found = torch.stack([frame.pixels for frame in read(given, source_fps=2)[1]])
    assert found.dtype == torch.uint8 and torch.equal(found, torch.from_numpy(same).permute(0, 3, 1, 2))


def test_opacity_is_blended_as_pillow_does_it():
    alpha = np.random.default_rng(1).integers(0, 256, (20, 30, 1), dtype=np.uint8)
    picture = np.concatenate([EXACT[0], alpha], -1)
    ours, pillows = load_image(picture).int(), load_image(Image.fromarray(picture)).int()
    assert int((ours - pillows).abs().max()) <= 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.full((2, 3, 4, 5), -0.5), r"floats from -0.5 to -0.5.*give \(\(values \+ 1\) \* 127.5\)"),
        (torch.full((2, 3, 4, 5), 200.0), r"give values.round\(\).to\(torch.uint8\)"),
        (torch.full((2, 3, 4, 5), float("nan")), "not numbers \\(NaN\\)"),
        (torch.full((2, 3, 4, 5), 300), "integers from 300 to 300; give uint8"),
        (np.full((2, 3, 4, 5), -1, np.int8), "integers from -1 to -1"),
        (np.zeros((2, 3, 4, 5), np.uint16), "uint16; give .values >> 8."),
        (np.zeros((2, 3, 4, 5), bool), "bool; give"),
        (np.zeros((2, 3, 4, 5), complex), "complex128; give uint8"),
        (np.zeros((2, 3, 4, 5), object), "object; give uint8"),
        (np.zeros((2, 6, 3, 4, 5), np.uint8), r"one clip after another: values\[0\]"),
        (np.zeros((3, 6, 40, 50), np.uint8), r"put the frames first: values.permute\(1, 0, 2, 3\)"),
        (np.zeros((6, 40, 50, 2), np.uint8), "permute or convert"),
        (np.zeros((4, 40, 50), np.uint8), "four grey frames or one picture with opacity"),
        (np.zeros((6, 3, 4, 0), np.uint8), "T >= 1"),
        (np.zeros((6,), np.uint8), "must be uint8"),
        ([(0.0, EXACT[0]), (0.0, EXACT[1])], "do not ascend"),
        (iter([(0.5, EXACT[0]), (0.0, EXACT[1])]), "no time or an earlier one"),
        ({"path": None, "bytes": None}, "neither bytes nor a path"),
    ],
)
def test_ambiguous_arrays_are_refused_with_a_conversion(given, says):
    with pytest.raises(VideoError, match=says) as error:
        read(given)
    assert "\n" not in str(error.value)


def test_rows_of_datasets_equal_the_file(video, tmp_path):
    wanted = seen(video)
    for row in (
        {"path": str(video), "bytes": None},
        {"path": None, "bytes": video.read_bytes()},
        {"bytes": video.read_bytes(), "path": "gone.mp4"},
        {"path": str(video)},
    ):
        assert seen(row) == wanted
    Image.fromarray(EXACT[0]).save(tmp_path / "a.png")
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    assert torch.equal(load_image(image), load_image(EXACT[0]))
    assert len(read([image, image], source_fps=2)[1]) == 2


def test_a_capture_that_is_closed_or_a_camera_is_refused(video):
    capture = cv2.VideoCapture(str(video))
    assert len(read(capture)[1]) == len(read(capture)[1]) == 7  # a second time from the beginning
    capture.release()
    with pytest.raises(VideoError, match="is not open"):
        read(capture)


def test_a_stream_accepts_the_frames_that_plan_accepts(video):
    encoder, frames = SlowFastEncoder(), decoded(video)[:5]
    given = [(frame.time, frame) for frame in frames]
    plain = [(frame.time, load_image(frame)) for frame in frames]
    assert [d.frame_type for d in encoder.stream(given)] == [d.frame_type for d in encoder.stream(plain)]
