"""What leaves bf16 training is fp32; what is not finite moves nothing in it either."""

import torch

from stages import engine as deep
from tests.distributed import run_distributed
from tests.stages.test_checkpoints import Net

LR = 1e-5  # far below what bf16 can tell apart at weights of about 0.3


def one_step() -> dict[str, torch.Tensor]:
    deep.start(threads=1)
    model = Net(0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    engine = deep.build(model, lr=LR, steps=9, zero=1, clip=0.0, precision="bf16")
    held = []
    deep.hold_steps(engine, lambda norm: held.append(norm) or False)
    x = torch.ones(1, 5, dtype=torch.bfloat16)
    engine.backward(engine(x) * float("inf"))
    engine.step()
    untouched = deep.master_weights(model, frozen)
    engine.backward(engine(x))
    engine.step()
    return {"start": start, "untouched": untouched, "after": deep.master_weights(model, frozen), "norms": held}


def test_bf16_leaves_fp32_weights_and_skips_gradients_that_are_not_finite():
    found = run_distributed(one_step, 1, 300)[0]
    for name, before in found["start"].items():
        after, moved = found["after"][name], not name.startswith("frozen")
        assert after.dtype == torch.float32
        assert torch.equal(found["untouched"][name], before), name
        # Adam's first step is the learning rate in the direction of the gradient, whatever its size.
        steps = (after - before).abs()
        torch.testing.assert_close(steps, torch.full_like(steps, LR if moved else 0.0), rtol=0.02, atol=0)
    assert len(found["norms"]) == 2 and all(norm > 0 for norm in found["norms"])  # once a group, in the second step
