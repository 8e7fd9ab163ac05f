"""The complete model: presets, placeholders, saving, and a stream from the real processor."""

from pathlib import Path

import numpy as np
import pytest
import torch

from keye import KeyeConfig, KeyeForConditionalGeneration, KeyeProcessor
from keye.errors import KeyeError
from keye.model.placeholders import fill_placeholders
from keye.model.rope import stream_positions
from keye.processor.tokenizer import train_tokenizer
from scripts.bench.common.streams import IMAGE, VIDEO, family_model, stream


@pytest.fixture(scope="module")
def model() -> KeyeForConditionalGeneration:
    return family_model()


def test_positions_of_text_a_2x3_block_and_text_are_literal() -> None:
    ids = torch.tensor([5, 6, *[VIDEO] * 6, 7, 8])
    expected = [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert stream_positions(ids, [(VIDEO, torch.tensor([[2, 3]]))]).tolist() == expected


def test_positions_refuse_a_wrong_number_of_placeholders() -> None:
    with pytest.raises(ValueError, match="5 placeholders"):
        stream_positions(torch.tensor([VIDEO] * 5), [(VIDEO, torch.tensor([[2, 3]]))])


def test_images_and_frames_in_any_order_fill_their_own_places(model: KeyeForConditionalGeneration) -> None:
    inputs = stream([(VIDEO, 2, 2), (IMAGE, 1, 2), (VIDEO, 1, 1), (IMAGE, 3, 1)], 1)
    ids = inputs.pop("input_ids")
    names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    with torch.no_grad():
        features = model.model.visual_tokens(*(inputs[n] for n in names), None, None, (), None)
        embeds = fill_placeholders(ids, model.get_input_embeddings()(ids), features, (IMAGE, VIDEO))
        stills = model.encode_vision(*(inputs[n] for n in names[:2]))
        pictures = model.encode_vision(*(inputs[n] for n in names[2:]))
        text = (ids != IMAGE) & (ids != VIDEO)
        assert torch.equal(embeds[text], model.get_input_embeddings()(ids[text]))
    torch.testing.assert_close(embeds[ids == VIDEO], pictures)
    torch.testing.assert_close(embeds[ids == IMAGE], stills)


def test_saved_model_is_the_same_model(model: KeyeForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = KeyeForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = stream([(VIDEO, 2, 2)], 3)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_rope_base_survives_saving(name: str, tmp_path: Path) -> None:
    model = family_model(name)
    before = model.language_model.rotary_emb.frequencies
    model.set_rope_theta(8e6)
    model.save_pretrained(tmp_path)
    again = KeyeForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.text_config.rope_parameters["rope_theta"] == 8e6
    frequencies, dim = again.language_model.rotary_emb.frequencies, 2 * len(before)
    scaled = 8 if name == "llama3" else 1  # its factor, on the slow ones
    torch.testing.assert_close(frequencies[-1], torch.tensor(8e6 ** (2 / dim - 1) / scaled))


def test_released_preset_has_the_published_shapes() -> None:
    with torch.device("meta"):
        model = KeyeForConditionalGeneration(KeyeConfig.preset("keye_8b"))
    tower = sum(p.numel() for p in model.visual.parameters())
    decoder = sum(p.numel() for p in model.language_model.parameters()) + model.lm_head.weight.numel()
    # SigLIP-so400m without its pooling head, and Qwen3-8B (8.19e9).
    assert 0.40e9 < tower < 0.42e9 and 8.18e9 < decoder < 8.20e9
    assert model.language_model.rotary_emb.sections == [16, 24, 24]


def test_unknown_preset_names_the_known() -> None:
    with pytest.raises(KeyeError, match="tiny, small, keye_8b"):
        KeyeConfig.preset("huge")


def test_a_batch_without_pixels_still_reaches_every_parameter(model: KeyeForConditionalGeneration) -> None:
    model.train().zero_grad()
    ids = torch.randint(0, 280, (1, 8))
    model(ids, labels=ids).loss.backward()
    model.eval()
    assert all(p.grad is not None for p in model.parameters())


def clip(changes: int) -> np.ndarray:
    """Six frames of noise in 4×4 patches, every one new (`changes` = 6) or all the same: uint8 [6, 3, 112, 112]."""
    pictures = np.random.default_rng(changes).integers(0, 255, (changes, 3, 4, 4), dtype=np.uint8)
    return pictures.repeat(28, 2).repeat(28, 3)[np.linspace(0, changes - 1, 6).round().astype(int)]


def test_a_video_without_fast_frames_and_one_with_many_in_a_batch() -> None:
    """Through the processor: the batch equals its rows, positions and words, with videos and an image interleaved."""
    limits = {"min_tokens_per_frame": 4, "max_tokens_per_frame": 16, "max_tokens": 512}
    tokenizer = train_tokenizer(["user assistant Which colour? red or blue 0.5"] * 3, 400)
    processor = KeyeProcessor(tokenizer, encoder=limits, image={"min_tokens": 4, "max_tokens": 16})
    torch.manual_seed(0)
    model = KeyeForConditionalGeneration(
        processor.configure(KeyeConfig.preset("tiny", vocab_size=len(tokenizer), num_hidden_layers=2))
    ).eval()
    model.generation_config.eos_token_id = None
    ask, still = {"type": "text", "text": "Which colour?"}, {"type": "image", "image": clip(1)[0]}
    changing, resting = ({"type": "video", "video": clip(n)} for n in (6, 1))
    turns = [[changing, ask, still, resting], [resting, ask], [ask], [still, changing, changing, ask]]
    chats = [[{"role": "user", "content": parts}] for parts in turns]
    kinds = [plan.frame_types.sum() for plan in processor.sample(chats[0]).plans]
    assert kinds == [0, 5]  # fast frames of the changing and of the resting video
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    batch = processor.apply_chat_template(chats, padding=True, **options)
    samples = [processor.sample(chat, add_generation_prompt=True) for chat in chats]
    positions = processor.collate(samples, "left")["position_ids"]
    grids = batch["image_grid_thw"], batch["video_grid_thw"]
    assert torch.equal(model.positions(batch["input_ids"], batch["attention_mask"], *grids), positions)
    together = model.generate(**batch, max_new_tokens=3, do_sample=False)[:, -3:]
    with torch.no_grad():
        logits = model(**batch).logits
    for row, messages in enumerate(chats):
        single = processor.apply_chat_template([messages], **options)
        with torch.no_grad():
            alone, real = model(**single).logits[0], batch["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row, real], alone, atol=1e-4, rtol=1e-4)
        assert model.generate(**single, max_new_tokens=3, do_sample=False)[0, -3:].tolist() == together[row].tolist()
