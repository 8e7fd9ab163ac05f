"""The examples of the guide to feature aggregation run, and their comments state what they give."""

from pathlib import Path

import pytest

from keye import SlowFastEncoder
from keye.aggregation import Pooling, SlowFastAggregation
from scripts.clips import clip
from tests.docs.examples import check_contents, elsewhere, run_in

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "five-systems" / "aggregation.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("guide")
    (path / "clip.mp4").symlink_to(clip("carphone_pristine.mp4"))
    return path


def test_examples_run(folder):
    run_in(folder, GUIDE)
    for language, text in elsewhere(GUIDE):
        assert language == "python"
        compile(text, str(GUIDE), "exec")


def test_comments_are_true(folder):
    ours = SlowFastAggregation(
        slow=8, slow_pool=Pooling("max", factor=(2, 2)), fast_pool=Pooling(size=(2, 3)), layout="time", max_tokens=1000
    )
    assert f"# {ours.tokens(64, 17, 30)}: any number" in GUIDE.read_text()
    pixels = SlowFastEncoder(policy="two_stream:slow=4,fast_tokens=4")
    one, other = (x(folder / "clip.mp4") for x in (pixels, pixels.with_settings(aggregation="mean")))
    assert one.plan.tokens == other.plan.tokens and len(one.grid_thw) - len(other.grid_thw) == 4


def test_the_contents_lead_to_the_headings():
    check_contents(GUIDE)
