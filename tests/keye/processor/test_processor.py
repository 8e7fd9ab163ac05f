"""The processor end to end: messages → text, consistent ids, labels, positions and pixels."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, pipeline

from keye import KeyeConfig, KeyeForConditionalGeneration, KeyeProcessor, SlowFastEncoder
from keye.errors import ArgumentError, KeyeError, ManifestError


def clip(frames: int, changes_at: int, seed: int = 0) -> np.ndarray:
    """Two static scenes: uint8 [T, 3, 112, 112]."""
    pictures = np.random.default_rng(seed).integers(0, 255, (2, 3, 4, 4), dtype=np.uint8).repeat(28, 2).repeat(28, 3)
    return pictures[(np.arange(frames) >= changes_at).astype(int)]


def chat(video: np.ndarray, answer: str | None = "red") -> list[dict]:
    user = {"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "Which colour?"}]}
    return [user] if answer is None else [user, {"role": "assistant", "content": answer}]


def test_text_of_a_turn_is_chatml(processor: KeyeProcessor) -> None:
    text = processor.apply_chat_template(chat(clip(2, 1), None), add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Which colour?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_stream_of_a_clip_with_one_cut(processor: KeyeProcessor) -> None:
    sample = processor.sample(chat(clip(4, 2)))
    assert sample.plans[0].frame_types.tolist() == [0, 1, 0, 1]
    pad = "<|video_pad|>"
    slow, fast = f"<|frame|>{{}}{pad * 16}", f"<|frame|>{{}}<|fast_start|>{pad * 4}<|fast_end|>"
    video = slow.format("0.0") + fast.format("0.5") + slow.format("1.0") + fast.format("1.5")
    assert processor.decode(sample.input_ids) == (
        f"<|im_start|>user\n<|vision_start|>{video}<|vision_end|>Which colour?<|im_end|>\n"
        "<|im_start|>assistant\nred<|im_end|>\n"
    )
    assert processor.decode(sample.labels[sample.labels != -100]) == "red<|im_end|>"
    assert sample.visual_tokens == sample.plans[0].tokens == 40
    assert sample.pixel_values_videos.shape == (160, 3, 14, 14)


def test_left_and_right_padding_have_the_same_rows(processor: KeyeProcessor) -> None:
    samples = [processor.sample(chat(clip(4, 2))), processor.sample(chat(clip(2, 1)))]
    for side in ("left", "right"):
        batch = processor.collate(samples, side)
        for row, sample in enumerate(samples):
            real = batch["attention_mask"][row].bool()
            assert torch.equal(batch["input_ids"][row, real], sample.input_ids)
            assert torch.equal(batch["position_ids"][:, row, real], sample.position_ids)
    assert len(batch["video_grid_thw"]) == 6


def test_processor_and_model_agree_and_load_through_auto_classes(processor: KeyeProcessor, tmp_path) -> None:
    torch.manual_seed(0)
    config = processor.configure(KeyeConfig.preset("tiny", vocab_size=len(processor.tokenizer)))
    model = KeyeForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.encoder == processor.encoder and again.image == processor.image
    inputs = again.apply_chat_template(
        [chat(clip(4, 2), None), chat(clip(3, 1), None)], tokenize=True, padding=True, add_generation_prompt=True
    )
    rows = [processor.sample(chat(clip(*c), None), add_generation_prompt=True) for c in ((4, 2), (3, 1))]
    positions = processor.collate(rows, "left")["position_ids"]
    with torch.inference_mode():
        told = model(**inputs, position_ids=positions).logits
        found = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert torch.equal(told[real], found[real])  # the model finds the positions that the processor gives
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_encoder_alone_gives_the_models_features(processor: KeyeProcessor, tmp_path) -> None:
    config = processor.configure(KeyeConfig.preset("tiny", vocab_size=len(processor.tokenizer)))
    KeyeForConditionalGeneration(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    video = SlowFastEncoder.from_pretrained(tmp_path)(torch.from_numpy(clip(4, 2)))
    assert video.features.shape == (video.plan.tokens, config.text_config.hidden_size)


def test_batch_of_rows_with_and_without_media(processor: KeyeProcessor) -> None:
    """A row of text with rows of videos; either side; each row equals the row alone, and has its plans."""
    chats = [chat(clip(4, 2), None), [{"role": "user", "content": "Which?"}], chat(clip(3, 1), None)]
    alone = [processor.sample(one, add_generation_prompt=True) for one in chats]
    for side in ("left", "right"):
        inputs = processor.apply_chat_template(
            chats, tokenize=True, add_generation_prompt=True, padding=True, padding_side=side, return_tensors="pt"
        )
        assert set(inputs) == {"input_ids", "attention_mask", "pixel_values_videos", "video_grid_thw"}
        for row, sample in enumerate(alone):
            real = inputs["attention_mask"][row].bool()
            assert torch.equal(inputs["input_ids"][row, real], sample.input_ids)
            assert bool(real[-1]) == (side == "left" or len(sample) == inputs["input_ids"].shape[1])
        assert inputs.num_frames.tolist() == [4, 3]
        assert inputs.plans == [alone[0].plans, [], alone[2].plans]
        assert inputs.warnings == [list(alone[0].plans[0].warnings), [], list(alone[2].plans[0].warnings)]
    assert set(inputs) <= set(processor.model_input_names)
    moved = inputs.to(torch.bfloat16)
    assert moved["pixel_values_videos"].dtype == torch.bfloat16 and moved.plans[0] == alone[0].plans
    again = pickle.loads(pickle.dumps(inputs))  # as from a loader's worker
    assert again.plans == inputs.plans and torch.equal(again["input_ids"], inputs["input_ids"])
    assert set(type(inputs)(dict(inputs))) == set(inputs)  # as accelerate moves a batch


def test_call_takes_text_and_media_as_transformers_does(processor: KeyeProcessor) -> None:
    still, one, two = np.zeros((56, 84, 3), np.uint8), clip(4, 2), clip(3, 1)
    picture, video = ("<|vision_start|><|" + kind + "_pad|><|vision_end|>" for kind in ("image", "video"))
    texts = [f"{picture}a{video}", f"{video}b"]
    flat = processor(text=texts, images=[still], videos=[one, two], padding=True, return_tensors="pt")
    nested = processor(text=texts, images=[[still], []], videos=[[one], [two]], padding=True)
    assert flat["pixel_values"].shape == (24, 588) and flat["pixel_values_videos"].ndim == 2
    bare = processor([still], texts, [one, two])  # in transformers' order; rows that differ are lists, and not padded
    rows = [row[mask.bool()].tolist() for row, mask in zip(flat["input_ids"], flat["attention_mask"], strict=True)]
    assert bare["input_ids"] == rows and torch.equal(bare["pixel_values"], flat["pixel_values"])
    arrays = processor([still], texts, [one, two], padding=True, return_tensors="np")
    for name in flat:
        assert isinstance(arrays[name], np.ndarray) and np.array_equal(arrays[name], flat[name].numpy())
    kinds = processor([still], texts, [one, two], padding=True, return_mm_token_type_ids=True)["mm_token_type_ids"]
    assert torch.equal(kinds == 1, flat["input_ids"] == processor.image_token_id)
    assert torch.equal(kinds == 2, flat["input_ids"] == processor.video_token_id)
    assert (processor.image_token, processor.video_token) == ("<|image_pad|>", "<|video_pad|>")
    for name in flat:
        assert torch.equal(flat[name], nested[name])
    single = processor(text=f"{picture}a", images=still)
    assert single["image_grid_thw"].tolist() == [[1, 4, 6]] and "video_grid_thw" not in single
    assert processor(text=f"{video}b", videos=two)["video_grid_thw"].shape == (3, 3)
    assert processor(text="red")["input_ids"].shape[0] == 1
    built = processor.build(f"{picture}a{video}", [still], [one])
    assert torch.equal(built.input_ids, flat["input_ids"][0, flat["attention_mask"][0].bool()])
    options = processor(text=f"{picture}{video}", images=still, videos=two, images_kwargs={"max_tokens": 4},
                        processor_kwargs={"videos_kwargs": {"num_frames": 2}})  # fmt: skip
    assert int(options["image_grid_thw"].prod()) // 4 <= 4 and options.num_frames.tolist() == [2]
    for texts, media in ((f"{video}b", {}), ("b", {"videos": one}), ([video, video], {"videos": [one]})):
        with pytest.raises(ManifestError, match="placeholders"):
            processor(text=texts, **media)


def test_padding_truncation_and_max_length(processor: KeyeProcessor) -> None:
    chats = [chat(clip(8, 4), None), [{"role": "user", "content": "Which?"}]]

    def ids(**kwargs: object) -> torch.Tensor:
        return processor.apply_chat_template(chats, tokenize=True, **{"padding": True, **kwargs})["input_ids"]

    longest = ids().shape[1]
    assert ids(padding="longest").shape[1] == ids(max_length=9, truncation=False).shape[1] == longest
    assert ids(max_length=60).shape[1] <= 60 and ids(max_length=60, truncation=True).shape[1] <= 60
    assert ids(padding="max_length", max_length=longest + 7).shape == (2, longest + 7)
    assert ids(padding=None, text_kwargs={"padding": "max_length"}, max_length=60).shape == (2, 60)
    assert ids(pad_to_multiple_of=64).shape[1] == -(-longest // 64) * 64
    assert [len(row) for row in ids(padding=False)] == [longest, min(map(len, ids(padding=None)))]
    with pytest.raises(KeyeError, match="padding is False"):
        ids(padding=False, return_tensors="pt")
    cut = processor.apply_chat_template(chats, tokenize=True, max_length=60)
    assert ["max_length=60" in " ".join(row) for row in cut.warnings] == [True, False]


def test_assistant_masks_and_ids_alone(processor: KeyeProcessor) -> None:
    inputs = processor.apply_chat_template(chat(clip(2, 1)), tokenize=True, return_assistant_tokens_mask=True)
    assert processor.decode(inputs["input_ids"][inputs["assistant_masks"].bool()]) == "red<|im_end|>"
    ids = processor.apply_chat_template(chat(clip(2, 1)), tokenize=True, return_dict=False)
    assert ids == inputs["input_ids"].tolist()
    assert processor.batch_decode(ids, skip_special_tokens=True)[0].endswith("Which colour?\nassistant\nred\n")
    assert processor.post_process_image_text_to_text(ids)[0].endswith("red\n")


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"do_rescale": True}, "has no argument do_rescale"),
        ({"processor_kwargs": {"sizes": 3}}, "has no argument sizes"),
        ({"num_frame": 3}, "has no argument num_frame; use .*, fps, num_frames"),
        ({"tools": [{}]}, "tools is not supported"),
        ({"return_tensors": "tf"}, "return_tensors is 'tf'"),
        ({"padding": "most"}, "padding is 'most'"),
        ({"padding": "max_length"}, "without a max_length"),
        ({"padding_side": "top"}, "padding_side is 'top'"),
        ({"truncation": "longest_first"}, "truncation is 'longest_first'"),
        ({"max_length": 2.5}, "max_length is 2.5"),
        ({"add_special_tokens": True}, "add_special_tokens is not supported"),
        ({"max_length": 90, "text_kwargs": {"max_length": 80}}, "max_length is given twice"),
        ({"videos_kwargs": {"size": 3}}, "size is not known"),
    ],
)
def test_unknown_arguments_are_refused_by_name(processor: KeyeProcessor, kwargs: dict, match: str) -> None:
    with pytest.raises(KeyeError, match=match):
        processor.apply_chat_template(chat(clip(2, 1), None), tokenize=True, **kwargs)
    with pytest.raises(KeyeError, match=match):
        processor(text="red", **kwargs)
    processor(text="red", tools=None, load_audio_from_video=False, return_tensors=None)  # what servers pass along


def test_a_template_marks_the_assistants_words(processor: KeyeProcessor) -> None:
    """`{% generation %}` marks the words, also if turns do not look like Keye's and words contain special tokens."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}!{% endgeneration %}"
        "{% else %}Q: {% for part in m.content %}{% if part.type == 'video' %}<|vision_start|><|video_pad|>"
        "<|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    for answer in ("red", "say <|im_end|> twice"):
        question = {"role": "user", "content": [{"type": "video", "video": clip(2, 1)}, {"type": "text", "text": "Wh"}]}
        messages = [question, {"role": "assistant", "content": answer}, {"role": "user", "content": []}]
        options = {"tokenize": True, "return_assistant_tokens_mask": True}
        inputs = processor.apply_chat_template(messages, template, **options)
        marked = inputs["input_ids"][inputs["assistant_masks"].bool()]
        assert processor.decode(marked).lstrip() == answer + "!"
        own = processor.apply_chat_template(messages[:2], **options)
        text = processor.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
        plain = processor.apply_chat_template(messages[:2], text, **options)
        for name in own:
            assert torch.equal(own[name], plain[name]), name
        assert processor.decode(own["input_ids"][own["assistant_masks"].bool()]) == answer + "<|im_end|>"


