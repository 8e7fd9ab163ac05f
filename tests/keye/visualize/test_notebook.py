"""What a notebook and a prompt show of plans, videos and encoders."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from keye.encoder import SlowFastEncoder
from scripts.clips import clip
from tests.keye.video.make import numbered, write_video


class Well(HTMLParser):
    """Raises where a tag is closed that was not opened last."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def pictures(html):
    found = re.findall(r'alt="([^"]*)"[^>]*src="data:image/jpeg;base64,([^"]*)"', html)
    return [(alt, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))) for alt, data in found]


@pytest.fixture(scope="module")
def video():
    return SlowFastEncoder(fps=5, max_tokens=2000, min_tokens_per_frame=4)(clip("bikes.mp4"))


def test_the_filmstrip_shows_the_frames_at_their_times(tmp_path):
    path = write_video(tmp_path / "a <b>.mp4", numbered(72), rate=24)
    encoded = SlowFastEncoder(max_tokens_per_frame=60)(path)
    for shown in (encoded, encoded.plan):
        html = shown._repr_html_()
        strip = pictures(html)
        assert [alt.split(" s ")[0] for alt, _ in strip] == ["0.00", "0.50", "1.00", "1.50", "2.00", "2.50"]
        for (alt, picture), index in zip(strip, encoded.plan.frame_indices.tolist(), strict=True):
            assert abs(float(picture.mean()) - (8 + 3 * (index % 80))) < 4, alt
        kinds = ["slow" if kind == 0 else "fast" for kind in encoded.plan.frame_types.tolist()]
        assert [alt.split(" s ")[1] for alt, _ in strip] == kinds
        assert "<b>" not in html.replace("&lt;b&gt;", "") and {"img", "table"} <= set(Well(html).tags)


def test_long_clips_stay_small(video):
    for shown in (video, video.plan):
        html = shown._repr_html_()
        assert len(pictures(html)) == 10 < len(video.plan) and len(html) < 200_000


def test_a_repr_is_one_short_line(video):
    """It was 9,148 characters."""
    for shown in (video, video.plan, SlowFastEncoder()):
        text = repr(shown)
        assert len(text) < 260 and "\n" not in text and text.startswith(type(shown).__name__)
    slow, fast = video.plan.counts
    assert f"'bikes.mp4', 10.00 s, {slow} slow + {fast} fast frames, {video.plan.tokens} tokens" in repr(video.plan)
    assert f"{len(video.pixel_values)} patches float32" in repr(video)


def test_a_source_that_is_missing_or_has_changed_leaves_the_summary(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered(30))
    plan = SlowFastEncoder().plan(path)
    path.write_bytes(b"no video")
    for _ in range(2):
        html = plan._repr_html_()
        assert not pictures(html) and "tokens" in html and Well(html).tags
        path.unlink(missing_ok=True)
    assert not pictures(SlowFastEncoder().plan(torch.zeros(3, 3, 40, 40, dtype=torch.uint8))._repr_html_())


def test_an_encoder_shows_its_settings():
    encoder = SlowFastEncoder(policy="uniform:3")
    html = encoder._repr_html_()
    assert all(name in html for name in encoder.settings) and "uniform:3" in html and Well(html).tags
    assert eval(repr(encoder)).settings == encoder.settings
