"""The policy is read as the stages read theirs: once, in the dtype of training, and it comes out exact in fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch

import rl.trainer
from keye.checkpoint.shards import open_checkpoint
from keye.model.keye import KeyeForConditionalGeneration
from stages.distributed import engine
from tests.distributed import run_distributed
from tests.rl.test_identity import recipe_of
from tests.rl.test_trainer import make_run
from tests.stages.test_weights import held


def tune(run: Path, zero: int, rate: float = 1e-9) -> list[list[Any]]:
    """Trains with a frozen tower; (dtype, device) of all tensors of the decoder's and tower's shapes before DeepSpeed's
    engine is built, and after."""
    seen: list[list[Any]] = []
    config = KeyeForConditionalGeneration.config_class.from_pretrained(run / "annealing/model")
    shapes = [
        (config.text_config.intermediate_size, config.text_config.hidden_size),
        (config.vision_config.intermediate_size, config.vision_config.hidden_size),
    ]
    build = rl.trainer.build

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append([held(shape) for shape in shapes])
        made = build(*args, **kwargs)
        seen.append([held(shape) for shape in shapes])
        return made

    rl.trainer.build = watched
    engine.start(threads=1)
    recipe = recipe_of(
        1, "variety", precision="bf16", zero=zero, freeze=("visual",), learning_rate=rate, max_grad_norm=1e-12
    )
    try:
        rl.trainer.GspoTrainer(recipe, run).train()
    finally:
        rl.trainer.build = build
    return seen


@pytest.mark.parametrize("zero", [0, 2])
def test_masters_begin_with_the_fp32_of_the_file_and_nothing_is_held_twice(tmp_path, zero):
    run = make_run(tmp_path)
    for seen in run_distributed(tune, 2, 240, run, zero):
        one = [(torch.bfloat16, "cpu")]
        # gate_proj and up_proj of one decoder layer, fc1 of one layer of the tower; no fp32 of any of them. The engine
        # has what is trained in one storage, and the masters flat.
        assert seen == [[one * 2, one], [one, one]]
    start, end = (open_checkpoint(run / name / "model") for name in ("annealing", "gspo"))
    assert start.keys() == end.keys()
    for name in start:
        before, after = start[name].read(), end[name].read()
        assert after.dtype == torch.float32
        # The learning rate is far below what bf16 tells apart: rounded masters would be off by up to 1e-2 of a weight.
        torch.testing.assert_close(after, before, rtol=0, atol=0 if ".visual." in name else 2e-8, msg=name)
    model = KeyeForConditionalGeneration.from_pretrained(run / "gspo/model")
    assert model.dtype == torch.float32 and model.config.dtype == torch.float32
