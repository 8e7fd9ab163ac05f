"""The tower with the mixer: frames of any sizes packed, the complete model, loading, refusals, operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from keye.checkpoint.initialise import initialise
from keye.checkpoint.released_layout import config_to_released
from keye.errors import CheckpointError, KeyeError, RecipeError
from keye.hyperzzw.mixer import FrameGroups
from keye.model import flops, vision
from keye.model.config import KeyeConfig, KeyeVisionConfig
from keye.model.keye import KeyeForConditionalGeneration
from keye.model.vision import FramePart, KeyeVisionModel
from stages.cost.footprint import tower_layer
from stages.distributed.activation_memory import compile_layers

FRAMES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5)


def small(mixer: str = "hyperzzw") -> KeyeForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"mixer": mixer, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = KeyeConfig.preset("tiny", sizes, vocab_size=64, num_hidden_layers=1)
    config.image_token_id, config.video_token_id = 1, 2
    config.vision_start_token_id, config.vision_end_token_id = 3, 4
    return KeyeForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def model() -> KeyeForConditionalGeneration:
    return small()


@pytest.fixture(scope="module")
def double() -> KeyeForConditionalGeneration:
    return small().double()


def pixels(frames: list[tuple[int, int]], seed: int = 1) -> torch.Tensor:
    patches = sum(height * width for height, width in frames)
    return torch.randn(patches, 3, 14, 14, generator=torch.Generator().manual_seed(seed))


def grids(frames: list[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor([(1, *frame) for frame in frames])


@settings(max_examples=25, deadline=None)
@given(frames=FRAMES)
def test_the_groups_of_frames_gather_each_frame_and_give_it_back(frames) -> None:
    groups = FrameGroups.of(torch.tensor(frames))
    numbers = torch.arange(sum(h * w for h, w in frames))
    gathered = numbers if groups.order is None else numbers[groups.order]
    expected = {}
    for frame, part in zip(frames, numbers.split([h * w for h, w in frames]), strict=True):
        expected.setdefault(frame, []).append(part.view(1, *frame))
    found = list(groups.maps(gathered[:, None]))
    for size, part in zip(expected, found, strict=True):
        assert torch.equal(part, torch.stack(expected[size]))
    assert groups.back is None or torch.equal(gathered[groups.back], numbers)


@settings(max_examples=15, deadline=None)
@given(frames=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5))
def test_packed_frames_equal_each_frame_alone(model, double, frames) -> None:
    frames = [(2 * height, 2 * width) for height, width in frames]
    for tower, patches, bound in ((model.visual, pixels(frames), 2e-5), (double.visual, pixels(frames).double(), 1e-9)):
        with torch.no_grad():
            together = tower(patches, grids(frames))
            parts = zip(patches.split([h * w for h, w in frames]), frames, strict=True)
            alone = torch.cat([tower(part, grids([frame])) for part, frame in parts])
        torch.testing.assert_close(together, alone, atol=bound, rtol=0)


def test_a_frame_depends_on_all_its_patches_and_on_no_other_frame(model) -> None:
    frames = [(4, 6), (2, 4), (4, 6)]
    patches = pixels(frames).requires_grad_()
    model.visual(patches, grids(frames))[:24][7].square().sum().backward()
    reached = patches.grad.flatten(1).abs().sum(1) > 0
    assert reached[:24].all() and not reached[24:].any()
    model.zero_grad()


def test_every_parameter_of_the_mixer_gets_a_gradient(double) -> None:
    frames = [(4, 6), (2, 2)]
    double.visual(pixels(frames).double(), grids(frames)).pow(3).sum().backward()
    mixers = {name: p for name, p in double.visual.named_parameters() if ".mixer." in name}
    assert [name for name, p in mixers.items() if p.grad is None or p.grad.abs().max() < 1e-9] == []
    double.zero_grad()


def inputs(frames: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    ids = [9, 10]
    for height, width in frames:
        ids += [3, *[2] * (height * width // 4), 4]
    return {
        "input_ids": torch.tensor([[*ids, 11, 12]]),
        "pixel_values_videos": pixels(frames),
        "video_grid_thw": grids(frames),
    }


def test_generation_continues_as_repeated_forward_passes(model) -> None:
    given = inputs([(4, 4), (2, 2), (2, 2)])
    answer = model.generate(**given, max_new_tokens=4, do_sample=False, eos_token_id=None)
    ids = given["input_ids"]
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat((ids, model(**{**given, "input_ids": ids}).logits[:, -1:].argmax(-1)), 1)
    assert answer.tolist() == ids.tolist()


def test_a_pack_with_checkpointing_and_chunks_has_the_gradients_of_separate_documents(model, monkeypatch) -> None:
    documents = [inputs([(4, 6), (2, 2)]), inputs([(2, 2), (4, 6), (6, 2)])]
    totals = []
    for packed in (False, True):
        model.zero_grad()
        if packed:
            monkeypatch.setattr(vision, "FRAME_PATCHES", 28)
            model.train()
            model.visual.gradient_checkpointing = model.projector.gradient_checkpointing = True
        lengths = [document["input_ids"].shape[1] for document in documents]
        rows = [{name: torch.cat([d[name] for d in documents], int(name == "input_ids")) for name in documents[0]}]
        for row in rows if packed else documents:
            ids = row["input_ids"]
            if packed:
                row = row | {"cu_seqlens": torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)}
            shifted = torch.full_like(ids, -100)
            ends = [lengths[0], sum(lengths)] if packed else [ids.shape[1]]
            for end in ends:
                shifted[0, end - 2] = ids[0, end - 1]
            model(**row, shift_labels=shifted, num_items_in_batch=1).loss.backward()
        totals.append({name: p.grad.clone() for name, p in model.visual.named_parameters()})
    model.eval()
    model.visual.gradient_checkpointing = model.projector.gradient_checkpointing = False
    for name, gradient in totals[0].items():
        torch.testing.assert_close(totals[1][name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_half_precision_stays_near(model) -> None:
    half = small().to(torch.bfloat16)
    frames = [(4, 6), (2, 2)]
    with torch.no_grad():
        exact, near = model.visual(pixels(frames), grids(frames)), half.visual(pixels(frames), grids(frames))
    assert near.dtype == torch.bfloat16
    assert (near.float() - exact).square().mean() < 0.01 * exact.square().mean()


def test_the_default_tower_has_no_new_parameter() -> None:
    plain, named = small("attention"), KeyeVisionConfig().to_dict()
    assert not any("mixer" in name for name in plain.state_dict())
    named.pop("mixer")
    assert KeyeVisionConfig(**named).mixer == "attention"


def test_saved_and_loaded_it_is_the_same_model(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded = KeyeForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.vision_config.mixer == "hyperzzw"
    states = zip(model.state_dict().items(), loaded.state_dict().items(), strict=True)
    assert all(one == other and torch.equal(a, b) for (one, a), (other, b) in states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_saved_model_loads_in_half_precision(model, tmp_path, dtype) -> None:
    model.save_pretrained(tmp_path)
    loaded = KeyeForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    states = zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(value.to(dtype), half) for value, half in states)


def test_weights_of_attention_leave_the_mixer_new_and_are_reported(model, tmp_path) -> None:
    small("attention").save_pretrained(tmp_path)
    loaded, report = KeyeForConditionalGeneration.from_pretrained(
        tmp_path, config=model.config, output_loading_info=True
    )
    assert all(".mixer." in name for name in report["missing_keys"]) and report["missing_keys"]
    assert all(".self_attn." in name for name in report["unexpected_keys"]) and report["unexpected_keys"]
    mixer = loaded.visual.encoder.layers[0].mixer
    assert (mixer.branch_scale == 1).all() and (mixer.slow.offsets == 1).all()
    assert mixer.slow.frequencies.std() > 1  # those of a slow network, not those of a linear layer


def test_what_the_mixer_cannot_do_is_refused(model, tmp_path) -> None:
    with pytest.raises(KeyeError, match="'fourier' is unknown; use attention or hyperzzw"):
        KeyeVisionModel(KeyeVisionConfig(mixer="fourier"))
    with pytest.raises(KeyeError, match="no attention weights"):
        model.get_image_features(pixels([(2, 2)]), grids([(2, 2)]), output_attentions=True)
    part = FramePart(pixels([(2, 2)]), 4, 4, 0, 4, lambda *args: args[0])
    with pytest.raises(KeyeError, match="limit frames and stills to 1024 tokens"):
        model.visual(None, None, [part])
    with pytest.raises(RecipeError, match="compile = false"):
        compile_layers(model)
    with pytest.raises(RecipeError, match="not estimated"):
        tower_layer(model.config.vision_config, 2)
    with pytest.raises(CheckpointError, match="the released tower has attention"):
        config_to_released(model.config.to_dict())


@pytest.mark.parametrize("frames", [[(4, 4)], [(4, 6), (2, 2), (4, 6)]])
def test_operations_are_those_that_torch_counts(model, frames) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.visual(pixels(frames), grids(frames))
    # The position table's weighted sums are no product with a weight for torch, either.
    assert counter.get_total_flops() == flops.tower(model.config.vision_config, frames).total


def test_twice_the_side_costs_four_times_the_products_with_weights_and_eight_times_the_others() -> None:
    config = KeyeVisionConfig(mixer="hyperzzw")
    one, two = (flops.frame_layers(config, [(side, side)] * 50) for side in (32, 64))
    assert two.linear / one.linear == pytest.approx(4, rel=0.01)
    assert two.quadratic == 8 * one.quadratic
    attention = flops.frame_layers(KeyeVisionConfig(), [(64, 64)] * 50)
    assert two.quadratic * 128 == attention.quadratic


def test_initialising_from_parts_names_the_remedy(model, tmp_path) -> None:
    from tests.keye.model.parts import decoder

    decoder(tmp_path / "text")
    with pytest.raises(CheckpointError, match="model.vision.mixer"):
        initialise(tmp_path / "text", model.config.vision_config, out=tmp_path / "out")
