"""The vision tower against transformers' SigLIP, torch's interpolation, and itself frame by frame."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import SiglipVisionConfig, SiglipVisionModel

from keye.errors import KeyeError
from keye.model.config import PRESETS, KeyeConfig, KeyeVisionConfig
from keye.model.keye import KeyeModel
from keye.model.projector import Projector
from keye.model.rope import block_coordinates, rotate, vision_tables
from keye.model.vision import KeyeVisionModel, VisionEmbeddings, VisionLayer, places_of

SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
FRAMES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def tower() -> KeyeVisionModel:
    torch.manual_seed(0)
    tower = KeyeVisionModel(KeyeVisionConfig(**SIZES)).eval()
    nn.init.normal_(tower.embeddings.position_embedding.weight)
    return tower


def grids(frames: list[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor([(1, *frame) for frame in frames])


def pixels(frames: list[tuple[int, int]]) -> torch.Tensor:
    return torch.randn(sum(h * w for h, w in frames), 3, 14, 14, generator=torch.Generator().manual_seed(1))


def test_at_384x384_without_rotary_it_is_transformers_siglip() -> None:
    torch.manual_seed(0)
    siglip = SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=384, patch_size=14)).eval()
    ours = KeyeVisionModel(KeyeVisionConfig(**SIZES, rotary=False)).eval()
    weights = {k.removeprefix("vision_model."): v for k, v in siglip.state_dict().items() if "head." not in k}
    ours.load_state_dict(weights)
    images = torch.randn(2, 3, 384, 384)
    # 384 is 27 patches of 14 and a rest of 6 pixels, which the convolution never reaches.
    patches = images[..., :378, :378].unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    with torch.no_grad():
        expected = siglip(images).last_hidden_state.flatten(0, 1)
        torch.testing.assert_close(ours(patches, grids([(27, 27)] * 2)), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(frames=FRAMES)
def test_packed_frames_of_any_size_equal_each_frame_alone(tower, frames) -> None:
    patches = pixels(frames)
    with torch.no_grad():
        together = tower(patches, grids(frames))
        alone = [tower(part, grids([frame])) for part, frame in zip(split(patches, frames), frames, strict=True)]
    assert together.shape == (len(patches), 48)
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-4)


def split(patches: torch.Tensor, frames: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    return patches.split([h * w for h, w in frames])


@settings(max_examples=50, deadline=None)
@given(frames=st.lists(st.tuples(st.integers(1, 80), st.integers(1, 80)), min_size=1, max_size=4))
def test_positions_are_torchs_bilinear_interpolation_in_double_precision(frames) -> None:
    embeddings = VisionEmbeddings(KeyeVisionConfig(**SIZES))
    table = embeddings.position_embedding.weight.detach().double().T.unflatten(1, (27, 27))[None]
    expected = [F.interpolate(table, frame, mode="bilinear", align_corners=False)[0].flatten(1).T for frame in frames]
    found = embeddings.positions(places_of(grids(frames)[:, 1:], sum(h * w for h, w in frames)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.cat(expected), atol=2e-6, rtol=0)


def test_positions_of_the_tables_own_size_are_the_table() -> None:
    embeddings = VisionEmbeddings(KeyeVisionConfig(**SIZES))
    places = places_of(torch.tensor([[27, 27]]), 27 * 27)
    assert torch.equal(embeddings.positions(places), embeddings.position_embedding.weight)


def test_gradient_of_positions_equals_that_of_torchs_interpolation() -> None:
    embeddings = VisionEmbeddings(KeyeVisionConfig(**SIZES))
    weight = embeddings.position_embedding.weight
    frames = [(5, 7), (40, 3), (5, 7)]
    gradient = torch.randn(190, 48)
    embeddings.positions(places_of(grids(frames)[:, 1:], 190)).backward(gradient)
    table = weight.T.unflatten(1, (27, 27))[None]
    torch.cat([F.interpolate(table, f, mode="bilinear")[0].flatten(1).T for f in frames]).backward(gradient)
    # The second backward adds to the first: twice the same.
    once = torch.autograd.grad(embeddings.positions(places_of(grids(frames)[:, 1:], 190)), weight, gradient)[0]
    torch.testing.assert_close(weight.grad, 2 * once, atol=1e-5, rtol=1e-5)


def test_rotation_is_a_complex_product_and_its_backward_the_conjugate() -> None:
    x = torch.randn(6, 2, 8, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(6, 1, 4)
    tables = [torch.cat((half, half), -1) for half in (angle.cos(), angle.sin())]
    turn = torch.polar(torch.ones_like(angle), angle)
    expected = torch.view_as_real(torch.complex(*x.float().chunk(2, -1)) * turn)
    torch.testing.assert_close(rotate(x, *tables).float(), torch.cat(expected.unbind(-1), -1))
    gradient = torch.randn(6, 2, 8)
    rotate(x, *tables).backward(gradient.double())
    back = torch.view_as_real(torch.complex(*gradient.chunk(2, -1)) * turn.conj())
    torch.testing.assert_close(x.grad.float(), torch.cat(back.unbind(-1), -1))


class Casts(TorchFunctionMode):
    """Counts calls of `Tensor.to`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None) -> object:
        self.count += function is torch.Tensor.to
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype, casts", [(torch.float32, 0), (torch.bfloat16, 1)])
def test_rotation_casts_only_to_another_dtype(dtype, casts) -> None:
    # torch 2.11 gives a compiled autograd function whose result is cast to its own dtype a gradient of zero.
    x, tables = torch.randn(6, 2, 8, dtype=dtype), vision_tables(torch.arange(6), torch.arange(6), 8)
    with Casts() as found:
        assert rotate(x, *tables).dtype == dtype
    assert found.count == casts


