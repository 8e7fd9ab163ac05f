"""The calls that transformers' own tools make on a vision-language model, compared with the plain calls."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from keye import KeyeConfig, KeyeForConditionalGeneration
from keye.model.keye import KeyeModel
from scripts.bench.common.streams import (
    IMAGE,
    VIDEO,
    VISION,
    family_config,
    family_model,
    frames,
    padded,
    stream,
    visual,
)

CLIP = stream(frames((2, 2), (1, 1)), 1)
MIXED = stream([(VIDEO, 2, 2), (IMAGE, 1, 3), (VIDEO, 1, 1)], 2)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def model() -> KeyeForConditionalGeneration:
    return family_model()


def embedded(model: KeyeForConditionalGeneration, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with embeddings in place of ids."""
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    return rest | {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_embeddings_with_pixels_give_the_logits_of_ids(model: KeyeForConditionalGeneration, side: str) -> None:
    batch = padded([CLIP, MIXED], side)
    expected = model(**batch).logits
    torch.testing.assert_close(model(**embedded(model, batch)).logits, expected)
    both = embedded(model, batch) | {"input_ids": batch["input_ids"]}
    torch.testing.assert_close(model(**both).logits, expected)
    blind = {
        name: value for name, value in embedded(model, batch).items() if "pixel" not in name and "grid" not in name
    }
    with pytest.raises(ValueError, match="placeholders"):
        model(**blind)


def test_pixels_given_with_embeddings_reach_the_tower(model: KeyeForConditionalGeneration) -> None:
    model(**embedded(model, CLIP), labels=CLIP["input_ids"]).loss.backward()
    assert model.visual.embeddings.patch_embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_generation_from_embeddings(model: KeyeForConditionalGeneration, options: dict[str, Any]) -> None:
    batch = padded([CLIP, MIXED], "left")
    expected = model.generate(**batch, **GREEDY, **options)[:, batch["input_ids"].shape[1] :]
    found = model.generate(**embedded(model, batch), **GREEDY, **options)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("width", [64, 32])
def test_assisted_decoding_gives_the_assistant_the_pixels(width: int) -> None:
    """An assistant of the same kind, of the same or another width, runs its own tower over the same pixels."""
    model = family_model()
    assistant = copy.deepcopy(model) if width == 64 else family_model(seed=1, hidden_size=width)
    expected = model.generate(**MIXED, **GREEDY)
    seen: list[int] = []
    run = assistant.model.encode_vision
    assistant.model.encode_vision = lambda pixels, grid: (seen.append(len(pixels)), run(pixels, grid))[1]
    found = model.generate(**MIXED, **GREEDY, assistant_model=assistant)
    assert found.tolist() == expected.tolist()
    assert seen == [sum(len(MIXED[name]) for name in ("pixel_values", "pixel_values_videos"))]


def test_an_assistant_with_the_same_weights_guesses_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model()
    assistant = copy.deepcopy(model)
    steps: list[int] = []
    run = model.language_model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return run(*args, **kwargs)

    monkeypatch.setattr(model.language_model, "forward", counted)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    model.generate(**MIXED, **GREEDY, assistant_model=assistant)
    assert len(steps) <= 2  # six tokens: five guessed and one more, in one pass


def test_a_text_model_can_assist(model: KeyeForConditionalGeneration) -> None:
    text = model.config.text_config
    torch.manual_seed(3)
    assistant = Qwen3ForCausalLM(Qwen3Config(**text.to_dict())).eval()
    found = model.generate(**MIXED, **GREEDY, assistant_model=assistant)
    assert found.tolist() == model.generate(**MIXED, **GREEDY).tolist()


@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_prefill_in_chunks(model: KeyeForConditionalGeneration, size: int) -> None:
    batch = padded([CLIP, MIXED], "left")
    expected = model.generate(**batch, **GREEDY)
    assert model.generate(**batch, **GREEDY, prefill_chunk_size=size).tolist() == expected.tolist()
    words = model.generate(**embedded(model, batch), **GREEDY, prefill_chunk_size=size)
    assert words.tolist() == expected[:, batch["input_ids"].shape[1] :].tolist()
    twice = model.generate(**batch, **{**GREEDY, "num_beams": 2}, prefill_chunk_size=size)
    assert twice.tolist() == model.generate(**batch, **{**GREEDY, "num_beams": 2}).tolist()


def test_prefill_in_chunks_continues_from_a_cache(model: KeyeForConditionalGeneration) -> None:
    def cache() -> Any:
        return model.generate(**CLIP, **GREEDY, return_dict_in_generate=True)

    first = cache()
    longer = torch.cat((first.sequences, MIXED["input_ids"]), dim=1)
    more = {"input_ids": longer, **visual([CLIP, MIXED])}
    expected = model.generate(**more, **GREEDY).tolist()
    found = model.generate(**more, **GREEDY, past_key_values=first.past_key_values, prefill_chunk_size=4)
    assert found.tolist() == expected


def test_attention_of_the_text_config_is_kept() -> None:
    config = family_config()
    config.text_config._attn_implementation = "eager"
    model = KeyeForConditionalGeneration(config)
    assert model.language_model.config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "eager"
    assert KeyeForConditionalGeneration(family_config()).language_model.config._attn_implementation == "keye"


def test_the_backbone_is_the_base_model(model: KeyeForConditionalGeneration, tmp_path: Path) -> None:
    assert isinstance(model.base_model, KeyeModel) and model.base_model is not model
    hidden = model.base_model(**MIXED).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model(**MIXED).logits)
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "part")
    for path in ("whole", "part"):
        alone = AutoModel.from_pretrained(tmp_path / path).eval()
        assert isinstance(alone, KeyeModel)
        torch.testing.assert_close(alone(**MIXED).last_hidden_state, hidden)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert isinstance(auto.from_pretrained(tmp_path / "whole"), KeyeForConditionalGeneration)


