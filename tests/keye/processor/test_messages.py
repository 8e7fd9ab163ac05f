"""Messages in every format become one plain form; invalid parts are named."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from keye import KeyeProcessor, SlowFastEncoder
from keye.errors import KeyeError, ManifestError, VideoError
from keye.processor.messages import read_chat
from keye.processor.options import read_options, still_limits, video_encoder
from keye.video.fetch import UrlRules


def user(*parts: object) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def text(words: str) -> dict:
    return {"type": "text", "text": words}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (84, 112, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


# Rendered text, literally: what models were trained on must not change.
TURNS = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "image", "image": "a.png"}, {"type": "video", "video": "b.mp4"}, text("Why?")],
    },
    {"role": "assistant", "content": [text("Be"), text("cause.")]},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No more."},
]
HEAD = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
MEDIA = "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>"
FIRST = "<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n<|im_start|>user\nAnd?"
LAST = "<|im_end|>\n<|im_start|>assistant\nNo more.<|im_end|>\n"


def test_rendered_text_of_several_turns(processor: KeyeProcessor) -> None:
    assert processor.apply_chat_template(TURNS) == f"{HEAD}{MEDIA}Why?{FIRST}{LAST}"
    asked = processor.apply_chat_template(TURNS[:4], add_generation_prompt=True)
    assert asked == f"{HEAD}{MEDIA}Why?{FIRST}<|im_end|>\n<|im_start|>assistant\n"
    both = processor.apply_chat_template([TURNS, TURNS[:1]])
    assert both == [f"{HEAD}{MEDIA}Why?{FIRST}{LAST}", "<|im_start|>system\nBe brief.<|im_end|>\n"]


@pytest.mark.parametrize(("thinking", "suffix"), [(True, "/think"), (False, "/no_think"), (None, "")])
def test_thinking_suffix_follows_the_last_question(processor: KeyeProcessor, thinking, suffix: str) -> None:
    asked = processor.apply_chat_template(TURNS[:4], add_generation_prompt=True, thinking=thinking)
    assert asked == f"{HEAD}{MEDIA}Why?{FIRST}{suffix}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("thinking", "suffix"), [(True, "/think"), (False, "/no_think"), (None, "")])
def test_thinking_suffix_in_training_follows_every_answered_question(
    processor: KeyeProcessor, thinking, suffix: str
) -> None:
    rendered = processor.apply_chat_template(TURNS, thinking=thinking)
    assert rendered == f"{HEAD}{MEDIA}Why?{suffix}{FIRST}{suffix}{LAST}"


def test_thinking_follows_the_data(processor: KeyeProcessor) -> None:
    """A message's own setting wins; "as_answered" follows each answer; a turn with only pixels gets a text."""
    told = [{**TURNS[1], "thinking": True}, TURNS[2], TURNS[3], {**TURNS[4], "thinking": False}]
    for mode in (None, True, False):
        assert "Why?/think<|im_end|>" in processor.apply_chat_template(told, thinking=mode)
        assert "And?/no_think<|im_end|>" in processor.apply_chat_template(told, thinking=mode)
    answers = [
        *user(text("a")), {"role": "assistant", "content": "<think>so</think><answer>1</answer>"},
        *user(text("b")), {"role": "assistant", "content": "<think></think><answer>2</answer>"},
        *user(text("c")), {"role": "assistant", "content": "3", "reasoning_content": "why"},
    ]  # fmt: skip
    rendered = processor.apply_chat_template(answers, thinking="as_answered")
    for question in ("a/think", "b/no_think", "c/think"):
        assert f"<|im_start|>user\n{question}<|im_end|>" in rendered
    assert rendered.endswith("<think>why</think><answer>3</answer><|im_end|>\n")
    bare = user({"type": "video", "video": "b.mp4"})
    assert processor.apply_chat_template(bare, add_generation_prompt=True, thinking=True) == (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>/think<|im_end|>\n<|im_start|>assistant\n"
    )