def test_enable_thinking_is_another_name_of_thinking(processor: KeyeProcessor) -> None:
    chats = [{"role": "user", "content": "red"}]
    options = {"add_generation_prompt": True}
    for mode in (True, False):
        expected = processor.apply_chat_template(chats, thinking=mode, **options)
        assert expected != processor.apply_chat_template(chats, **options)
        assert processor.apply_chat_template(chats, enable_thinking=mode, **options) == expected
        assert processor.apply_chat_template(chats, enable_thinking=mode, thinking=mode, **options) == expected
    with pytest.raises(ArgumentError, match="thinking is given twice"):
        processor.apply_chat_template(chats, enable_thinking=True, thinking=False)
    with pytest.raises(ArgumentError, match="has no argument thinkin; use .*, thinking$"):
        processor.apply_chat_template(chats, thinkin=True)
    with pytest.raises(ArgumentError, match="has no argument enable_thinking"):
        processor(text="red", enable_thinking=True)


def test_variables_of_a_template_reach_it(processor: KeyeProcessor) -> None:
    template = "{% if enable_thinking %}think: {% endif %}{{ messages[0].content }}"
    chats = [{"role": "user", "content": "red"}]
    assert processor.apply_chat_template(chats, template, enable_thinking=True) == "think: red"
    assert processor.apply_chat_template(chats, template, enable_thinking=False) == "red"


