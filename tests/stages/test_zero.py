"""ZeRO-3 trains like ZeRO-1: the same losses, gradient norms and weights, and complete weights at the end."""

from typing import Any

import pytest
import torch
from torch import Tensor

from stages.data.collate import pack
from stages.distributed import engine
from stages.distributed.activation_memory import apply_memory_options
from stages.distributed.parallel import build_parallel_dims, shard, sum_over_ranks
from tests.distributed import run_distributed
from tests.stages import small
from tests.stages.test_parallel import IMAGE, VIDEO, packs

STEPS = 3


def train(zero: int, sequence: int, economic: bool, frozen: bool) -> dict[str, Any]:
    """(loss, gradient norm) of each step, the gradients of the first, and on rank 0 the weights afterwards."""
    from deepspeed.utils import safe_get_full_grad

    engine.start(threads=1)
    grid = build_parallel_dims(sequence)
    model = small.model().train()
    if economic:
        apply_memory_options(model, checkpointing=True, mlp_tiles=3)
    model.visual.requires_grad_(not frozen)
    built = engine.build(model, small.optimizer(1e-3, weight_decay=0.1), STEPS, zero=zero)
    samples = packs()["stills and frames"]
    # Ranks that share no pack have different ones, one of them without a picture.
    rows = [pack(samples, 2)] if sequence > 1 else [pack(samples[:2], 2), pack(packs()["text alone"], 2)]
    curve, gradients = [], {}
    for step in range(STEPS):
        inputs = shard(rows[grid.data_rank], grid, IMAGE, VIDEO)
        loss = built(**inputs, num_items_in_batch=1.0).loss / 40
        built.backward(loss * grid.world)
        if step == 0:
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            gradients = {name: safe_get_full_grad(p).clone() for name, p in trained}
        built.step()
        curve.append((float(sum_over_ranks(loss)), float(built.get_global_grad_norm())))
    return {"curve": curve, "gradients": gradients, "weights": small.master_weights(model)}


CASES = {
    "two packs": (1, False, False),
    "one pack, recomputed and tiled": (2, True, False),
    "two packs, frozen tower": (1, True, True),
}


def both() -> dict[str, list[Any]]:
    engine.PERSISTENT = 0  # every parameter is partitioned, the smallest too
    return {name: [train(zero, *case) for zero in (1, 3)] for name, case in CASES.items()}


@pytest.fixture(scope="module")
def trained() -> dict[str, list[Any]]:
    return run_distributed(both, 2, 360)[0]


@pytest.mark.parametrize("name", list(CASES))
def test_zero_3_equals_zero_1(trained, name):
    one, three = trained[name]
    assert one["curve"][0][0] > one["curve"][-1][0]  # it learnt
    torch.testing.assert_close(torch.tensor(three["curve"]), torch.tensor(one["curve"]), atol=1e-5, rtol=1e-5)
    assert three["gradients"].keys() == one["gradients"].keys()
    for key, wanted in one["gradients"].items():
        scale = max(float(wanted.abs().max()), 1e-3)
        torch.testing.assert_close(three["gradients"][key] / scale, wanted / scale, atol=1e-5, rtol=0, msg=key)
    start: dict[str, Tensor] = small.model().state_dict()
    assert three["weights"].keys() == one["weights"].keys() == start.keys()
    for key, wanted in one["weights"].items():
        assert three["weights"][key].shape == wanted.shape == start[key].shape
        # AdamW turns the smallest gradients, rounding and all, into steps of the learning rate, 1e-3.
        torch.testing.assert_close(three["weights"][key], wanted, atol=2e-4, rtol=0, msg=key)