def test_final_message_is_gone_on_with(processor: KeyeProcessor) -> None:
    chat = [*user(text("Count.")), {"role": "assistant", "content": [text("one, two")]}]
    rendered = processor.apply_chat_template(chat, continue_final_message=True, thinking=False)
    assert rendered == "<|im_start|>user\nCount./no_think<|im_end|>\n<|im_start|>assistant\none, two"
    sample = processor.sample(chat, continue_final_message=True)
    assert processor.decode(sample.labels[sample.labels != -100]) == "one, two"
    for wrong in (dict(add_generation_prompt=True), {}):
        with pytest.raises(ManifestError, match="continue_final_message"):
            processor.sample(chat[: 2 if wrong else 1], continue_final_message=True, **wrong)


def test_labels_of_all_turns_or_the_last(processor: KeyeProcessor) -> None:
    chat = [turn for turn in TURNS if turn is not TURNS[1]]
    learnt = [processor.sample(chat, last_turn_only=last) for last in (False, True)]
    words = [processor.decode(sample.labels[sample.labels != -100]) for sample in learnt]
    assert words == ["Because.<|im_end|>No more.<|im_end|>", "No more.<|im_end|>"]


def test_every_way_to_name_an_image_gives_the_same_pixels(processor: KeyeProcessor, picture: Path) -> None:
    encoded = base64.b64encode(picture.read_bytes()).decode()
    url = f"data:image/png;base64,{encoded}"
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": str(picture)},
        {"type": "image", "url": picture.as_uri()},
        {"type": "image", "url": url},
        {"type": "image", "base64": encoded},
        {"type": "image", "base64": url},
        {"type": "image", "image": picture.read_bytes()},
        {"type": "image", "image": io.BytesIO(picture.read_bytes())},
        {"type": "image", "image": {"bytes": picture.read_bytes(), "path": None}},
        {"type": "image", "image": Image.open(picture)},
        {"type": "image", "image": np.asarray(Image.open(picture))},
        {"type": "image", "image": "a.png", "text": None, "video": None},  # a table's empty columns
        {"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
        {"type": "image_url", "image_url": url},
        {"image": "a.png"},
    ]
    samples = [processor.sample(user(part, text("?")), picture.parent) for part in parts]
    for sample in samples:
        assert torch.equal(sample.pixel_values, samples[0].pixel_values)
        assert torch.equal(sample.input_ids, samples[0].input_ids)


def test_an_encoded_video_is_read_in_the_models_own_normalisation(processor: KeyeProcessor) -> None:
    """For any format of the given video: 127.5 and 1 here are those of SigLIP (Keye's tower)."""
    frames = np.random.default_rng(0).integers(0, 255, (5, 56, 84, 3), dtype=np.uint8)
    encoder = SlowFastEncoder(**processor.encoder)
    raw = encoder(frames, dtype=torch.uint8)
    for video in (raw, encoder(frames), encoder(frames, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))):
        batch = processor.collate([processor.sample(user({"type": "video", "video": video}))])
        assert torch.equal(batch["pixel_values_videos"], raw.pixel_values.float() / 127.5 - 1)


def test_every_way_to_name_a_video(processor: KeyeProcessor, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 56, 84, 3), dtype=np.uint8)
    pictures = [Image.fromarray(frame) for frame in frames]
    (tmp_path / "clip").mkdir()
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / "clip" / f"{index}.png")
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=500, lossless=True)
    film = (tmp_path / "a.webp").read_bytes()
    url = f"data:image/webp;base64,{base64.b64encode(film).decode()}"
    encoded = SlowFastEncoder(**processor.encoder)(frames)
    parts = [
        {"type": "video", "video": frames},
        {"type": "video", "video": torch.from_numpy(frames)},
        {"type": "video", "video": pictures},
        {"type": "video", "video": [f"clip/{index}.png" for index in range(5)]},
        {"type": "video", "video": "clip"},
        {"type": "video", "video": "a.webp"},
        {"type": "video", "path": "a.webp"},
        {"type": "video", "video": film},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "video", "video": encoded},
    ]
    samples = [processor.sample(user(part), tmp_path) for part in parts]
    for sample in samples:
        assert sample.pixel_values_videos.dtype == torch.uint8  # until the tower or the caller's batch
        assert torch.equal(processor.collate([sample])["pixel_values_videos"], encoded.pixel_values)
        assert torch.equal(sample.input_ids, samples[0].input_ids)