def test_tool_calls_become_text(processor: KeyeProcessor) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "ball"}}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = processor.apply_chat_template(messages)
    assert '<tool_call>\n{"name": "look", "arguments": {"at": "ball"}}\n</tool_call><|im_end|>' in text
    with pytest.raises(ManifestError, match="only assistant messages may have them"):
        processor.apply_chat_template([{"role": "user", "content": "hi", "tool_calls": [call]}])


def test_metadata_and_sampling_of_frames(processor: KeyeProcessor) -> None:
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    frames = clip(8, 4)
    known = {"fps": 4.0, "total_num_frames": 8, "frames_indices": None}
    sampled = processor(text=video, videos=frames, video_metadata=[known])
    every = processor(text=video, videos=frames, video_metadata=[known], do_sample_frames=False)
    assert sampled.num_frames.tolist() == [4] and every.num_frames.tolist() == [8]  # at the encoder's 2 frames a second
    assert every.plans[0][0].timestamps.tolist() == [index / 4 for index in range(8)]
    placed = {"fps": 10.0, "frames_indices": [0, 5, 10, 15, 20, 25, 30, 75]}
    told = processor(text=video, videos=frames, video_metadata=[placed])
    assert told.plans[0][0].timestamps.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 7.5]
    with pytest.raises(KeyeError, match="video_metadata has 2 entries"):
        processor(text=video, videos=frames, video_metadata=[known, known])