def test_rotary_depends_on_the_distance_of_rows_and_columns_alone() -> None:
    row, column, _ = block_coordinates(torch.tensor([5]), torch.tensor([6]))
    tables = vision_tables(row, column, 12)
    q, k = (rotate(torch.randn(1, 1, 12).expand(30, 1, 12), *tables)[:, 0] for _ in range(2))
    scores = (q @ k.T).view(5, 6, 5, 6)
    torch.testing.assert_close(scores[:4, :5, :4, :5], scores[1:, 1:, 1:, 1:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores[0, 0, 1, 0], scores[0, 0, 0, 1])


def test_a_frame_attends_to_no_other_frame(tower) -> None:
    frames = [(3, 4), (2, 2), (5, 1)]
    patches = pixels(frames)
    with torch.no_grad():
        before = tower(patches, grids(frames))
        patches[12:16] += 1
        after = tower(patches, grids(frames))
    changed = (before != after).any(dim=1)
    assert changed[12:16].all() and not changed[:12].any() and not changed[16:].any()


def test_a_row_of_several_frames_is_as_many_rows_of_one(tower) -> None:
    patches = pixels([(2, 4)] * 3)
    with torch.no_grad():
        torch.testing.assert_close(tower(patches, torch.tensor([[3, 2, 4]])), tower(patches, grids([(2, 4)] * 3)))


def test_bfloat16_stays_near_float32_with_positions_and_tables_of_float32(tower) -> None:
    frames = [(40, 30), (6, 4)]
    patches = pixels(frames)
    half = KeyeVisionModel(tower.config).eval()
    half.load_state_dict(tower.state_dict())
    half.to(torch.bfloat16)
    with torch.no_grad():
        whole = tower(patches, grids(frames))
        rounded = half(patches.bfloat16(), grids(frames))
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - whole).norm() / whole.norm()
    assert error < 0.015  # a few roundings of 2 ** -9 in each of two layers
    # Angles that went through bfloat16 would be off by a tenth of a radian at row 39: far more than this.
    row = torch.arange(40)
    for table, exact in zip(vision_tables(row, row, 12), (torch.cos, torch.sin), strict=True):
        angle = row.double()[:, None] * 10_000 ** -(torch.arange(0, 6, 2).double() / 6)
        torch.testing.assert_close(table[:, 0, :3].double(), exact(angle), atol=1e-5, rtol=0)