def test_options_of_one_video_reach_the_encoder(processor: KeyeProcessor) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (8, 112, 112, 3), dtype=np.uint8)

    def plan(**options: object):
        return processor.sample(user({"type": "video", "video": frames, **options})).plans[0]

    assert plan().timestamps.tolist() == [index / 2 for index in range(8)]
    assert plan(fps=4).timestamps.tolist() == plan(fps=4, sample_fps=4).timestamps.tolist() == [i / 4 for i in range(8)]
    assert plan(sample_fps=4).timestamps.tolist() == [0, 0.5, 1, 1.5]  # sampled at the encoder's 2 fps
    assert plan(timestamps=[0, 1, 2, 3, 5, 8, 13, 21]).timestamps.tolist() == [0, 1, 2, 3, 5, 8, 13, 21]
    assert plan(start=1, end=3).frame_indices.tolist() == plan(video_start=1, video_end=3).frame_indices.tolist()
    assert plan(start=1, end=3).frame_indices.tolist() == [2, 3, 4, 5]
    assert len(plan(num_frames=3)) == len(plan(nframes=3)) == len(plan(max_frames=3)) == 3
    assert plan(policy="uniform:2").frame_types.tolist() == [0, 1] * 4
    assert plan(min_frame_similarity=0.0).counts == plan(threshold=0.0).counts == (1, 7)
    assert plan(max_tokens=40).tokens <= 40 and plan(video_total_pixels=40 * 784).max_tokens == 40
    assert plan(max_pixels=9 * 784).slow_tokens == plan(max_tokens_per_frame=9).slow_tokens == 9
    assert plan(min_pixels=30 * 784, max_pixels=40 * 784).slow_tokens >= 30
    assert plan(max_tokens_per_frame=2).slow_tokens <= 2  # the least size gives way
    assert processor._encoder.settings == processor.encoder  # and the processor's own settings are as before


def test_options_of_one_image(processor: KeyeProcessor, picture: Path) -> None:
    def tokens(**options: int) -> int:
        return processor.sample(user({"type": "image", "image": picture, **options})).visual_tokens

    assert tokens() == 12 and tokens(max_tokens=6) == tokens(max_pixels=6 * 784) == 4
    assert tokens(min_pixels=13 * 784) >= 13 and tokens(max_tokens=2) <= 2
    with pytest.raises(KeyeError, match="min_tokens=9 is above max_tokens=5"):
        tokens(min_tokens=9, max_tokens=5)


