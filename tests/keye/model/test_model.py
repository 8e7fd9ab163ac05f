"""The model against transformers' own SigLIP and Qwen3, against itself packed, padded, cached and reloaded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from keye import KeyeConfig, KeyeForConditionalGeneration
from keye.errors import KeyeError
from keye.model.attention import varlen
from keye.model.config import KeyeVisionConfig
from keye.model.rope import stream_positions
from keye.model.vision import KeyeVisionModel, merge_order

IMAGE, VIDEO = 290, 291


@pytest.fixture(scope="module")
def model() -> KeyeForConditionalGeneration:
    torch.manual_seed(0)
    config = KeyeConfig.preset("tiny", vocab_size=300)
    config.image_token_id, config.video_token_id = IMAGE, VIDEO
    return KeyeForConditionalGeneration(config).eval()


def stream(frames: list[tuple[int, int]], seed: int, pad: int = VIDEO) -> dict[str, torch.Tensor]:
    """A stream of text, frames of given merged sizes with a text token before each, and text."""
    generator = torch.Generator().manual_seed(seed)
    text = lambda n: torch.randint(0, 280, (n,), generator=generator)  # noqa: E731
    ids = torch.cat([text(4), *[torch.cat((text(1), torch.full((h * w,), pad))) for h, w in frames], text(6)])
    grid = torch.tensor([[1, 2 * h, 2 * w] for h, w in frames])
    pixels = torch.randn(int(grid.prod(1).sum()), 3, 14, 14, generator=generator)
    kind = ("pixel_values_videos", "video_grid_thw") if pad == VIDEO else ("pixel_values", "image_grid_thw")
    return {"input_ids": ids[None], kind[0]: pixels, kind[1]: grid}


def test_vision_tower_without_rotary_equals_transformers_siglip() -> None:
    torch.manual_seed(0)
    siglip = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=98,
            patch_size=14,
        )
    ).eval()
    config = KeyeVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, position_grid=7, rotary=False
    )
    ours = KeyeVisionModel(config).eval()
    weights = {k.removeprefix("vision_model."): v for k, v in siglip.state_dict().items() if "head." not in k}
    ours.load_state_dict(weights)
    images = torch.randn(2, 3, 98, 98)
    patches = images.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    with torch.no_grad():
        expected = siglip(images).last_hidden_state.flatten(0, 1)
        torch.testing.assert_close(ours(patches, torch.tensor([[1, 7, 7]] * 2)), expected, atol=1e-5, rtol=1e-5)


def test_text_alone_equals_transformers_qwen3(model: KeyeForConditionalGeneration) -> None:
    plain = Qwen3ForCausalLM(copy.deepcopy(model.config.text_config)).eval()
    plain.model.load_state_dict(model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    plain.set_attn_implementation("sdpa")
    ids = torch.randint(0, 280, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


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


def test_merge_order_takes_2x2_squares_frame_by_frame() -> None:
    grid = torch.tensor([[1, 2, 4], [1, 2, 2]])
    assert merge_order(grid).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("causal", [True, False])
def test_varlen_equals_dense_attention_with_a_block_mask(causal: bool) -> None:
    lengths = [3, 3, 7, 1, 5]
    q, k, v = torch.randn(19, 4, 8), torch.randn(19, 2, 8), torch.randn(19, 2, 8)
    document = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    mask = document[:, None] == document[None]
    if causal:
        mask &= torch.ones(19, 19).tril().bool()
    dense = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))), attn_mask=mask
    )
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    torch.testing.assert_close(varlen(q, k, v, cu_seqlens, causal), dense.transpose(0, 1), atol=1e-6, rtol=1e-5)


def following(ids: torch.Tensor) -> torch.Tensor:
    return F.pad(ids[1:].masked_fill(ids[1:] == VIDEO, -100), (0, 1), value=-100)


def packed(streams: list[dict[str, torch.Tensor]], model: KeyeForConditionalGeneration) -> dict[str, torch.Tensor]:
    ids = [s["input_ids"][0] for s in streams]
    positions = [
        stream_positions(s["input_ids"][0], [(VIDEO, s["video_grid_thw"][:, 1:] // 2)] if "video_grid_thw" in s else [])
        for s in streams
    ]
    videos = [s for s in streams if "video_grid_thw" in s]
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat(positions, dim=1)[:, None],
        "shift_labels": torch.cat([following(i) for i in ids])[None],
        "cu_seqlens": F.pad(torch.tensor([len(i) for i in ids]).cumsum(0), (1, 0)).int(),
        "pixel_values_videos": torch.cat([s["pixel_values_videos"] for s in videos]),
        "video_grid_thw": torch.cat([s["video_grid_thw"] for s in videos]),
    }


def test_packed_loss_and_gradients_equal_the_separate_ones(model: KeyeForConditionalGeneration) -> None:
    streams = [stream([(2, 2), (1, 1)], 1), {"input_ids": torch.randint(0, 280, (1, 9))}, stream([(1, 2)], 2)]
    model.zero_grad()
    batch = packed(streams, model)
    count = int((batch["shift_labels"] != -100).sum())
    loss = model(**batch, num_items_in_batch=count).loss
    loss.backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros(())
    for one in streams:
        labels = one["input_ids"].masked_fill(one["input_ids"] == VIDEO, -100)
        part = model(**one, labels=labels, num_items_in_batch=count).loss
        part.backward()
        total += part.detach()
    torch.testing.assert_close(loss.detach(), total, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_packed_documents_never_see_one_another(model: KeyeForConditionalGeneration) -> None:
    streams = [stream([(2, 2)], 1), stream([(2, 1)], 2), stream([(1, 1)], 3)]
    batch = packed(streams, model)
    batch.pop("shift_labels")
    with torch.no_grad():
        before = model(**batch).logits[0]
        first, second = batch["cu_seqlens"][1:3].tolist()
        batch["input_ids"][0, first] += 1
        batch["pixel_values_videos"][16:24] += 1.0  # the second document's 2×1 frame
        after = model(**batch).logits[0]
    same = (before == after).all(dim=-1)
    assert same[:first].all() and same[second:].all() and not same[first:second].any()


def test_left_padded_batch_equals_singles(model: KeyeForConditionalGeneration) -> None:
    streams = [stream([(2, 2), (1, 1)], 1), stream([(1, 2)], 2)]
    length = max(s["input_ids"].shape[1] for s in streams)
    ids, mask = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, length, dtype=torch.long)
    for row, s in enumerate(streams):
        n = s["input_ids"].shape[1]
        ids[row, -n:], mask[row, -n:] = s["input_ids"][0], 1
    pixels = {k: torch.cat([s[k] for s in streams]) for k in ("pixel_values_videos", "video_grid_thw")}
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, **pixels).logits
        for row, s in enumerate(streams):
            n = s["input_ids"].shape[1]
            torch.testing.assert_close(batch[row, -n:], model(**s).logits[0], atol=1e-5, rtol=1e-4)


def test_images_and_videos_in_one_stream_fill_their_own_places(model: KeyeForConditionalGeneration) -> None:
    video, image = stream([(2, 2)], 1), stream([(1, 2)], 2, IMAGE)
    ids = torch.cat((video["input_ids"], image["input_ids"]), dim=1)
    with torch.no_grad():
        pixels = image["pixel_values"], image["image_grid_thw"], video["pixel_values_videos"], video["video_grid_thw"]
        embeds = model._embed(ids, model._features(*pixels, None, None))
        frames = model.encode_vision(video["pixel_values_videos"], video["video_grid_thw"])
        stills = model.encode_vision(image["pixel_values"], image["image_grid_thw"])
    torch.testing.assert_close(embeds[ids == VIDEO], frames)
    torch.testing.assert_close(embeds[ids == IMAGE], stills)


def test_cached_generation_equals_recomputing_everything(model: KeyeForConditionalGeneration) -> None:
    inputs = stream([(2, 2), (1, 1)], 5)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = inputs.pop("input_ids")
    inputs.pop("attention_mask")
    with torch.no_grad():
        for _ in range(6):
            following = model(ids, **inputs).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat((ids, following), dim=1)
    assert generated.tolist() == ids.tolist()


def test_saved_model_is_the_same_model(model: KeyeForConditionalGeneration, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    again = KeyeForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = stream([(2, 2)], 3)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_rope_base_survives_saving(model: KeyeForConditionalGeneration, tmp_path) -> None:
    model.set_rope_theta(8e6)
    model.save_pretrained(tmp_path)
    model.set_rope_theta(1e6)
    again = KeyeForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.text_config.rope_parameters["rope_theta"] == 8e6
    torch.testing.assert_close(again.language_model.rotary_emb.frequencies[1], torch.tensor(8e6 ** (-2 / 32)))


def test_released_preset_has_the_published_shapes() -> None:
    with torch.device("meta"):
        model = KeyeForConditionalGeneration(KeyeConfig.preset("keye_8b"))
    tower = sum(p.numel() for p in model.visual.parameters())
    decoder = sum(p.numel() for p in model.language_model.parameters()) + model.lm_head.weight.numel()
    # SigLIP-so400m without its pooling head, and Qwen3-8B (8.19e9).
    assert 0.40e9 < tower < 0.42e9 and 8.18e9 < decoder < 8.20e9


def test_unknown_preset_names_the_known() -> None:
    with pytest.raises(KeyeError, match="tiny, small, keye_8b"):
        KeyeConfig.preset("huge")


def test_a_batch_without_pixels_still_reaches_every_parameter(model: KeyeForConditionalGeneration) -> None:
    model.train().zero_grad()
    ids = torch.randint(0, 280, (1, 8))
    model(ids, labels=ids).loss.backward()
    model.eval()
    assert all(p.grad is not None for p in model.parameters())
