"""hpZ: a second copy of the weights of ZeRO-3 within a node gives the same training, on two nodes of two processes."""

import pytest
import torch

from keye.errors import RecipeError
from stages.distributed import engine as deep
from stages.recipe import load
from stages.run import check_hpz
from tests.distributed import run_distributed
from tests.stages import small
from tests.stages.test_checkpoints import STEPS, Net, train
from tests.stages.test_run import RECIPE


def four(hpz: int) -> tuple[list[float], int, bool]:
    """(losses, ranks of the groups within a node, whether a second copy was made)."""
    from deepspeed.utils import groups

    deep.start(threads=1)
    engine = deep.build(Net(0), small.optimizer(1e-2), STEPS, zero=3, precision="fp32", hpz=hpz)
    # Small parameters are not partitioned by default; here all are.
    for parameter in engine.module.parameters():
        parameter.ds_persist = False
    seen = []
    hook = engine.module.last.register_full_backward_pre_hook(
        lambda module, _: seen.append(getattr(module.weight, "ds_secondary_tensor", None) is not None)
    )
    losses = train(engine, range(STEPS))
    hook.remove()
    group = groups._get_zero_param_intra_parallel_group()
    return losses, 1 if group is None else torch.distributed.get_world_size(group), any(seen)


@pytest.mark.slow
def test_a_second_copy_within_the_node_changes_no_loss():
    plain, twice = (run_distributed(four, 4, 200, hpz) for hpz in (1, 2))
    assert [size for _, size, _ in plain] == [1] * 4 and [size for _, size, _ in twice] == [2] * 4
    assert [copied for *_, copied in twice] == [True] * 4
    assert twice[0][0] == pytest.approx(plain[0][0], rel=1e-5) and plain[0][0][0] > plain[0][0][-1]


def test_hpz_is_for_zero_3_and_divides_a_node(tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE.replace("SEQUENCE", "1").replace('tokenizer = "TOKENIZER"', ""))
    with pytest.raises(RecipeError, match="alignment.hpz = 8 keeps a second copy .* set alignment.zero = 3 or hpz = 1"):
        load(tmp_path / "r.toml", ["alignment.hpz=8"])
    assert load(tmp_path / "r.toml", ["alignment.hpz=8", "alignment.zero=3"]).alignment.hpz == 8
    check_hpz("alignment", 4, 8)
    with pytest.raises(RecipeError, match="alignment.hpz = 3 does not divide the 8 processes of a node"):
        check_hpz("alignment", 3, 8)
