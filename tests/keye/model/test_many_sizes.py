"""A plan with many sizes from the processor to the words of a model."""

import torch

from keye import KeyeProcessor
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.processor.tokenizer import train_tokenizer
from tests.keye.slowfast.test_ladder import moving


def test_a_laddered_video_is_answered_alone_as_in_a_batch() -> None:
    limits = {"min_tokens_per_frame": 4, "max_tokens_per_frame": 48, "max_tokens": 160}
    tokenizer = train_tokenizer(["user assistant Which colour? red or blue 0.5"] * 3, 400)
    processor = KeyeProcessor(tokenizer, {**limits, "policy": "ladder", "measure": "patch_l1"})
    torch.manual_seed(0)
    config = processor.configure(KeyeConfig.preset("tiny", vocab_size=len(tokenizer), num_hidden_layers=2))
    model = KeyeForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    ask = {"type": "text", "text": "Which colour?"}
    chats = [
        [{"role": "user", "content": [{"type": "video", "video": moving(16, seed)}, ask]}] for seed in (1, 2)
    ]  # fmt: skip
    samples = [processor.sample(chat, add_generation_prompt=True) for chat in chats]
    for sample in samples:
        (plan,) = sample.plans
        assert len(set(plan.frame_sizes)) > 2 and len(plan) < 16 and plan.tokens <= 160
        assert sample.video_grid_thw.tolist() == [[1, height // 14, width // 14] for height, width in plan.frame_sizes]
        assert sample.visual_tokens == plan.tokens == int((sample.input_ids == processor.video_token_id).sum())
        frames = (sample.input_ids == processor.token_id("<|frame|>")).nonzero()[:, 0].tolist()
        fast = sample.input_ids == processor.token_id("<|fast_start|>")
        ends = [*frames[1:], len(sample.input_ids)]
        for place, end, kind, count in zip(frames, ends, plan.frame_types, plan.tokens_per_frame, strict=True):
            pads = sample.input_ids[place:end] == processor.video_token_id
            assert int(pads.sum()) == count and bool(fast[place:end].any()) == bool(kind)
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    batch = processor.apply_chat_template(chats, padding=True, **options)
    positions = processor.collate(samples, "left")["position_ids"]
    found = model.positions(batch["input_ids"], batch["attention_mask"], None, batch["video_grid_thw"])
    assert torch.equal(found, positions)
    together = model.generate(**batch, max_new_tokens=3, do_sample=False)[:, -3:]
    for row, chat in enumerate(chats):
        single = processor.apply_chat_template([chat], **options)
        assert model.generate(**single, max_new_tokens=3, do_sample=False)[0, -3:].tolist() == together[row].tolist()


def test_a_laddered_video_fits_a_context_and_its_settings_are_saved(tmp_path) -> None:
    tokenizer = train_tokenizer(["user assistant Which colour? red or blue 0.5"] * 3, 400)
    limits = {"min_tokens_per_frame": 4, "max_tokens_per_frame": 48, "max_tokens": 400}
    processor = KeyeProcessor(tokenizer, {**limits, "policy": "ladder", "measure": "patch_l1"})
    chat = [{"role": "user", "content": [{"type": "video", "video": moving(16)}]}]
    wanted = processor.sample(chat)
    for length in (len(wanted) - 1, len(wanted) // 2, len(wanted) // 4):
        fitted = processor.sample(chat, max_length=length)
        assert len(fitted) <= length and fitted.plans[0].tokens < wanted.plans[0].tokens
    processor.save_pretrained(tmp_path)
    again = KeyeProcessor.from_pretrained(tmp_path).sample(chat)
    assert again.plans == wanted.plans and torch.equal(again.input_ids, wanted.input_ids)
