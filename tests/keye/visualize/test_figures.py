import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from keye.encoder import SlowFastEncoder
from keye.errors import VideoError
from keye.visualize.figures import TimelineEntries, pictures_of, strip_frames, time_ticks
from keye.visualize.page import MOST_BYTES
from tests.keye.slowfast.test_plan import a_plan, two_stream_plan
from tests.keye.video.make import number_of, numbered, write_video


def odd_plans():
    one = a_plan((0,), (math.nan,), duration=0.0)
    many = a_plan([0, 1, 1, 1, 1] * 273, [math.nan, *[0.5] * 1364])
    slow = a_plan((0, 0, 0), (math.nan, math.nan, 0.1), settings={"policy": "all_slow"})
    epoch = a_plan(timestamps=torch.full((4,), 1.7e9), duration=1.7e9 + 4)  # one time in float32
    late = a_plan(timestamps=torch.tensor([100.0, 101.0, 102.0, 103.0]), duration=500.0)
    wide = a_plan(settings={"policy": "adaptive_budget:share=0.2", "threshold": 0.41, "token_side": 28, "fps": 3.0})
    return {
        "one": one,
        "many": many,
        "slow": slow,
        "late": late,
        "epoch": epoch,
        "wide": wide,
        "two": two_stream_plan(),
    }


class Page(HTMLParser):
    """The elements of a page by tag, their text, and all references to other files."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.texts.append((self.tags[-1] if self.tags else "", text))

    def data(self) -> dict:
        return json.loads(next(text for tag, text in self.texts if tag == "script" and text.startswith("{")))


@pytest.mark.parametrize("name", odd_plans())
def test_odd_plans_are_drawn_and_written(name, tmp_path):
    plan = odd_plans()[name]
    plan.plot(tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.width >= 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 10
    page = Page(plan.to_html(tmp_path / "plan.html"))
    assert page.tags.count("tr") == len(plan) + 1 + len(plan.settings)
    assert page.data()["starts"] == pytest.approx(plan.timestamps.tolist(), abs=1e-4)
    numbers = [float(n) for tag, a in page.attributes if tag == "path" for n in re.findall(r"-?[\d.]+", a["d"])]
    assert numbers and all(math.isfinite(number) and -200 <= number <= 1000.1 for number in numbers)


@given(st.lists(st.tuples(st.floats(0.01, 5), st.integers(0, 2)), min_size=1, max_size=40), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_no_token_is_lost_between_the_windows(steps, bins):
    times, types = [], []
    for gap, kind in steps:  # kind 2: the frame is there slow and fast
        time = (times[-1] if times else 0) + gap
        times += [time, time] if kind == 2 else [time]
        types += [0, 1] if kind == 2 else [kind]
    scores = [math.nan] * len(types)
    plan = a_plan(types, scores, timestamps=torch.tensor(times, dtype=torch.float32), duration=times[-1] + 1)
    lanes = TimelineEntries.of(plan)
    edges, rate = lanes.rate(bins)
    assert float((rate * np.diff(edges)).sum()) == pytest.approx(plan.tokens, rel=1e-6)
    assert len(rate) == bins and (rate >= 0).all()
    later = [t for t in times if t > times[0]]
    assert lanes.ends[0] == pytest.approx(later[0] if later else plan.span[1], abs=1e-3)
    assert (lanes.ends > lanes.starts).all()


def test_blocks_of_one_time_are_stacked():
    lanes = TimelineEntries.of(two_stream_plan())
    assert lanes.bottoms.tolist() == [0, 720, 0, 0, 720] and lanes.top == 910


@given(st.floats(0, 1e5), st.floats(0.01, 1e7))
@settings(deadline=None)
def test_the_marks_of_the_time_axis_are_round_and_few(start, length):
    marks = time_ticks(start, start + length)
    assert len(marks) <= 8 and (len(marks) >= 2 or length < 1)
    for time, text in marks:
        assert start - 1e-3 * length <= time <= start + 1.001 * length
        parts = [float(part) for part in text.removesuffix(" s").split(":")]
        assert sum(part * 60**place for place, part in enumerate(reversed(parts))) == pytest.approx(time, abs=1e-6)


def test_the_strip_is_in_the_order_of_time():
    plan = odd_plans()["many"]
    chosen = strip_frames(plan, 10)
    assert len(chosen) == 10 and chosen == sorted(chosen) and all(plan.frame_types[entry] == 0 for entry in chosen)
    assert strip_frames(two_stream_plan(), 10) == [0, 2, 3]
    assert strip_frames(a_plan((0,), (math.nan,)), 10) == [0]


def test_pictures_are_those_of_the_entries(tmp_path):
    path = write_video(tmp_path / "clip.mp4", numbered(60))
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, frame in enumerate(numbered(12)):
        Image.fromarray(frame).save(folder / f"{index}.png")
    for source, options in ((path, {"fps": 5}), (folder, {"source_fps": 3.0})):
        fps = options.pop("fps", 2.0)
        plan = SlowFastEncoder(fps=fps).plan(source, **options)
        found = pictures_of(plan, range(2, len(plan)), None)
        assert list(found) == list(range(2, len(plan)))
        for entry, picture in found.items():
            assert number_of(torch.from_numpy(picture.copy())) == plan.frame_indices[entry]


def test_the_page_needs_nothing_and_escapes_everything(tmp_path):
    evil = '</script><img src=x onerror="alert(1)">&amp;"\''
    plan = a_plan(source=evil, warnings=(evil,), settings={"measure": evil, evil: evil, "threshold": 0.5})
    page = Page(plan.to_html())
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert sum(text == evil for _, text in page.texts) == 5  # the path, the warning, a setting's name and two values
    policy = next(a["content"] for tag, a in page.attributes if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    for _, attributes in page.attributes:
        assert not {"src", "href", "srcset", "onclick", "onload"} & set(attributes)


def test_pictures_in_the_page_are_small_and_those_of_their_frames(tmp_path):
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (300, 3, 90, 160), dtype=torch.uint8, generator=generator)  # hard to compress
    plan = SlowFastEncoder(policy="uniform:7", min_tokens_per_frame=4).plan(frames)
    text = plan.to_html(frames=frames)
    data = Page(text).data()
    pictures = data["pictures"]
    assert 200 <= len(pictures) == len(data["at"]) <= 240 and all(p.startswith("data:image/jpeg;") for p in pictures)
    assert sum(map(len, pictures)) <= MOST_BYTES * 4 / 3 + 100 * len(pictures) and len(text) < 2_300_000
    assert {*range(0, 300, 7)} <= set(data["at"])
    with pytest.raises(VideoError, match="300 frames but 2 pictures"):
        plan.to_html(frames=frames[:2])
    with pytest.raises(VideoError, match="cannot be written"):
        a_plan().to_html(tmp_path / "none" / "plan.html")
