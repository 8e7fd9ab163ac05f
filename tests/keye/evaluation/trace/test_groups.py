"""Groups of tokens, against a hand-written stream and the processor's own counts."""

import pytest
import torch
from PIL import Image

from keye.evaluation.trace import groups_of, of_kind, words_of
from tests.keye.evaluation.trace.parts import keye_parts, keye_prompt, write_clip

MOTION = {"size": 32, "width": 8, "blocks": [1, 1]}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "a.mp4")
    write_clip(folder / "b.mp4", (220, 40, 40, 160), 1)
    Image.new("RGB", (56, 56), (200, 30, 90)).save(folder / "c.png")
    model, processor = keye_parts()
    return processor, *keye_prompt(model, processor, folder, "a.mp4", "c.png", "b.mp4", text="Which came first?")


def test_groups_have_the_tokens_that_their_names_say(parts):
    processor, sample, prompt = parts
    tokenizer = processor.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(sample.input_ids.tolist())
    text = {g.name: tokenizer.decode(sample.input_ids[list(g.places)].tolist()) for g in prompt.groups}
    assert text["question"] == "Which came first?"
    assert text["template"].startswith("<|im_start|>user\n<|vision_start|>")
    assert text["template"].endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert text["timestamps"].startswith("<|frame|>0.0") and "<|fast_start|>" in text["timestamps"]
    assert "".join(c for c in text["timestamps"] if c not in "0123456789.").count("<|frame|>") == 10
    assert {tokens[p] for p in prompt.group("all visual tokens").places} == {"<|video_pad|>", "<|image_pad|>"}
    assert [g.name for g in of_kind(prompt.groups, "word")] == ["Which", "came", "first", "?"]


def test_frames_follow_the_plans_of_all_clips(parts):
    _, sample, prompt = parts
    frames = of_kind(prompt.groups, "frame")
    assert [len(g) for g in frames] == [n for plan in sample.plans for n in plan.tokens_per_frame.tolist()]
    assert [g.fast for g in frames] == [kind == 1 for plan in sample.plans for kind in plan.frame_types.tolist()]
    assert [g.seconds for g in frames] == pytest.approx([t for plan in sample.plans for t in plan.timestamps.tolist()])
    assert [g.frame for g in frames] == list(range(len(frames)))
    assert any(g.fast for g in frames) and not all(g.fast for g in frames)
    slow = [place for g in frames if not g.fast for place in g.places]
    assert list(prompt.group("all slow frames").places) == slow
    assert len(prompt.group("image 1")) == int(sample.image_grid_thw.prod(1)[0]) // 4


def test_the_parts_of_a_prompt_contain_every_token_once(parts):
    processor, sample, prompt = parts
    pieces = of_kind(prompt.groups, "frame", "image", "timestamps", "question", "template")
    assert sorted(place for g in pieces for place in g.places) == list(range(len(sample)))
    assert groups_of(processor, sample) == list(prompt.groups)


def test_words_are_split_at_spaces_and_punctuation(parts):
    tokenizer = parts[0].tokenizer
    ids = tokenizer("A purple square moves left. Which way, 0.5 or 12?", add_special_tokens=False)["input_ids"]
    words = words_of(tokenizer, ids)
    expected = ["A", "purple", "square", "moves", "left", ".", "Which", "way", ",", "0", ".", "5", "or", "12", "?"]
    assert [g.name for g in words] == expected
    assert sorted(place for g in words for place in g.places) == list(range(len(ids)))


@pytest.mark.parametrize(
    ("aggregation", "motion"),
    [("mean", None), ("max:layout=slow_then_fast", None), ("none", MOTION), ("mean:layout=slow_then_fast", MOTION)],
)
def test_a_prompt_has_the_tokens_that_the_model_reads_of_pooled_frames_and_of_a_motion_pathway(
    tmp_path, aggregation, motion
):
    model, processor = keye_parts(motion=motion, aggregation=aggregation)
    write_clip(tmp_path / "clip.mp4")
    Image.new("RGB", (56, 56), (200, 30, 90)).save(tmp_path / "c.png")
    sample, prompt = keye_prompt(model, processor, tmp_path, "c.png", "clip.mp4")
    with torch.no_grad():
        wanted = model(**processor.collate([sample])).logits[0, -1]
        found = model(input_ids=prompt.ids[None], position_ids=prompt.positions[:, None],
                      visual_features=prompt.features).logits[0, -1]  # fmt: skip
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    slow = sum(
        n
        for plan in sample.plans
        for n, kind in zip(plan.tokens_per_frame.tolist(), plan.frame_types.tolist(), strict=True)
        if kind == 0
    )
    assert len(prompt.group("all slow frames")) == slow  # fmt: skip
    frames = of_kind(prompt.groups, "frame")
    if "slow_then_fast" in aggregation:
        assert [g.fast for g in frames] == sorted(g.fast for g in frames) and any(g.fast for g in frames)
        assert [g.seconds for g in frames] != sorted(g.seconds for g in frames)