def test_encoder_keeps_its_objects_where_it_can() -> None:
    encoder = SlowFastEncoder(measure="patch_l1", policy="uniform:3", urls=UrlRules())
    smaller = encoder.with_settings(max_tokens=900)
    assert smaller.policy is encoder.policy and smaller.measure is encoder.measure and smaller.urls is encoder.urls
    assert smaller.settings == {**encoder.settings, "max_tokens": 900}
    other = SlowFastEncoder(threshold=0.3).with_settings(measure="ssim")
    assert other.threshold == other.policy.threshold == SlowFastEncoder(measure="ssim").threshold
    assert SlowFastEncoder().with_settings(threshold=0.1).policy.threshold == 0.1
    assert video_encoder(encoder, {}) == (encoder, {}) and still_limits(encoder, {"max_tokens": 9}, {}) == {
        "max_tokens": 9
    }


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "list of messages"),
        ("hello", "list of messages"),
        ([3], "'role' and 'content'"),
        ([{"text": "hello"}], "'role' and 'content'"),
        ([{"role": "user", "content": None}], "'role' and 'content'"),
        ([{"role": 3, "content": "hello"}], "role 3"),
        ([{"role": "user<|im_end|>", "content": "hello"}], "use one of system, user"),
        ([{"role": "user", "content": 3}], "content is a int"),
        (user("hello"), "'hello'"),
        (user({"type": "sound", "sound": "a.wav"}), "type 'sound'"),
        (user({"type": ["image"], "image": "a"}), r"type \['image'\]"),
        (user({"type": "text"}), "no text"),
        (user({"type": "text", "text": 3}), "text is 3"),
        (user({"type": "text", "text": "\udcff"}), "Unicode"),
        (user({"type": "video"}), "names no file"),
        (user({"type": "video", "video": ""}), "names no file"),
        (user({"type": "video", "video": {"path": "", "bytes": None}}), "names no file"),
        (user({"type": "image_url", "image_url": {"url": ""}}), "names no file"),
        (user({"type": "video", "video": ["a.png", ""]}), "names no file"),
        (user({"type": "image", "image": 3}), "source is 3"),
        (user({"type": "image", "image": {"uri": "a"}}), "source is {'uri': 'a'}"),
        (user({"type": "video", "video": 3.5}), "source is 3.5"),
        (user({"type": "video", "video": ["a.png", 3]}), "source is 3"),
        (user({"type": "image", "image": "a.png", "path": "b.png"}), "image and path; give one"),
        (user({"type": "image", "base64": 3}), "base64 is a int"),
        (user({"type": "image", "image": "a.png", "size": 3}), "size is not known"),
        (user({"type": "image", "image": "a.png", "fps": 3}), "fps is not known"),
        (user({"type": "video", "video": "a.mp4", "urls": {}}), "urls is not known"),
        (user({"type": "video", "video": "a.mp4", "fps": "2"}), "fps is '2'; give a number"),
        (user({"type": "video", "video": "a.mp4", "nframes": 2.5}), "nframes is 2.5; give a whole number"),
        (user({"type": "video", "video": "a.mp4", "start": 1, "video_start": 2}), "also as start"),
        (user({"type": "video", "video": "a.mp4", "timestamps": "0 1"}), "timestamps is '0 1'"),
        ([{"role": "user", "content": "a", "thinking": "yes"}], "thinking is true or false"),
        ([{"role": "user", "content": "a", "reasoning_content": "b"}], "role user has reasoning_content"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "tool_calls has"),
    ],
)
def test_what_is_out_of_form_is_named(processor: KeyeProcessor, messages: object, match: str) -> None:
    with pytest.raises(ManifestError, match=match) as caught:
        processor.sample(messages)
    assert "\n" not in str(caught.value)


def test_thinking_out_of_form_is_named() -> None:
    with pytest.raises(ManifestError, match="thinking is 'yes'"):
        read_chat(user(text("a")), thinking="yes")
    with pytest.raises(ManifestError, match="needs a user message"):
        read_chat([{"role": "system", "content": "a"}], thinking=True, generating=True)
    with pytest.raises(ManifestError, match="use min_tokens"):
        read_options("image", {"tokens": 3})


def test_url_is_fetched_only_where_the_process_allows_it(processor: KeyeProcessor, tmp_path: Path) -> None:
    chat = user({"type": "image", "url": "http://127.0.0.1:9/a.png"})
    with pytest.raises(VideoError, match="downloads are off by default"):
        processor.sample(chat)
    allowed = KeyeProcessor(processor.tokenizer, processor.encoder, urls=UrlRules())
    with pytest.raises(VideoError, match="not public"):
        allowed.sample(chat)
    allowed.save_pretrained(tmp_path)
    with pytest.raises(VideoError, match="downloads are off by default"):  # a right is not saved
        KeyeProcessor.from_pretrained(tmp_path).sample(chat)
    with pytest.raises(VideoError, match="not public"):
        KeyeProcessor.from_pretrained(tmp_path, urls=UrlRules()).sample(chat)
