"""What is sent of a video: the frames of its plan with their seconds, or the clip."""

import base64
import io
import json

import pytest
from PIL import Image

from keye.encoder import SlowFastEncoder
from keye.errors import KeyeError
from rl.questions.prompts import load_prompts
from rl.reasoning.media import Media
from tests.rl.reasoning.questions import write_questions


def picture(part):
    return Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))


def test_a_video_is_the_frames_of_its_plan_at_their_sizes_and_seconds(tmp_path):
    prompt = load_prompts(write_questions(tmp_path, 1)).prompts[0]
    shown = Media("frames", 600).show(prompt)
    plan = SlowFastEncoder(max_tokens=600).plan(tmp_path / "clip0.mp4")
    assert min(plan.counts) > 0
    content = shown.messages[0]["content"]
    pictures = [picture(part) for part in content if part["type"] == "image_url"]
    assert [one.size[::-1] for one in pictures] == plan.frame_sizes
    before = [content[place - 1]["text"] for place, part in enumerate(content) if part["type"] == "image_url"]
    kinds = ["fast" if kind else "slow" for kind in plan.frame_types.tolist()]
    assert before == [f"{t:.1f} s, {k}:" for t, k in zip(plan.timestamps.tolist(), kinds, strict=True)]
    assert content[-1] == {"type": "text", "text": "Which colour is number 0?"} and shown.plans == [plan.counts]
    assert shown.visual_tokens >= plan.tokens


def with_part(tmp_path, **more):
    path = write_questions(tmp_path, 1)
    row = json.loads(path.read_text())
    row["messages"][0]["content"][0] |= more
    path.write_text(json.dumps(row))
    return load_prompts(path).prompts[0]


def test_options_of_a_video_change_its_plan(tmp_path):
    part = Media("frames", 600).show(with_part(tmp_path, policy="all_slow"))
    assert part.plans[0][1] == 0
    early = Media("frames", 600).show(with_part(tmp_path, end=1.0))
    assert sum(early.plans[0]) < sum(part.plans[0])


def test_a_clip_is_a_path_or_its_bytes_and_its_key_is_its_content(tmp_path):
    prompt = with_part(tmp_path, start=0.25)
    clip = (tmp_path / "clip0.mp4").resolve()
    local = Media("clip", local=True).show(prompt)
    part = local.messages[0]["content"][0]
    assert part == {"type": "video_url", "video_url": {"url": str(clip)}, "start": 0.25}
    under = Media("clip", clip_root=tmp_path).show(prompt)
    assert under.messages[0]["content"][0]["video_url"]["url"] == "clip0.mp4"
    data = Media("clip").show(prompt).messages[0]["content"][0]["video_url"]["url"]
    assert base64.b64decode(data.partition(",")[2]) == clip.read_bytes()
    assert len({*local.files.values(), *under.files.values()}) == 1
    with pytest.raises(KeyeError, match="--clip-root"):
        Media("clip", clip_root=tmp_path / "other").show(prompt)


def test_an_option_that_a_server_does_not_accept_is_refused_and_not_lost(tmp_path):
    with pytest.raises(KeyeError, match="the option policy .* --send frames"):
        Media("clip", local=True).show(with_part(tmp_path, policy="all_slow"))
