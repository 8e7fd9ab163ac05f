import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from keye.encoder import SlowFastEncoder
from keye.errors import VideoError
from keye.slowfast.plan import VideoPlan
from tests.keye.video.make import numbered, write_video

scores = st.floats(0, 1, width=32) | st.just(math.nan)


def a_plan(types=(0, 1, 1, 0), similarity=(math.nan, 0.97, 0.93, 0.4), **changes) -> VideoPlan:
    count = len(types)
    values = {
        "source": "clip.mp4",
        "frame_types": torch.tensor(types),
        "timestamps": torch.arange(count) / 3,
        "frame_indices": torch.arange(count) * 8,
        "similarity": torch.tensor(similarity, dtype=torch.float32),
        "source_size": (720, 1280),
        "slow_size": (560, 1008),
        "fast_size": (280, 532),
        "max_tokens": 5_000,
        "duration": count / 3,
        "settings": {"threshold": 0.9, "measure": "patch_l1", "policy": "adaptive", "fps": 3.0, "max_frames": None},
        "warnings": ("one", "two"),
    }
    return VideoPlan(**{**values, **changes})


def two_stream_plan() -> VideoPlan:
    """Three frames, the first and the last there twice."""
    return a_plan(
        (0, 1, 1, 0, 1),
        (math.nan, 1.0, 0.2, 0.1, 1.0),
        timestamps=torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]),
        frame_indices=torch.tensor([0, 0, 12, 25, 25]),
        duration=1.2,
        settings={"policy": "two_stream:slow=2,fast_tokens=190", "measure": "patch_l1", "threshold": 0.5},
    )


def test_tokens_of_a_plan_by_hand():
    plan = a_plan()
    assert plan.tokens == 2 * 20 * 36 + 2 * 10 * 19 == 1820
    assert plan.tokens_per_frame.tolist() == [720, 190, 190, 720]
    assert plan.frame_sizes == [(560, 1008), (280, 532), (280, 532), (560, 1008)]
    assert plan.slow_share == 0.5 and len(plan) == 4 and plan.counts == (2, 2)
    assert plan.all_slow_tokens == 2880 and plan.saved == 1 - 1820 / 2880
    assert plan.tokens_per_second == pytest.approx(1820 / (4 / 3))
    assert plan.frame_ends.tolist() == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3])


def test_a_token_of_another_size():
    plan = a_plan(settings={"token_side": 32}, slow_size=(640, 1152), fast_size=(320, 608))
    assert plan.side == 32 and a_plan().side == 28
    assert plan.tokens == 2 * 20 * 36 + 2 * 10 * 19 and plan.tokens_per_frame.tolist() == [720, 190, 190, 720]
    assert "1152x640, 720 tokens each" in plan.summary() and plan.frame_table().split()[-1] == "720"


def test_a_frame_with_two_entries():
    plan = two_stream_plan()
    assert plan.tokens == 2 * 720 + 3 * 190 and plan.all_slow_tokens == 3 * 720
    assert plan.frame_ends.tolist() == [0.5, 0.5, 1.0, pytest.approx(1.2), pytest.approx(1.2)]
    assert plan.tokens_per_second == pytest.approx(plan.tokens / 1.2)
    assert VideoPlan.from_json(plan.to_json()) == plan and len(plan.frame_table().splitlines()) == 6


@pytest.mark.parametrize(
    ("times", "duration", "span"),
    [
        ([0.0, 0.5, 1.0], 1.3, (0.0, 1.3)),  # a complete clip
        ([0.04, 0.5, 1.0], 1.5, (0.0, 1.5)),  # one whose first frame comes late
        ([0.0, 0.5, 1.0], 1.0, (0.0, 1.5)),  # one that claims to end with its last frame
        ([10.0, 10.5, 11.0], 60.0, (10.0, 11.5)),  # part of one
        ([0.0], 7.0, (0.0, 7.0)),
        ([0.0], 0.0, (0.0, 1 / 3)),
    ],
)
def test_the_span_of_a_plan(times, duration, span):
    count = len(times)
    plan = a_plan([0] * count, [math.nan] * count, timestamps=torch.tensor(times), duration=duration)
    assert plan.span == pytest.approx(span)
    assert plan.tokens_per_second == pytest.approx(720 * count / (span[1] - span[0]))


@given(st.lists(st.tuples(st.sampled_from([0, 1]), scores, st.floats(0, 1e5, width=32)), min_size=1, max_size=30))
def test_json_is_exact(rows):
    types, similarity, times = zip(*rows, strict=True)
    times = sorted(times)
    plan = a_plan(types, similarity, timestamps=torch.tensor(times, dtype=torch.float32))
    again = VideoPlan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)
    for name in ("frame_types", "timestamps", "frame_indices", "similarity"):
        one, other = getattr(plan, name), getattr(again, name)
        assert one.dtype == other.dtype and torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))
    assert again.slow_size == plan.slow_size and again.warnings == plan.warnings and again.settings == plan.settings


