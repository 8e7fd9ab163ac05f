"""Expectations marked "released" were computed with keye-vl-utils 1.5.2, decord 0.6.0 and opencv on the same input."""

import base64
import io
from types import MappingProxyType

import av
import numpy as np
import pytest
import torch
from PIL import Image

from keye import SlowFastEncoder
from keye.adapters.keye_vl_utils import extract_vision_info, process_vision_info, smart_resize
from keye.errors import KeyeError, ManifestError, VideoError
from keye.slowfast.budget import size_tokens
from keye.slowfast.policies import FrameContext, Policy
from keye.video.fetch import UrlRules
from scripts.clips import clip
from tests.keye.video.make import number_of, numbered, write_video

TOKEN = 28 * 28


def ask(*elements: dict) -> list[dict]:
    return [{"role": "user", "content": [*elements, {"type": "text", "text": "What is seen?"}]}]


def video(source, **keys) -> list[dict]:
    return ask({"type": "video", "video": source, **keys})


def types(values: dict) -> list[str]:
    return ["".join(map(str, kinds.tolist())) for kinds in values["frame_types"]]


def noise(seed: int, height: int = 200, width: int = 300) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def flat(colour) -> Image.Image:
    return Image.new("RGB", (300, 200), colour)


def as_frame(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


SEQUENCE = [
    *(flat("black"), flat("black"), flat((10, 200, 30)), flat((12, 190, 40)), noise(0)),
    *(noise(1), flat("white"), flat("white"), flat((255, 0, 0)), flat((0, 0, 255))),
]

# released: clip, keys, frame types, frame numbers, frames per second, (height, width, fast_height, fast_width), mean
CLIPS = [
    (
        *("bikes.mp4", {}, "01100000001011100110"),
        [0, 13, 26, 39, 52, 66, 79, 92, 105, 118, 131, 144, 157, 170, 183, 197, 210, 223, 236, 249],
        *(25, (280, 644, 140, 336), 100.17),
    ),
    ("bikes.mp4", {"max_frames": 6}, "000000", [0, 50, 100, 149, 199, 249], 25, (280, 644, 140, 336), 100.58),
    (
        *("bigbuckbunny.mp4", {}, "0111011111", [0, 15, 29, 44, 58, 73, 87, 102, 116, 131], 25),
        *((560, 1008, 308, 532), 109.09),
    ),
    (
        *("bigbuckbunny.mp4", {"max_frames": 6, "max_pixels": 300 * TOKEN}, "010111"),
        *([0, 26, 52, 79, 105, 131], 25, (336, 644, 168, 336), 108.64),
    ),
    (
        *("bigbuckbunny.mp4", {"fps": 5, "min_frame_similarity": 0.97}, "01101110011110111111011111"),
        [
            *(0, 5, 10, 16, 21, 26, 31, 37, 42, 47, 52, 58, 63),
            *(68, 73, 79, 84, 89, 94, 100, 105, 110, 115, 121, 126, 131),
        ],
        *(25, (560, 1008, 308, 532), 109.2),
    ),
    # Of the release a fast frame is 196x224, 56 tokens, as its limit of 48 is lost in rounding up.
    (
        *("carphone_pristine.mp4", {}, "01111111", [0, 17, 34, 51, 68, 85, 102, 119]),
        *(30_000 / 1001, (196, 224, 168, 224), 100.76),
    ),
]


@pytest.mark.parametrize(("name", "keys", "expected", "numbers", "rate", "sizes", "mean"), CLIPS)
def test_with_its_sampling_all_is_as_released(name, keys, expected, numbers, rate, sizes, mean):
    images, videos, values = process_vision_info(video(str(clip(name)), **keys), sampling="index")
    assert images is None and len(videos) == 1
    assert videos[0].dtype == torch.uint8 and videos[0].shape[:2] == (len(expected), 3)
    assert videos[0].float().mean().item() == pytest.approx(mean, abs=0.2)
    assert types(values) == [expected] and values["frame_types"][0].dtype == torch.int32
    assert values["timestamps"][0].dtype == torch.float32
    assert values["timestamps"][0].tolist() == pytest.approx([number / rate for number in numbers], abs=1e-4)
    assert (*values["height"], *values["width"], *values["fast_height"], *values["fast_width"]) == sizes


def test_its_sampling_spreads_over_the_frame_numbers_of_any_clip(tmp_path):
    times = np.cumsum(np.random.default_rng(2).integers(5, 90, 70)).tolist()
    path = write_video(tmp_path / "a.mp4", numbered(70), times_ms=times, options={"bf": "3", "crf": "10"})
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
    _, videos, values = process_vision_info(video(path, fps=4), sampling="index")
    expected = torch.linspace(0, 69, int(70 / rate * 4)).round().int().tolist()
    assert [number_of(frame) for frame in videos[0]] == expected
    assert values["timestamps"][0].tolist() == pytest.approx([number / rate for number in expected])


@pytest.mark.parametrize(
    ("keys", "expected", "times", "size", "mean"),
    [
        ({}, "0101110110", None, (196, 308), 109.54),
        ({"fps": 4}, "0101110110", [i / 4 for i in range(10)], (196, 308), 109.54),
        ({"fps": 1, "max_frames": 7}, "0011010", [0, 2, 3, 4, 6, 8, 9], (196, 308), 101.82),
        (
            *({"resized_height": 252, "resized_width": 336, "min_frame_similarity": 0.5}, "0101110110"),
            *(None, (252, 336), 109.54),
        ),
    ],
)
def test_lists_of_images_are_as_released(keys, expected, times, size, mean):
    _, videos, values = process_vision_info(video(SEQUENCE, **keys))
    assert videos[0].shape == (len(expected), 3, *size)
    assert videos[0].float().mean().item() == pytest.approx(mean, abs=0.01)
    assert types(values) == [expected]
    assert values["height"] == [size[0]] and values["width"] == [size[1]]
    if times is None:
        assert "timestamps" not in values
    else:
        assert values["timestamps"][0].tolist() == times


# released: keys, (width, height), the pixel in row 7, column 9
@pytest.mark.parametrize(
    ("keys", "size", "pixel"),
    [
        ({}, (336, 504), [112, 114, 203]),
        ({"min_pixels": 500 * TOKEN}, (532, 784), [8, 176, 148]),
        ({"max_pixels": 60 * TOKEN}, (168, 252), [106, 168, 111]),
        ({"resized_height": 100, "resized_width": 90}, (84, 112), [129, 132, 140]),
    ],
)
def test_images_are_as_released(tmp_path, keys, size, pixel):
    path = tmp_path / "noise.png"
    noise(5, 501, 333).save(path)
    coded = base64.b64encode(path.read_bytes()).decode()
    sources = [
        *({"image": str(path)}, {"image": f"file://{path}"}, {"image_url": str(path)}, {"image": noise(5, 501, 333)}),
        {"image": f"data:image/png;base64,{coded}"},
    ]
    images, videos, values = process_vision_info(ask(*({"type": "image", **source, **keys} for source in sources)))
    assert videos is None and values == {}
    assert [image.size for image in images] == [size] * len(sources)
    assert [np.asarray(image)[7, 9].tolist() for image in images] == [pixel] * len(sources)


@pytest.mark.parametrize(
    ("arguments", "expected"),  # released
    [
        ((720, 1280), (728, 1288)),
        ((1080, 1920, 28, 48 * TOKEN, 768 * TOKEN), (560, 1008)),
        ((1000, 1000, 32, 4 * 1024, 100 * 1024), (320, 320)),
        ((144, 176, 28, 48 * TOKEN, 768 * TOKEN), (196, 224)),
    ],
)
def test_sizes_are_as_released(arguments, expected):
    assert smart_resize(*arguments) == expected


def test_by_default_frames_are_taken_at_true_times():
    _, videos, values = process_vision_info(video(clip("bikes.mp4")))
    times = values["timestamps"][0]
    # 25 frames a second: the one on the screen at i / 2 s appeared at most 1 / 25 s before.
    late = torch.arange(20) / 2 - times
    assert len(times) == len(videos[0]) == 20 and (late >= 0).all() and (late < 1 / 25 + 1e-4).all()
    plan = SlowFastEncoder.released().plan(clip("bikes.mp4"))
    assert torch.equal(values["frame_types"][0].long(), plan.frame_types)
    assert (values["height"][0], values["width"][0]) == plan.slow_size
    assert (values["fast_height"][0], values["fast_width"][0]) == plan.fast_size


def test_every_kind_of_source_gives_the_same():
    path = clip("carphone_pristine.mp4")
    content = path.read_bytes()
    data = "data:video/mp4;base64," + base64.b64encode(content).decode()
    for sampling in ("time", "index"):
        sources = [
            str(path),
            path,
            f"file://{path}",
            content,
            data,
            *([io.BytesIO(content)] if sampling == "time" else []),
        ]
        results = [process_vision_info(video(source), sampling=sampling) for source in sources]
        for _, videos, values in results:
            assert torch.equal(videos[0], results[0][1][0])
            assert torch.equal(values["timestamps"][0], results[0][2]["timestamps"][0])


def test_several_conversations_come_in_order():
    talks = [
        [*ask({"type": "image", "image": noise(1)}), {"role": "assistant", "content": "A picture."}],
        ask({"type": "video", "video": SEQUENCE[:3], "fps": 1}, {"image": noise(2)}),
        video(SEQUENCE[3:]),
    ]
    images, videos, values = process_vision_info(talks)
    assert len(images) == 2 and [len(frames) for frames in videos] == [3, 7]
    assert values["timestamps"][0].tolist() == [0, 1, 2] and values["timestamps"][1] is None
    assert types(values) == ["010", "0110110"]
    infos = extract_vision_info(talks)
    assert [("image" in info, "video" in info) for info in infos] == [(1, 0), (0, 1), (1, 0), (0, 1)]
    again = process_vision_info(vision_infos=infos)
    assert all(map(torch.equal, again[1], videos))


def test_ranges_and_counts_work():
    _, videos, values = process_vision_info(video(clip("bikes.mp4"), video_start=4, video_end=6))
    assert values["timestamps"][0].tolist() == pytest.approx([4.0, 4.48, 5.0, 5.48], abs=1e-3)
    _, videos, values = process_vision_info(video(clip("bikes.mp4"), nframes=7))
    assert len(videos[0]) == 7


def test_one_image_is_a_video():
    _, videos, values = process_vision_info(video([flat("black")]))
    assert types(values) == ["0"] and len(videos[0]) == 1


def test_the_budget_is_kept_where_the_release_exceeds_it():
    for tokens in (1000, 2500):
        _, _, values = process_vision_info(video(clip("bikes.mp4"), video_total_pixels=tokens * TOKEN))
        fast = int(values["frame_types"][0].sum())
        slow = len(values["frame_types"][0]) - fast
        cost = slow * size_tokens((values["height"][0], values["width"][0]))
        cost += fast * size_tokens((values["fast_height"][0], values["fast_width"][0]))
        assert 0.9 * tokens < cost <= tokens


def test_the_limits_of_a_frame_are_kept():
    frames = [noise(1, 480, 640), noise(2, 480, 640), *[flat("red").resize((640, 480))] * 3]
    for fewest, most in ((48, 100), (100, 300), (200, 200)):
        limits = {"min_pixels": fewest * TOKEN, "max_pixels": most * TOKEN}
        _, _, values = process_vision_info(video(torch.stack(list(map(as_frame, frames))), **limits))
        slow = size_tokens((values["height"][0], values["width"][0]))
        fast = size_tokens((values["fast_height"][0], values["fast_width"][0]))
        assert fewest <= fast <= max(fewest, 0.3 * slow) and 0.8 * most < slow <= most


def test_an_encoder_brings_its_own_decisions():
    encoder = SlowFastEncoder(policy="all_slow", max_tokens=100_000, max_tokens_per_frame=100)
    _, _, values = process_vision_info(video(clip("bikes.mp4")), encoder=encoder)
    assert set(types(values)[0]) == {"0"} and values["height"][0] * values["width"][0] <= 100 * TOKEN

    class Thirds(Policy):
        """A policy of one's own, which no text stands for."""

        name = "thirds"
        spec = "thirds"

        def is_slow(self, seen: FrameContext) -> bool:
            return seen.index % 3 == 0

    encoder = SlowFastEncoder(policy=Thirds())
    _, _, values = process_vision_info(video(clip("bikes.mp4"), fps=1, max_frames=5), encoder=encoder)
    assert types(values) == ["01101"]


def test_errors_name_the_cause():
    with pytest.raises(ManifestError, match="no messages"):
        process_vision_info()
    with pytest.raises(ManifestError, match="type 'video' names no source"):
        process_vision_info(ask({"type": "video"}))
    message = MappingProxyType({"content": [MappingProxyType({"type": "image", "image": noise(1)})]})
    assert len(process_vision_info([[message]])[0]) == 1  # rows of other libraries are mappings, not dicts
    for message in ({}, {"role": "user"}, 5, {"role": "user", "content": ["text"]}):
        with pytest.raises(ManifestError, match="; give "):
            process_vision_info([message] if isinstance(message, dict) else [[message]])
    with pytest.raises(VideoError, match="a list of 0 images"):
        process_vision_info(video([]))
    with pytest.raises(VideoError, match="2 sizes"):
        process_vision_info(video([noise(1), noise(1, 400, 200)]))
    with pytest.raises(KeyeError, match="sampling is 'both'"):
        process_vision_info(video(clip("bikes.mp4")), sampling="both")
    with pytest.raises(ManifestError, match='need sampling="time"'):
        process_vision_info(video(clip("bikes.mp4"), nframes=3), sampling="index")
    for sampling in ("time", "index"):
        with pytest.raises(VideoError, match="downloads are off by default"):
            process_vision_info(video("https://example.invalid/a.mp4"), sampling=sampling)
        with pytest.raises(VideoError, match="not public"):
            process_vision_info(video("http://127.0.0.1:9/a.mp4"), sampling=sampling, urls=UrlRules())
        with pytest.raises(VideoError, match="no.mp4"):
            process_vision_info(video("no.mp4"), sampling=sampling)
    with pytest.raises(VideoError, match="downloads are off by default"):
        process_vision_info(ask({"type": "image", "image": "https://example.invalid/a.png"}))
