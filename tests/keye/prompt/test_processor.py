"""The processor end to end: messages → text, ids, labels, positions and pixels that fit one another."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from keye import KeyeConfig, KeyeForConditionalGeneration, KeyeProcessor
from keye.errors import ManifestError
from keye.prompt.tokenizer import train_tokenizer

TINY = {"min_tokens_per_frame": 4, "max_tokens_per_frame": 16, "max_tokens": 512}


@pytest.fixture(scope="module")
def processor() -> KeyeProcessor:
    tokenizer = train_tokenizer(["user assistant Which colour? red or blue 0.5"] * 3, 400)
    return KeyeProcessor(tokenizer, encoder=TINY, image={"min_tokens": 4, "max_tokens": 16})


def clip(frames: int, changes_at: int, seed: int = 0) -> np.ndarray:
    """Two still pictures, one after the other: uint8 [T, 3, 112, 112]."""
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


def test_collated_left_and_right_hold_the_same_rows(processor: KeyeProcessor) -> None:
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
        [chat(clip(4, 2), None), chat(clip(3, 1), None)], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    with torch.inference_mode():
        told = model(**inputs).logits
        found = model(**{name: value for name, value in inputs.items() if name != "position_ids"}).logits
    real = inputs["attention_mask"].bool()
    assert torch.equal(told[real], found[real])  # the model finds the positions that the processor gives
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_encoder_alone_gives_the_models_features(processor: KeyeProcessor, tmp_path) -> None:
    from keye import SlowFastEncoder

    config = processor.configure(KeyeConfig.preset("tiny", vocab_size=len(processor.tokenizer)))
    KeyeForConditionalGeneration(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    video = SlowFastEncoder.from_pretrained(tmp_path)(torch.from_numpy(clip(4, 2)))
    assert video.features.shape == (video.plan.tokens, config.text_config.hidden_size)


def test_messages_out_of_form_are_named(processor: KeyeProcessor) -> None:
    with pytest.raises(ManifestError, match="role"):
        processor.sample([{"text": "hello"}])
    with pytest.raises(ManifestError, match="names no file"):
        processor.sample([{"role": "user", "content": [{"type": "video"}]}])
