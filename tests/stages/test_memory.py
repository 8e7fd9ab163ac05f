"""Recomputed, tiled, offloaded and chunked training has the same loss and gradients as plain training."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode

import keye.model.vision as tower
from keye.errors import RecipeError
from keye.model.keye import KeyeForConditionalGeneration
from stages.data.collate import pack
from stages.distributed.activation_memory import apply_memory_options, in_tiles, recompute
from tests.stages import small
from tests.stages.test_parallel import packs


def row(name: str = "stills and frames") -> dict[str, Tensor]:
    return pack(packs()[name], 1)


def learn(model: KeyeForConditionalGeneration, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Summed loss and all gradients."""
    loss = model.train()(**inputs, num_items_in_batch=1.0).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return learn(small.model(), row())


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = max(float(value.abs().max()), 1e-3)
        torch.testing.assert_close(found[name] / scale, value / scale, atol=1e-5, rtol=0, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("patches", [4, 1 << 20], ids=["layers of the tower", "chunks of frames"])
@pytest.mark.parametrize("settings", [(True,), (True, True), (True, False, 3), (False, False, 2), (True, True, 64)])
def test_a_memory_saving_step_equals_the_plain_one(plain, monkeypatch, settings, patches):
    # At 4 patches most frames are single chunks, too large to be recomputed together.
    monkeypatch.setattr(tower, "FRAME_PATCHES", patches)
    model = small.model()
    apply_memory_options(model, *settings)
    same(learn(model, row()), plain)


def test_a_frozen_tower_is_computed_once(plain, monkeypatch):
    monkeypatch.setattr(tower, "FRAME_PATCHES", 8)
    model = small.model()
    apply_memory_options(model, checkpointing=True)
    model.visual.requires_grad_(False)
    calls = []
    model.visual.post_layernorm.register_forward_hook(lambda *_: calls.append(1))
    found = learn(model, row())
    grids = torch.cat([row()["image_grid_thw"], row()["video_grid_thw"]])
    assert len(calls) == len(tower.chunks_of(grids))
    same({n: v for n, v in found.items() if v is not None}, {n: v for n, v in plain.items() if "visual" not in n})


class Counted(TorchDispatchMode):
    """Counts attention kernels, forward ones."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls += "attention" in str(op) and "backward" not in str(op)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("offload", "times"), [(False, 1), (True, 2)])
def test_attention_is_computed_once_unless_its_output_is_not_kept(offload, times):
    q = torch.randn(1, 2, 16, 8, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x.sin(), x.cos(), x, is_causal=True).exp()

    out = recompute(layer, q, offload=offload)
    with Counted() as counted:
        out.sum().backward()
    assert counted.calls == times - 1


def test_only_the_layers_inputs_go_to_host_memory(monkeypatch):
    """Packed tensors are counted by shape."""
    model, inputs, moved = small.model(), row(), Counter()
    pack = save_on_cpu(pin_memory=True).pack_hook

    class Counting(save_on_cpu):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(pin_memory)
            self.pack_hook = self.count

        def count(self, x: Tensor):
            moved[tuple(x.shape)] += 1
            return pack(x)

    monkeypatch.setattr("stages.distributed.activation_memory.save_on_cpu", Counting)
    apply_memory_options(model, checkpointing=True, offload=True)
    learn(model, inputs)
    length = inputs["input_ids"].shape[1]
    assert {shape: n for shape, n in moved.items() if length in shape} == {(1, length, 128): 2}  # two layers


@pytest.mark.parametrize("tiles", [1, 3, 7, 50])
def test_tiles_of_an_mlp_give_its_output_and_gradients(tiles):
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.SiLU(), torch.nn.Linear(20, 6)).double()
    x = torch.randn(1, 10, 6, dtype=torch.double, requires_grad=True)
    leaves = [x, *mlp.parameters()]
    whole, tiled = mlp(x), in_tiles(mlp, tiles, x)
    torch.testing.assert_close(tiled, whole)
    for got, wanted in zip(
        torch.autograd.grad((tiled**2).sum(), leaves), torch.autograd.grad((whole**2).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_offload_without_checkpointing_is_refused():
    with pytest.raises(RecipeError, match="set checkpointing = true"):
        apply_memory_options(small.model(), checkpointing=False, offload=True)


def test_bytes_are_pixels(plain):
    inputs = row()
    pixels = {name: torch.randint(0, 256, inputs[name].shape, dtype=torch.uint8) for name in inputs if "pixel" in name}
    floats = {name: value.double() / 127.5 - 1 for name, value in pixels.items()}
    wanted = learn(small.model(), {**inputs, **{name: value.float() for name, value in floats.items()}})
    same(learn(small.model(), {**inputs, **pixels}), wanted)
    # Stills as bytes and frames as floats in one pack.
    mixed = {"pixel_values": pixels["pixel_values"], "pixel_values_videos": floats["pixel_values_videos"].float()}
    same(learn(small.model(), {**inputs, **mixed}), wanted)


def test_chunks_have_complete_frames_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(tower, "FRAME_PATCHES", 16)
    grids = torch.tensor([[1, 2, 4], [1, 2, 4], [1, 2, 2], [1, 4, 8], [2, 2, 2], [1, 2, 4]])
    assert tower.chunks_of(grids) == [(2, 16), (1, 4), (1, 32), (2, 16)]
    assert tower.chunks_of(grids[:0]) == []


def test_frames_in_chunks_have_the_same_tokens_as_together(monkeypatch):
    model, inputs = small.model().eval(), row()
    pixels, grids = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    whole = model.encode_vision(pixels, grids).detach()
    monkeypatch.setattr(tower, "FRAME_PATCHES", 8)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_vision(pixels, grids), whole, atol=1e-5, rtol=1e-5)