def test_save_and_load(tmp_path):
    a_plan().save(tmp_path / "plan.json")
    assert VideoPlan.load(tmp_path / "plan.json") == a_plan()
    assert a_plan() != a_plan(duration=9.0)


def test_wrong_files_are_one_sentence(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "torn.json").write_text(a_plan().to_json()[:50])
    (tmp_path / "other.json").write_text('{"source": "x"}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name in ("none", "list", "torn", "other", "binary"):
        with pytest.raises(VideoError, match=rf"/{name}\.json.*(make the plan again|does not exist)"):
            VideoPlan.load(tmp_path / f"{name}.json")


NAN, INF = float("nan"), float("inf")
NONSENSE = [
    *(("frame_types", value) for value in (None, [], [0, 1], [0, 1, 2, 0], [0, 1.0, 1, 0], [0, True, 1, 0], "0110", 3)),
    *(("timestamps", value) for value in ([0, 2, 1, 3], [0, NAN, 1, 2], [0, "1", 2, 3], [0, 1, 2, INF], {}, [None])),
    *(("frame_indices", value) for value in ([0, -1, 2, 3], [0, 1.5, 2, 3], [0, "1", 2, 3])),
    *(("similarity", value) for value in ([None, 95, 1, 1], [None, -1, 1, 1], [None, "x", 1, 1], [None, INF, 1, 1])),
    *((name, value) for name in ("slow_size", "fast_size") for value in ([28, 30], [0, 28], [28], "28", [28.0, 28])),
    *(("source_size", value) for value in ([0, 720], [720], [-5, 5], None)),
    *(("max_tokens", value) for value in (0, -1, "many", 8000.5, True, None)),
    *(("duration", value) for value in (-1, NAN, "long", None)),
    *(("settings", value) for value in (None, [], "adaptive", {"token_side": 0}, {"token_side": "28"})),
    *(("warnings", value) for value in ("text", [1], None)),
    *(("source", value) for value in (3, None)),
]


@pytest.mark.parametrize(("key", "value"), NONSENSE)
def test_invalid_values_are_refused_by_key(key, value):
    values = a_plan().to_dict()
    assert VideoPlan.from_dict(values) == a_plan() and len(values["frame_types"]) == 4
    with pytest.raises(VideoError, match="this is not a video plan") as error:
        VideoPlan.from_dict({**values, key: value})
    named = "token_side" if isinstance(value, dict) and value else key
    assert named in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize("values", [None, 3, "plan", [], {}, {"source": "x"}])
def test_values_that_are_not_a_plan(values):
    with pytest.raises(VideoError, match="not a video plan"):
        VideoPlan.from_dict(values)


def test_a_path_that_cannot_be_written_to_is_one_sentence(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for write in (a_plan().save, a_plan().to_html, a_plan().plot):
        for path in (tmp_path / "folder.png", tmp_path / "none" / "a.json", "/proc/a.png"):
            with pytest.raises(VideoError, match="cannot be written to") as error:
                write(path)
            assert "\n" not in str(error.value)


def test_summary_and_table():
    text = a_plan().summary()
    assert "2 frames of 1008x560, 720 tokens each" in text and "1820 of 5000" in text and "2880" in text
    assert text.count("warning") == 2
    lines = a_plan().frame_table().splitlines()
    assert len(lines) == 5 and lines[1].split() == ["0.00", "0", "slow", "-", "1008x560", "720"]
    assert lines[2].split() == ["0.33", "8", "fast", "0.970", "532x280", "190"]


@pytest.mark.parametrize("count", [1, 2, 40])
def test_plot_of_a_file_has_its_filmstrip(tmp_path, count):
    path = write_video(tmp_path / "clip.mp4", numbered(count * 12 + 1))
    plan = SlowFastEncoder().plan(path)
    plan.plot(tmp_path / "with.png")
    moved = VideoPlan.from_dict({**plan.to_dict(), "source": "gone.mp4"})
    moved.plot(tmp_path / "without.png")
    with Image.open(tmp_path / "with.png") as with_strip, Image.open(tmp_path / "without.png") as without:
        assert with_strip.width == without.width >= 1000 and with_strip.height > without.height
        assert len(with_strip.convert("RGB").getcolors(1 << 20)) > len(without.convert("RGB").getcolors(1 << 20))


def test_plot_of_given_frames(tmp_path):
    frames = torch.randint(0, 256, (6, 3, 60, 40), dtype=torch.uint8)
    encoded = SlowFastEncoder(policy="uniform:3")(frames)
    encoded.plan.plot(tmp_path / "a.png", frames)
    encoded.plan.plot(tmp_path / "b.svg", encoded.pictures())
    assert (tmp_path / "b.svg").read_text().lstrip().startswith("<?xml")
    with pytest.raises(VideoError, match="6 frames but 2 pictures"):
        encoded.plan.plot(tmp_path / "c.png", frames[:2])
    with pytest.raises(VideoError, match="cannot be written"):
        encoded.plan.plot(tmp_path / "none" / "c.png", frames)