def test_checkpointing_gives_the_same_features_and_gradients(tower) -> None:
    frames = [(4, 4), (2, 6)]
    patches, gradient = pixels(frames), torch.randn(28, 48)
    found = []
    tower.train()
    for tower.gradient_checkpointing in (False, True):
        tower.zero_grad()
        features = tower(patches, grids(frames))
        features.backward(gradient)
        found.append([features.detach(), *(p.grad.clone() for p in tower.parameters())])
    tower.eval()
    tower.gradient_checkpointing = False
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_projector_takes_the_2x2_squares_of_every_frame_in_raster_order() -> None:
    projector = Projector(8, 16)
    frames = [(4, 6), (2, 2), (6, 2)]
    features = torch.randn(40, 8)
    found = projector(features, grids(frames))
    for frame, part in zip(frames, split(features, frames), strict=True):
        height, width = frame
        squares = part.view(height // 2, 2, width // 2, 2, 8).transpose(1, 2).reshape(-1, 32)
        expected = projector.linear_2(F.gelu(projector.linear_1(projector.pre_norm(squares))))
        torch.testing.assert_close(found[: len(expected)], expected)
        found = found[len(expected) :]
    assert len(found) == 0


@pytest.mark.parametrize("backend", ["auto", "sdpa", "plain"])
def test_the_named_backend_of_attention_gives_the_same_features(tower, backend) -> None:
    frames = [(4, 4), (2, 6), (3, 3)]
    patches = pixels(frames)
    named = KeyeVisionModel(tower.config, attention=backend).eval()
    named.load_state_dict(tower.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(named(patches, grids(frames)), tower(patches, grids(frames)), atol=1e-5, rtol=1e-5)


def test_a_backend_that_is_not_there_is_an_error_that_lists_those_that_are(tower) -> None:
    with pytest.raises(KeyeError, match="sdpa"):
        KeyeVisionModel(tower.config, attention="flash9")(pixels([(2, 2)]), grids([(2, 2)]))


def test_a_layer_compiles_without_breaks_and_once_for_all_sizes() -> None:
    torch.manual_seed(0)
    layer = VisionLayer(KeyeVisionConfig(**SIZES))
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(layer, backend=counting, fullgraph=True, dynamic=True)
    for frames in ([(4, 6), (2, 2)], [(3, 5), (2, 2), (6, 6)], [(2, 3), (5, 2), (4, 4)]):
        places = places_of(grids(frames)[:, 1:], sum(h * w for h, w in frames))
        cu_seqlens = F.pad(torch.tensor([h * w for h, w in frames]).cumsum(0), (1, 0))
        tables = vision_tables(places.row, places.column, 12)
        x = torch.randn(int(cu_seqlens[-1]), 48)
        found, expected = compiled(x, cu_seqlens, tables), layer(x, cu_seqlens, tables)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        weight = torch.randn(found.shape)
        gradients = [torch.autograd.grad((out * weight).sum(), list(layer.parameters())) for out in (found, expected)]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert graphs == 1


@pytest.mark.parametrize("heads", [5, 8])
def test_heads_that_rows_and_columns_cannot_share_are_named(heads) -> None:
    with pytest.raises(KeyeError, match=f"{heads} heads"):
        KeyeVisionModel(KeyeVisionConfig(**{**SIZES, "num_attention_heads": heads}))


@pytest.mark.parametrize("patches", [15, 17])
def test_pixels_that_are_not_the_grids_are_counted(tower, patches) -> None:
    with pytest.raises(KeyeError, match=f"16 patches, but pixel_values {patches}"):
        tower(torch.zeros(patches, 3, 14, 14), grids([(4, 4)]))


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_a_new_tower_shows_where_a_patch_is(preset: str) -> None:
    """The place of a patch is not small beside its colour."""
    torch.manual_seed(0)
    text = KeyeConfig.preset("tiny").text_config.to_dict()
    text["initializer_range"] = KeyeConfig.preset(preset).text_config.initializer_range
    model = KeyeModel(KeyeConfig(vision_config=PRESETS[preset]["vision"], text_config=text))
    embeddings, frames = model.visual.embeddings, [(8, 8), (10, 18)]
    patches = pixels(frames).clamp(-1, 1)
    places = embeddings.positions(places_of(torch.tensor(frames), len(patches)))
    coloured = F.conv2d(patches, embeddings.patch_embedding.weight).flatten(1)
    share = places.square().mean().sqrt() / coloured.square().mean().sqrt()
    assert 0.25 < share < 1


def test_a_loaded_tower_keeps_its_position_table(tmp_path: Path) -> None:
    model = KeyeModel(KeyeConfig.preset("tiny", vocab_size=256))
    nn.init.constant_(model.visual.embeddings.position_embedding.weight, 7)
    model.save_pretrained(tmp_path)
    assert (KeyeModel.from_pretrained(tmp_path).visual.embeddings.position_embedding.weight == 7).all()