def test_saved_settings_come_back_in_a_process_of_their_own(processor: KeyeProcessor, tmp_path) -> None:
    """`import keye` is all that another process needs; without remote code, and no setting is lost."""
    settings = {**processor.encoder, "policy": "adaptive:max_gap=3", "threshold": 0.61, "fps": 1.5, "max_frames": 9}
    own = KeyeProcessor(processor.tokenizer, settings, {"max_tokens": 9}, chat_template="{{ 'own' }}")
    config = own.configure(KeyeConfig.preset("tiny", vocab_size=len(own.tokenizer)))
    KeyeForConditionalGeneration(config).save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    code = (
        "import keye, json, sys\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer\n"
        "m = AutoModelForImageTextToText.from_pretrained(sys.argv[1])\n"
        "p = AutoProcessor.from_pretrained(sys.argv[1])\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "kinds = [type(x).__name__ for x in (p, m)]\n"
        "print(json.dumps([kinds, p.encoder, p.image, p.chat_template, len(t), t.eos_token]))\n"
    )
    told = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    kinds, encoder, image, template, size, end = json.loads(told.stdout.splitlines()[-1])
    assert kinds == ["KeyeProcessor", "KeyeForConditionalGeneration"]
    assert (encoder, image, template) == (own.encoder, {"max_tokens": 9}, "{{ 'own' }}")
    assert (size, end) == (len(own.tokenizer), "<|im_end|>")
    assert encoder["policy"] == "adaptive:max_gap=3" and encoder["max_frames"] == 9


def test_directory_with_few_settings_loads(processor: KeyeProcessor, tmp_path) -> None:
    """Older runs wrote only the settings that a recipe named."""
    processor.save_pretrained(tmp_path)
    few = {"encoder": {"fps": 2.0, "max_tokens": 512}, "image": {"max_tokens": 16}, "processor_class": "KeyeProcessor"}
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text(json.dumps(few))
    loaded = KeyeProcessor.from_pretrained(tmp_path)
    then = SlowFastEncoder(fps=2.0, max_tokens=512, slow_multiple=0)  # which did not exist
    assert loaded.encoder == then.settings and loaded.image == {"max_tokens": 16}


def test_processor_can_be_sent_to_workers(processor: KeyeProcessor) -> None:
    again = pickle.loads(pickle.dumps(processor))
    assert torch.equal(again.sample(chat(clip(4, 2))).input_ids, processor.sample(chat(clip(4, 2))).input_ids)


def test_pipeline_of_transformers_answers_a_chat(processor: KeyeProcessor, tmp_path) -> None:
    torch.manual_seed(0)
    config = processor.configure(KeyeConfig.preset("tiny", vocab_size=len(processor.tokenizer)))
    model = KeyeForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    answer = pipeline("image-text-to-text", model=str(tmp_path), dtype=torch.float32)
    asked = chat(clip(4, 2), None)
    told = answer(text=asked, max_new_tokens=4, return_full_text=False, generate_kwargs={"do_sample": False})
    inputs = processor.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert told[0]["generated_text"] == processor.decode(ids[0], skip_special_tokens=True)
