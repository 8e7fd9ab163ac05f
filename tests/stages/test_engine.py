"""bf16 training produces fp32 weights; non-finite or skipped steps change nothing."""

from typing import Any

import pytest
import torch

from stages.distributed import engine as deep
from tests.distributed import run_distributed
from tests.stages import small
from tests.stages.test_checkpoints import Net

LR = 1e-5  # far below the resolution of bf16 at weights of about 0.3


def one_step() -> dict[str, torch.Tensor]:
    deep.start(threads=1)
    model = Net(0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = deep.build(model, small.optimizer(LR, max_grad_norm=0.0), 9, zero=1, precision="bf16")
    asked, answer = [], [True]
    deep.skip_steps_when(engine, lambda norm: asked.append(norm) or answer[0])
    x = torch.ones(1, 5, dtype=torch.bfloat16)
    engine.backward(engine(x) * float("inf"))
    engine.step()
    engine.backward(engine(x) * 1e4)  # skipped: it changes neither the moments nor their count of steps
    engine.step()
    untouched, answer[0] = small.master_weights(model), False
    engine.backward(engine(x))
    engine.step()
    return {"start": start, "untouched": untouched, "after": small.master_weights(model), "norms": asked}


def test_bf16_leaves_fp32_weights_and_steps_that_are_skipped_leave_no_trace():
    found = run_distributed(one_step, 1, 300)[0]
    for name, before in found["start"].items():
        after, moved = found["after"][name], not name.startswith("frozen")
        # Frozen parameters have no fp32 value in the optimizer: their exact value stays on disk
        # (`stages.distributed.weights`).
        assert after.dtype == (torch.float32 if moved else torch.bfloat16)
        assert torch.equal(found["untouched"][name], before if moved else before.bfloat16()), name
        # Adam's first step is the learning rate in the direction of the gradient, whatever its size.
        steps = (after - (before if moved else before.bfloat16())).abs()
        torch.testing.assert_close(steps, torch.full_like(steps, LR if moved else 0.0), rtol=0.02, atol=0)
    big, again, small, _ = found["norms"]  # once a group, in the steps whose gradient is finite
    assert big == again > 1e3 * small > 0


def norms(zero: int) -> tuple[float, float, float, torch.Tensor]:
    """The norm of a gradient above the limit of 0.5, as the guard, the step's metrics and a hand computation have it.

    Last, the gradient that the optimizer stepped on.
    """
    model = Net(0)
    engine = deep.build(model, small.optimizer(0.1, max_grad_norm=0.5), 9, zero=zero, precision="fp32")
    asked, x = [], torch.full((1, 5), 3.0)
    deep.skip_steps_when(engine, lambda norm: bool(asked.append(norm)))
    plain = Net(0)
    (plain(x) * 1e4).backward()
    wanted = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    stepped = []
    engine.basic_optimizer.register_step_pre_hook(
        lambda optimizer, *_: stepped.extend(p.grad.clone() for g in optimizer.param_groups for p in g["params"])
    )
    engine.backward(engine(x) * 1e4)
    engine.step()
    return asked[0], deep.gradient_norm(engine), float(wanted), torch.cat([g.flatten() for g in stepped])


def unmoved(zero: int, limit: float) -> bool:
    """Whether a step with a gradient that is not finite leaves the fp32 weights as they are."""
    model = Net(0)
    before = [p.detach().clone() for p in model.parameters()]
    engine = deep.build(model, small.optimizer(0.1, max_grad_norm=limit), 9, zero=zero, precision="fp32")
    engine.backward(engine(torch.ones(1, 5)) * float("nan"))
    engine.step()
    return all(torch.equal(p.detach(), old) for p, old in zip(model.parameters(), before, strict=True))


def all_norms() -> tuple[list[tuple[float, float, float, torch.Tensor]], list[bool]]:
    deep.start(threads=1)
    return [norms(zero) for zero in (0, 1)], [unmoved(0, 0.0), unmoved(0, 0.5), unmoved(1, 0.5)]


def test_guard_gets_the_norm_before_clipping_and_the_optimizer_the_clipped_gradient():
    found, kept = run_distributed(all_norms, 1, 300)[0]
    assert kept == [True] * 3
    for seen, settings, wanted, stepped in found:
        assert wanted > 100 and seen == pytest.approx(wanted, rel=1e-5) and settings == pytest.approx(wanted, rel=1e-5)
        assert float(stepped.norm()) <= 0.5 * (1 + 1e-5)


class Sum(torch.nn.Module):
    """One weight whose gradient is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum()


def summed(zero: int) -> float:
    """Norm of the mean of 32 gradients per rank: one is 256 on rank 0, the others 1, which bf16 cannot add to 256."""
    engine = deep.build(
        Sum(), small.optimizer(1e-3, max_grad_norm=0.0), 9, zero=zero, accumulation=32, precision="bf16"
    )
    for i in range(32):
        value = 256.0 if i == 0 and torch.distributed.get_rank() == 0 else 1.0
        engine.backward(engine(torch.full((4, 2), value, dtype=torch.bfloat16)))
        engine.step()
    return deep.gradient_norm(engine)


def all_summed() -> list[float]:
    deep.start(threads=1)
    return [summed(zero) for zero in (0, 1, 2, 3)]


def test_gradients_in_bf16_are_summed_in_fp32_over_micro_batches_and_ranks():
    wanted = (256 + 31 + 32) / 64 * 8**0.5
    assert run_distributed(all_summed, 2, 300)[0] == pytest.approx([wanted] * 4, rel=1e-5)


def bucket_sizes() -> list[list[int]]:
    """Elements of the buckets in a backward pass of ZeRO-1, 2 and 3 with 12 + 3 trained parameters."""
    deep.start(threads=1)
    sizes = []
    for zero in (1, 2, 3):
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1000))
        model[1].requires_grad_(False)
        engine = deep.build(model, small.optimizer(1e-3), 9, zero=zero, precision="bf16")
        found: set[int] = set()

        def look(*_: Any, engine: Any = engine, found: set[int] = found) -> None:
            for bucket in engine.optimizer.ipg_buckets.values():
                buffers = bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
                found.update(x.numel() for x in buffers if x is not None)

        model[0].weight.register_hook(look)
        engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).float().sum())
        sizes.append(sorted(found))
    return sizes


def test_buckets_are_no_larger_than_the_trained_parameters():
    assert run_distributed(bucket_sizes, 2, 300) == [[[15], [15], [15]]] * 2


class Parts(torch.nn.Module):
    """Modules with the names of a model's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.projector, self.lm_head = (torch.nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.projector(self.visual(x))).sum()


def moved(zero: int) -> dict[str, float]:
    """Part → change of each of its values in Adam's first step, which is the learning rate."""
    torch.manual_seed(0)
    model = Parts()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scale = {"vision": 0.1, "projector": 4.0}
    engine = deep.build(model, small.optimizer(1e-3, lr_scale=scale), 9, zero=zero, precision="fp32")
    engine.backward(engine(torch.ones(1, 3)))
    engine.step()
    after = small.master_weights(model)
    return {name: float((after[name] - before[name]).abs().max()) for name in before}


def all_moved() -> list[dict[str, float]]:
    deep.start(threads=1)
    return [moved(zero) for zero in (0, 2, 3)]


def test_each_part_of_a_model_has_its_own_learning_rate():
    for rates in run_distributed(all_moved, 1, 300)[0]:
        for name, wanted in (("visual", 1e-4), ("projector", 4e-3), ("lm_head", 1e-3)):
            assert rates[f"{name}.weight"] == pytest.approx(wanted, rel=0.01)
            assert rates[f"{name}.bias"] == pytest.approx(wanted, rel=0.01)
