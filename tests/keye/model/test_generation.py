"""Generation: with and without a cache, a batch and its rows, beams and several answers, streaming, a conversation that
goes on from its cache, and how often the tower runs for it."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer

from keye import KeyeForConditionalGeneration
from scripts.bench.common.streams import IMAGE, VIDEO, family_model, frames, padded, stream, visual

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 6}
MIXED = stream([(VIDEO, 2, 2), (IMAGE, 1, 3), (VIDEO, 1, 1), (IMAGE, 2, 1)], 1)
TEXT = stream([], 2)
CLIP = stream(frames((1, 2), (3, 1)), 3)


def sensible(name: str) -> KeyeForConditionalGeneration:
    model = family_model(name)
    placeholders = torch.tensor([IMAGE, VIDEO])
    # Random weights may well answer with a placeholder, which trained ones never do.
    model.lm_head.register_forward_hook(lambda _m, _i, out: out.index_fill(-1, placeholders, -1e4))
    return model


@pytest.fixture(scope="module")
def model() -> KeyeForConditionalGeneration:
    return sensible("qwen3")


def recomputed(model: KeyeForConditionalGeneration, inputs: dict[str, Tensor], steps: int = 6) -> list[int]:
    """The most likely next words, each from a pass over all tokens, without `generate`."""
    ids, seen = inputs["input_ids"], visual([inputs])
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat((ids, model(ids, **seen).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids[0, -steps:].tolist()


def answers(model: KeyeForConditionalGeneration, inputs: dict[str, Any], **options: Any) -> list[list[int]]:
    out = model.generate(**inputs, **{**GREEDY, **options})
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture
def encoded(model: KeyeForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each run of the tower had."""
    runs, run = [], model.encode_vision

    def counted(pixels: Tensor, grid: Tensor) -> Tensor:
        runs.append(len(grid))
        return run(pixels, grid)

    monkeypatch.setattr(model, "encode_vision", counted)
    return runs


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama3"])
def test_cached_generation_equals_recomputing_everything(name: str) -> None:
    model, inputs = sensible(name), MIXED
    expected = recomputed(model, inputs)
    assert answers(model, inputs) == [expected]
    assert answers(model, inputs, use_cache=False) == [expected]
    assert answers(model, inputs, cache_implementation="static") == [expected]
    positions = model.positions(inputs["input_ids"], None, *grids(inputs))
    assert answers(model, {**inputs, "position_ids": positions}) == [expected]


def grids(inputs: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    return inputs.get("image_grid_thw"), inputs.get("video_grid_thw")


def test_left_padded_batch_answers_as_its_rows(model: KeyeForConditionalGeneration, encoded: list[int]) -> None:
    rows = [MIXED, TEXT, CLIP]
    assert answers(model, padded(rows, "left")) == [answers(model, row)[0] for row in rows]
    assert encoded[0] == 6  # all stills and frames of the batch in one run


def test_several_answers_encode_the_video_once(model: KeyeForConditionalGeneration, encoded: list[int]) -> None:
    batch = padded([MIXED, TEXT, CLIP], "left")
    once = answers(model, batch)
    del encoded[:]
    # Greedy has one answer; sampling among one word is greedy, so three of them must be the same three times over.
    sampled = answers(model, batch, do_sample=True, top_k=1, num_return_sequences=3)
    assert sampled == [row for row in once for _ in range(3)]
    assert encoded == [6]


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_of_a_batch_are_the_beams_of_its_rows(model: KeyeForConditionalGeneration, use_cache: bool) -> None:
    rows = [MIXED, CLIP]
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "use_cache": use_cache}
    together = answers(model, padded(rows, "left"), **options)
    assert together == [answer for row in rows for answer in answers(model, row, **options)]
    assert together != answers(model, padded(rows, "left"), max_new_tokens=4, do_sample=True, num_return_sequences=2)


def test_prompt_that_ends_with_a_frame(model: KeyeForConditionalGeneration) -> None:
    inputs = stream(frames((2, 3)), 4, tail=0)
    assert answers(model, inputs) == [recomputed(model, inputs)]


def test_conversation_continues_from_its_cache(model: KeyeForConditionalGeneration, encoded: list[int]) -> None:
    """A second turn with a new video: only that is encoded, and the answer equals that without a cache."""
    first = model.generate(**MIXED, **GREEDY, return_dict_in_generate=True)
    cache = first.past_key_values
    held = cache.get_seq_length()
    del encoded[:]
    whole = {"input_ids": torch.cat((first.sequences, CLIP["input_ids"]), dim=1), **visual([MIXED, CLIP])}
    second = answers(model, whole, past_key_values=cache)
    assert held == first.sequences.shape[1] - 1 and encoded == [2]
    assert second == [recomputed(model, whole)]
    end = {"input_ids": CLIP["input_ids"], "attention_mask": torch.ones(1, whole["input_ids"].shape[1] + 6)}
    with pytest.raises(ValueError, match="complete conversation"):
        model.generate(**end, **visual([CLIP]), past_key_values=cache, **GREEDY)


def test_cache_that_ends_inside_a_frame(model: KeyeForConditionalGeneration) -> None:
    cut = 4 + 1 + 3  # three of the first frame's four places
    assert MIXED["input_ids"][0, cut - 1] == MIXED["input_ids"][0, cut] == VIDEO
    with torch.no_grad():
        positions = model.positions(MIXED["input_ids"], None, *grids(MIXED))
        features = model.encode_vision(MIXED["pixel_values_videos"], MIXED["video_grid_thw"])[:3]
        held = model(
            MIXED["input_ids"][:, :cut], position_ids=positions[..., :cut], visual_features=features, use_cache=True
        )
    assert answers(model, MIXED, past_key_values=held.past_key_values) == [recomputed(model, MIXED)]


def test_a_pass_on_top_of_a_cache_asks_for_positions(model: KeyeForConditionalGeneration) -> None:
    with torch.no_grad():
        cache = model(**CLIP, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="position_ids"):
            model(torch.tensor([[1]]), past_key_values=cache)


def test_placeholders_without_pixels_are_named(model: KeyeForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="5 placeholders of id 291, but 0 visual tokens"):
        model.generate(CLIP["input_ids"], **GREEDY)
    with pytest.raises(ValueError, match="5 placeholders of id 291, but 2 visual tokens"):
        model.generate(
            CLIP["input_ids"],
            pixel_values_videos=CLIP["pixel_values_videos"][:8],
            video_grid_thw=CLIP["video_grid_thw"][:1],
            **GREEDY,
        )


class Letters:
    """The part of a tokenizer that a streamer uses: one letter per id."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(0x4E00 + int(i)) for i in ids)


def test_streamer_gets_the_answer_word_by_word(model: KeyeForConditionalGeneration) -> None:
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**MIXED, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == Letters().decode(recomputed(model, MIXED)) and len([p for p in pieces if p]) == 6


def test_scores_hidden_states_and_logits_are_returned_on_request(model: KeyeForConditionalGeneration) -> None:
    out = model.generate(**CLIP, **GREEDY, return_dict_in_generate=True, output_scores=True, output_hidden_states=True)
    layers = model.config.text_config.num_hidden_layers
    assert len(out.scores) == 6 and len(out.hidden_states[0]) == layers + 1
    assert out.hidden_states[0][-1].shape == (1, CLIP["input_ids"].shape[1], 64)