def test_a_checkpoint_from_before_the_backbone_had_a_name_loads(
    model: KeyeForConditionalGeneration, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
    save_file(old, path, metadata={"format": "pt"})
    again, told = KeyeForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert torch.equal(again.eval()(**MIXED).logits, model(**MIXED).logits)


def test_features_of_stills_and_frames(model: KeyeForConditionalGeneration) -> None:
    for name, grid, method in (
        ("pixel_values", "image_grid_thw", model.get_image_features),
        ("pixel_values_videos", "video_grid_thw", model.get_video_features),
    ):
        pixels, sizes = MIXED[name], MIXED[grid]
        out = method(pixels, sizes, output_hidden_states=True, output_attentions=True)
        expected = model.encode_vision(pixels, sizes)
        torch.testing.assert_close(torch.cat(list(out.pooler_output)), expected)
        assert [len(part) for part in out.pooler_output] == (sizes.prod(1) // 4).tolist()
        torch.testing.assert_close(out.last_hidden_state, model.visual(pixels, sizes))
        assert len(out.hidden_states) == VISION["num_hidden_layers"] + 1
        weights = out.attentions[0]
        assert weights.shape == (VISION["num_attention_heads"], len(pixels), len(pixels))
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        first = int(sizes[0].prod())
        assert not weights[:, :first, first:].any()  # no frame looks at another
        assert method(pixels, sizes).attentions is None
        assert isinstance(method(pixels, sizes, return_dict=False), tuple)


def test_auto_map_names_the_auto_class(tmp_path: Path) -> None:
    """TRL picks the class of a model that is not part of transformers by it."""
    config = family_config()
    assert "AutoModelForImageTextToText" in config.auto_map
    config.save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    assert "AutoModelForImageTextToText" in KeyeConfig.from_pretrained(tmp_path).auto_map


@pytest.mark.parametrize("given", ["features", "pixels"])
@torch.no_grad()
def test_the_model_can_be_exported(model: KeyeForConditionalGeneration, given: str) -> None:
    model.set_attn_implementation("sdpa")
    inputs = {"input_ids": MIXED["input_ids"], "position_ids": model.positions(
        MIXED["input_ids"], None, MIXED["image_grid_thw"], MIXED["video_grid_thw"])}  # fmt: skip
    if given == "features":
        inputs["visual_features"] = model.encode_vision(
            torch.cat((MIXED["pixel_values"], MIXED["pixel_values_videos"])),
            torch.cat((MIXED["image_grid_thw"], MIXED["video_grid_thw"])),
        )
    else:
        inputs |= visual([MIXED])
    exported = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, 0] = 7
    for one in (inputs, other):
        found = exported.module()(**one, use_cache=False)
        torch.testing.assert_close(found.logits, model(**one, use_cache=False).logits)


@pytest.mark.slow
def test_decoding_with_a_static_cache_is_one_graph(model: KeyeForConditionalGeneration) -> None:
    assert model._can_compile_fullgraph
    expected = model.generate(**MIXED, **GREEDY)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager", dynamic=True)
    found = model.generate(**MIXED, **GREEDY, cache_implementation="static", disable_compile=True)
    assert found.tolist() == expected.tolist()
