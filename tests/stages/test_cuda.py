"""Training on a GPU: the memory options, bf16, autocast, the engine and its checkpoints agree with the CPU.

Without a GPU the tests are skipped; `pytest --noconftest` runs them on the CPU, to test the tests.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from keye.model.keye import KeyeForConditionalGeneration
from stages.distributed import engine as deep
from stages.distributed.activation_memory import apply_memory_options
from stages.distributed.background import to_host, write_in_background
from stages.distributed.checkpoints import load_checkpoint, save_checkpoint
from stages.optimizer import build_optimizer
from tests.stages import small
from tests.stages.test_memory import learn, row

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moved(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative difference of all gradients together, and of the loss."""
    assert found.keys() == wanted.keys()
    squares = [(float((found[n].cpu().float() - w).square().sum()), float(w.square().sum())) for n, w in wanted.items()]
    loss = abs(float(found["loss"]) / float(wanted["loss"]) - 1)
    return max(loss, (sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5)


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    """Loss and gradients in float32 on the CPU."""
    return learn(small.model(), row())


@pytest.mark.parametrize("settings", [(False,), (True,), (True, True), (True, False, 3), (True, True, 64)])
def test_a_step_on_a_gpu_equals_the_plain_one_on_the_cpu(plain, settings) -> None:
    model = small.model().to(DEVICE)
    apply_memory_options(model, *settings)
    assert apart(learn(model, moved(row())), plain) < 1e-4


@pytest.mark.parametrize("settings", [(False,), (True,)], ids=["plain", "recomputed"])
def test_compiled_layers_on_a_gpu_equal_the_plain_ones_on_the_cpu(plain, settings) -> None:
    model = small.model().to(DEVICE)
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    apply_memory_options(model, *settings, compiled=True, backend=backend)
    assert apart(learn(model, moved(row())), plain) < 1e-4


@pytest.mark.parametrize("settings", [(False,), (True, True, 3)], ids=["plain", "offloaded and tiled"])
def test_bf16_is_close_to_fp32(plain, settings) -> None:
    model = small.model().to(DEVICE, torch.bfloat16)
    apply_memory_options(model, *settings)
    assert 1e-5 < apart(learn(model, moved(row())), plain) < 0.05


def test_autocast_computes_products_in_bf16_and_keeps_fp32_gradients(plain) -> None:
    model = small.model().to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = learn(model, moved(row()))
    assert all(value.dtype == torch.float32 for value in found.values())
    assert 1e-5 < apart(found, plain) < 0.05


# --- the engine


def engine_of(zero: int, offload: bool = False) -> tuple[KeyeForConditionalGeneration, object]:
    deep.start(threads=1)
    model = small.model().to(DEVICE)
    optimizer = small.optimizer(1e-3)
    return model, deep.build(model.train(), optimizer, 10, zero=zero, precision="bf16", offload_optimizer=offload)


def step(engine: object) -> float:
    loss = engine(**moved(row()), num_items_in_batch=1.0).loss
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


@pytest.mark.parametrize("zero, offload", [(2, False), (2, True), (3, False), (3, True)])
def test_two_steps_in_bf16_follow_adamw_in_fp32(zero, offload) -> None:
    reference = small.model().train()
    start = {name: p.detach().clone() for name, p in reference.named_parameters()}
    adam, schedule = build_optimizer(reference, small.optimizer(1e-3), 10)
    limit = small.optimizer(1e-3).max_grad_norm
    for _ in range(2):
        adam.zero_grad()
        reference(**row(), num_items_in_batch=1.0).loss.backward()
        if limit:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), limit)
        adam.step()
        schedule.step()
    model, engine = engine_of(zero, offload)
    losses = [step(engine) for _ in range(2)]
    assert losses[1] < losses[0]
    ours, theirs = [], []
    for name, parameter in model.named_parameters():
        ours.append((deep.master_weight(parameter).cpu().float() - start[name]).flatten())
        theirs.append((reference.get_parameter(name).detach() - start[name]).flatten())
    # Adam's first steps are those of the signs of the gradients, which bf16 changes only near zero.
    assert float(torch.cosine_similarity(torch.cat(ours), torch.cat(theirs), dim=0)) > 0.9


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_restores_weights_and_random_numbers(tmp_path: Path, background) -> None:
    _, engine = engine_of(2)
    step(engine)
    if background:
        write_in_background(engine)
    save_checkpoint(engine, tmp_path, 1, {"seen": 1}, shared=True)
    drawn, after = torch.rand(4, device=DEVICE), step(engine)
    _, other = engine_of(2)
    assert load_checkpoint(other, tmp_path) == (1, {"seen": 1})
    assert torch.equal(torch.rand(4, device=DEVICE), drawn)
    assert step(other) == after


def test_copies_in_host_memory_are_those_of_the_device() -> None:
    flat = torch.arange(12.0, device=DEVICE)
    made = to_host({"a": flat[:4].view(2, 2), "b": [flat[4:], "word"]})
    flat.zero_()
    assert made["a"].device.type == "cpu" and made["a"].tolist() == [[0, 1], [2, 3]]
    assert made["b"][0].tolist() == [4, 5, 6, 7, 8, 9, 10, 11] and made["b"][1] == "word"
