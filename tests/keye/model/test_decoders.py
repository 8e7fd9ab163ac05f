"""Every decoder family against the untouched transformers model, and packed against separate; positions against
Qwen2-VL's own rule; refusals of what M-RoPE cannot carry."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen2VLConfig, Qwen2VLModel

from keye import KeyeForConditionalGeneration
from keye.errors import KeyeError
from keye.model.rope import batch_positions
from scripts.bench.common.streams import (
    FAMILIES,
    IMAGE,
    VIDEO,
    WORDS,
    family_config,
    family_model,
    frames,
    labels,
    packed,
    padded,
    stream,
    visual,
)

MAIN = ("qwen3", "qwen2", "llama3")  # one of each family


def untouched(model: KeyeForConditionalGeneration) -> torch.nn.Module:
    """Transformers' own causal model with the same weights."""
    config = copy.deepcopy(model.config.text_config)
    config._attn_implementation = "eager"
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.model.load_state_dict(model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    return plain


@pytest.mark.parametrize("name", FAMILIES)
def test_text_alone_equals_the_untouched_model(name: str) -> None:
    model = family_model(name)
    plain = untouched(model)
    ids = torch.randint(0, WORDS, (2, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
        # Padding on the left: our positions count from the first word, as generation of transformers has it.
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = plain(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
        ours = model(ids, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


STREAMS = [
    stream([(VIDEO, 2, 2), (IMAGE, 1, 3), (VIDEO, 1, 1)], 1),
    stream([], 2),
    stream([(IMAGE, 2, 1), (VIDEO, 1, 2)], 3),
]


@pytest.mark.parametrize("name", MAIN)
def test_packed_loss_and_gradients_equal_the_separate_ones(name: str) -> None:
    model = family_model(name)
    batch = packed(STREAMS)
    count = int((batch["shift_labels"] != -100).sum())
    loss = model(**batch, num_items_in_batch=count).loss
    loss.backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros(())
    for one in STREAMS:
        part = model(**one, labels=labels(one["input_ids"]), num_items_in_batch=count).loss
        part.backward()
        total += part.detach()
    torch.testing.assert_close(loss.detach(), total, atol=1e-6, rtol=1e-5)
    for n, parameter in model.named_parameters():
        torch.testing.assert_close(together[n], parameter.grad, atol=1e-6, rtol=1e-4, msg=n)


@pytest.mark.parametrize("name", MAIN)
def test_a_changed_document_leaves_its_neighbours_as_they_were(name: str) -> None:
    model = family_model(name)
    batch = packed([stream(frames((2, 2)), 1), stream(frames((2, 1)), 2), stream(frames((1, 1)), 3)])
    del batch["shift_labels"]
    first, second = batch["cu_seqlens"][1:3].tolist()
    with torch.no_grad():
        before = model(**batch).logits[0]
        batch["input_ids"][0, first] += 1
        batch["pixel_values_videos"][16:24] += 1.0  # the second document's frame
        after = model(**batch).logits[0]
    same = (before == after).all(dim=-1)
    assert same[:first].all() and same[second:].all() and not same[first:second].any()


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_singles(name: str, side: str) -> None:
    model = family_model(name)
    batch = padded(STREAMS, side)
    with torch.no_grad():
        together = model(**batch).logits
        for row, one in enumerate(STREAMS):
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row, real], model(**one).logits[0], atol=1e-5, rtol=1e-5)


def test_positions_of_packed_documents_are_found_without_being_given() -> None:
    model, batch = family_model(), packed(STREAMS)
    grids = batch["image_grid_thw"], batch["video_grid_thw"]
    found = model.positions(batch["input_ids"], None, *grids, batch["cu_seqlens"])
    assert torch.equal(found, batch["position_ids"])


@pytest.mark.parametrize("use_cache", [True, False])
def test_frames_are_never_taken_for_packed_documents(use_cache: bool) -> None:
    """Without mask and cache transformers looks for documents in the positions; a mask of ones is the same batch."""
    model = family_model()
    rows = [stream(frames((2, 2), (1, 1)), seed) for seed in (1, 2, 3)]  # three rows: the 3 of T, H, W is no batch
    inputs = {"input_ids": torch.cat([r["input_ids"] for r in rows]), **visual(rows)}
    with torch.no_grad():
        bare = model(**inputs, use_cache=use_cache).logits
        masked = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits
    torch.testing.assert_close(bare, masked, atol=1e-6, rtol=1e-6)


BLOCK = st.tuples(st.sampled_from((IMAGE, VIDEO)), st.integers(1, 4), st.integers(1, 4))
ROW = st.lists(st.tuples(BLOCK, st.integers(1, 3)), max_size=6)


@pytest.fixture(scope="module")
def qwen2vl() -> Qwen2VLModel:
    vision = {"depth": 1, "embed_dim": 8, "num_heads": 1, "hidden_size": 8, "mlp_ratio": 1}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
            "num_key_value_heads": 1, "vocab_size": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
            "mrope_section": [2, 1, 1]}}  # fmt: skip
    return Qwen2VLModel(Qwen2VLConfig(vision_config=vision, text_config=text))


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=4), head=st.integers(1, 3), left=st.booleans())
def test_positions_are_those_of_qwen2vl(qwen2vl: Qwen2VLModel, rows: list, head: int, left: bool) -> None:
    """Any order of stills and frames, any padding; every frame is a video of one moment to Qwen2-VL."""
    texts, grids = [], {IMAGE: [], VIDEO: []}
    for row in rows:
        ids = [1] * head
        for (kind, h, w), gap in row:
            ids += [kind] * (h * w) + [2] * gap
            grids[kind].append([1, 2 * h, 2 * w])
        texts.append(torch.tensor(ids))
    length = max(map(len, texts)) + 2
    ids, mask = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(2))
    for i, text in enumerate(texts):
        at = slice(length - len(text), length) if left else slice(0, len(text))
        ids[i, at], mask[i, at] = text, 1
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    tables = {kind: torch.tensor(grid, dtype=torch.long).reshape(-1, 3) for kind, grid in grids.items()}
    expected, _ = qwen2vl.get_rope_index(
        ids, kinds, image_grid_thw=tables[IMAGE], video_grid_thw=tables[VIDEO], attention_mask=mask
    )
    blocks = [(kind, grid[:, 1:] // 2) for kind, grid in tables.items()]
    assert torch.equal(batch_positions(ids, mask, blocks), expected)


def test_placeholders_out_of_their_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="are not in blocks"):
        batch_positions(torch.tensor([[VIDEO, 1, VIDEO]]), None, [(VIDEO, torch.tensor([[1, 2]]))])


def test_sections_are_the_configs_when_it_has_them() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 4, 8]}
    assert family_model(rope_parameters=rope).language_model.rotary_emb.sections == [4, 4, 8]
    assert family_model().language_model.rotary_emb.sections == [4, 6, 6]  # 16, 24, 24 of 64, here of 16
    with pytest.raises(KeyeError, match="must sum to 16"):
        family_model(rope_parameters={**rope, "mrope_section": [16, 24, 24]})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}}, "'dynamic' changes"),
        ({"model_type": "gpt2"}, "no rotary to replace"),
        ({"model_type": "gemma3_text", "head_dim": 16, "rope_parameters": None}, "for each kind of layer"),
        ({"model_type": "glm", "head_dim": 16, "rope_parameters": None, "pad_token_id": 0}, "part of the head"),
        ({"model_type": "cohere", "rope_parameters": None, "pad_token_id": 0}, "logit_scale"),
    ],
)
def test_a_decoder_that_cannot_be_carried_is_refused(text: dict, reason: str) -> None:
    with pytest.raises(KeyeError, match=reason):
        family_model(**text)


def test_windows_and_packing_refuse_each_other() -> None:
    model = family_model(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert model(**STREAMS[0]).logits.shape[1] == STREAMS[0]["input_ids"].shape[1]
    with pytest.raises(KeyeError, match="sliding_window = 8"):
        model(**packed(STREAMS))


def test_packing_names_what_it_needs() -> None:
    model, batch = family_model(), packed(STREAMS)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"set_attn_implementation\('keye'\)"):
        model(**batch)
    model.set_attn_implementation("keye")
    assert torch.isfinite(model(**batch).loss)


def test_another_family_is_taken_with_a_word_of_caution() -> None:
    with pytest.warns(UserWarning, match="only qwen3, qwen2, llama are compared"):
        model = family_model("llama", model_type="mistral", sliding_window=None)
    ids = torch.randint(0, WORDS, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, untouched(model)(ids).logits, atol=1e-5, rtol=1e-5)


def test_config_of_a_living_model_is_not_changed_by_ours() -> None:
    text = family_config("llama").text_config
    plain = AutoModelForCausalLM.from_config(text, attn_implementation="sdpa")
    KeyeForConditionalGeneration(type(family_config())(vision_config=family_config().vision_config, text_config=text))
    assert plain.config._attn_implementation == "sdpa"
