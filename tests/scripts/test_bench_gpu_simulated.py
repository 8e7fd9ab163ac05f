"""The simulated GPU counts memory, operations and waits correctly, and refuses what a GPU would refuse.

A process can have one such device, and other tests must not see it: each check runs in a process of its own.
"""

import subprocess
import sys

import pytest

from scripts.bench.common.record import ROOT

HEAD = """
import torch
from torch import nn
from scripts.bench.gpu.simulated.device import SimulatedGPU
gpu = SimulatedGPU()
"""

MEMORY_AND_WORK = """
with gpu:
    x = torch.empty(1000, 256, device=gpu.device, requires_grad=True)
    w = torch.empty(256, 512, device=gpu.device)
    assert gpu.memory.now == (1000 * 256 + 256 * 512) * 4
    gpu.restart()
    y = (x @ w).relu()
    assert gpu.memory.now == (1000 * 256 + 256 * 512 + 1000 * 512) * 4  # relu keeps its result alone
    assert gpu.memory.peak == gpu.memory.now + 1000 * 512 * 4           # while the product was alive too
    products, memory = gpu.ledger.kinds["products"], gpu.ledger.kinds["memory"]
    assert (products.kernels, products.flops) == (1, 2 * 1000 * 256 * 512)
    assert (memory.kernels, memory.bytes) == (1, 2 * 1000 * 512 * 4)
    y[:10].t().unsqueeze(0).detach()                                    # other names of the same memory
    assert gpu.ledger.kinds["memory"].kernels == 1
    y.sum().backward()
    assert gpu.ledger.kinds["products"].flops == 2 * 2 * 1000 * 256 * 512
    z = y.detach().cpu()
    assert gpu.host.now >= 1000 * 512 * 4 and gpu.ledger.kinds["transfers"].kernels == 1
"""

VALUES = """
with gpu:
    ids = torch.tensor([3, 0, 5, 0], device=gpu.device)
    rows = torch.empty(4, 8, device=gpu.device)[ids != 0]
    assert rows.shape == (2, 8) and ids.cumsum(0).tolist() == [3, 3, 8, 8]
    ids[1] = 9
    assert ids.repeat_interleave(torch.tensor([1, 2, 0, 0], device=gpu.device)).tolist() == [3, 9, 9]
    assert sum(gpu.waits.values()) == 4  # the mask, the two lists, the length of the repetition
    assert torch.bincount(ids, minlength=12).tolist() == [1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0]
    assert [x.tolist() for x in ids.unique_consecutive(return_counts=True)] == [[3, 9, 5, 0], [1, 1, 1, 1]]
    for wrong, error in (
        (lambda: torch.ones(3) + torch.ones(3, device=gpu.device), "simulated:0"),  # named in every release
        (lambda: int(torch.empty(1 << 20, device=gpu.device).argmax()), "does not have"),
    ):
        try:
            wrong()
        except (RuntimeError, NotImplementedError) as caught:
            assert error in str(caught), caught
        else:
            raise AssertionError(error)
"""

MODEL = """
from keye.model import flops
from scripts.bench.gpu import waterfall
from tests.scripts.test_bench_gpu import drawn_plan
with gpu:
    model = waterfall.model_of(True, gpu.device, torch.bfloat16)
    batch = waterfall.to_device(waterfall.packs_of([drawn_plan()], model.config, True, 1)[0], gpu.device)
    call, work = waterfall.passes_of(model, batch)[waterfall.WHOLE]
    call()
    gpu.restart()
    call()
    waits = dict(gpu.waits)
    counted = sum(kind.flops for kind in gpu.ledger.kinds.values())
    config, text, vision = model.config, model.config.text_config, model.config.vision_config
    frames = [tuple(size) for size in batch["video_grid_thw"][:, 1:].tolist()]
    patches = [h * w for h, w in frames]
    labels = int((batch["shift_labels"] != -100).sum())
    again = flops.head(text, labels).total  # the logits are computed twice
    # Five products a pair in the attention's backward pass, and the model has four.
    again += flops.decoder(text, batch["cu_seqlens"].diff().tolist()).quadratic / 2
    again += flops.tower_layers(vision, patches).quadratic / 2
    # Pixels have no gradient; positions of other sizes are sums over the table, and no product.
    again -= 2 * sum(patches) * 3 * 14 * 14 * vision.hidden_size
    assert abs(counted / (work + again) - 1) < 1e-3, (counted, work, again)
    # Grids, placeholders and labels: once each, whatever the number of layers and frames.
    assert sum(waits.values()) == 3, waits
"""


@pytest.mark.parametrize("code", [MEMORY_AND_WORK, VALUES, MODEL], ids=["memory and work", "values", "model"])
def test_simulated_gpu(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", HEAD + code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
