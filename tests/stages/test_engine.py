"""What leaves bf16 training is fp32; what is not finite, or held, moves nothing."""

import torch

from stages import engine as deep
from tests.distributed import run_distributed
from tests.stages import small
from tests.stages.test_checkpoints import Net

LR = 1e-5  # far below what bf16 can tell apart at weights of about 0.3


def one_step() -> dict[str, torch.Tensor]:
    deep.start(threads=1)
    model = Net(0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = deep.build(model, lr=LR, steps=9, zero=1, clip=0.0, precision="bf16")
    asked, answer = [], [True]
    deep.hold_steps(engine, lambda norm: asked.append(norm) or answer[0])
    x = torch.ones(1, 5, dtype=torch.bfloat16)
    engine.backward(engine(x) * float("inf"))
    engine.step()
    engine.backward(engine(x) * 1e4)  # held: it leaves no trace in the moments, nor in their count of steps
    engine.step()
    untouched, answer[0] = small.master_weights(model), False
    engine.backward(engine(x))
    engine.step()
    return {"start": start, "untouched": untouched, "after": small.master_weights(model), "norms": asked}


def test_bf16_leaves_fp32_weights_and_steps_that_are_skipped_leave_no_trace():
    found = run_distributed(one_step, 1, 300)[0]
    for name, before in found["start"].items():
        after, moved = found["after"][name], not name.startswith("frozen")
        # What does not train has no fp32 value in the optimizer: its exact value stays on disk (`stages.weights`).
        assert after.dtype == (torch.float32 if moved else torch.bfloat16)
        assert torch.equal(found["untouched"][name], before if moved else before.bfloat16()), name
        # Adam's first step is the learning rate in the direction of the gradient, whatever its size.
        steps = (after - (before if moved else before.bfloat16())).abs()
        torch.testing.assert_close(steps, torch.full_like(steps, LR if moved else 0.0), rtol=0.02, atol=0)
    big, again, small, _ = found["norms"]  # once a group, in the steps whose gradient is finite
    assert big == again > 1e3 * small > 0
