"""Compiled layers give the same losses, gradients, weights and names as plain ones, with one graph for all lengths."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from stages.data.collate import pack
from stages.data.loader import Loader
from stages.distributed import engine as deep
from stages.distributed.activation_memory import apply_memory_options
from stages.distributed.parallel import build_parallel_dims
from stages.multitask import Multitask
from stages.trainer import Trainer, micro_batches
from tests.distributed import run_distributed
from tests.stages import small
from tests.stages.test_memory import learn, row, same
from tests.stages.test_parallel import packs
from tests.stages.test_trainer import RECIPE, BalancedPacker, parameters

LAYERS = 10  # more than the graphs that torch keeps of one function


def model(layers: int = LAYERS) -> KeyeForConditionalGeneration:
    torch.manual_seed(0)
    config = KeyeConfig.preset("tiny", vocab_size=64, num_hidden_layers=layers)
    config.vision_config.num_hidden_layers = layers
    config.image_token_id, config.video_token_id = 1, 2
    return KeyeForConditionalGeneration(config)


@pytest.fixture(autouse=True)
def fresh_counters() -> None:
    """Other tests of the process compile, too."""
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return learn(model(), row())


@pytest.mark.parametrize("settings", [(False,), (True,), (True, True)], ids=["plain", "recomputed", "offloaded"])
def test_compiled_layers_give_the_plain_loss_and_gradients_in_one_graph_for_all_lengths(plain, settings):
    made = model()
    apply_memory_options(made, *settings, compiled=True, backend="aot_eager")
    same(learn(made, row()), plain)
    assert counters["stats"]["unique_graphs"] > 0
    rows = [pack(samples, 1) for samples in packs().values()]
    rows += [pack([small.text_sample(length)], 1) for length in (23, 58, 40)]
    for inputs in rows:
        learn(made, inputs)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 4  # two kinds of layers, each at most once more for a length that equals the width
    for inputs in (*rows, *(pack([small.text_sample(length)], 1) for length in (19, 33, 57, 50, 44))):
        learn(made, inputs)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_code_of_inductor_gives_the_plain_loss_and_gradients(checkpointing):
    made = small.model()
    apply_memory_options(made, checkpointing, compiled=True)
    same(learn(made, row()), learn(small.model(), row()))


def three_steps(manifest: Path, folder: Path, zero: int, backend: str) -> list[tuple[list[float], dict[str, Tensor]]]:
    """Three steps of two packs each, plain and compiled; losses and how far each weight has moved."""
    deep.start(threads=1)
    deep.PERSISTENT = 0  # ZeRO-3 also partitions these small weights
    made, grid = small.processor(), build_parallel_dims()
    samples = [made.sample(line["messages"], manifest.parent) for line in small.lines(manifest)]
    parts = [samples[0:1], samples[4:12], samples[1:3], samples[5:6], samples[3:7], samples[8:9]]
    found = []
    for compiled in (False, True):
        rows = [{**pack(part, 2), "kinds": {"video": 1}} for part in parts]
        module: nn.Module = small.model(made).train()
        apply_memory_options(module, True, compiled=compiled, backend=backend)
        loader, recipe = Loader(BalancedPacker(rows, grid), grid), replace(RECIPE, zero=zero)
        count = micro_batches("multitask", RECIPE.global_batch_size, grid)
        trainer = Trainer(Multitask(RECIPE, made), module, loader, grid, recipe, folder / str(compiled), count, "fp32")
        losses = [trainer.train_step()["loss"] for _ in range(3)]
        loader.close()
        weights = small.master_weights(module) if zero == 3 else parameters(module)
        start = small.model(made).state_dict()
        found.append((losses, {name: weights[name] - start[name] for name in weights}))
    assert 0 < counters["stats"]["unique_graphs"] <= 4
    return found


@pytest.mark.parametrize(
    ("zero", "backend"),
    [(2, "aot_eager"), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, "aot_eager"), (1, "inductor")))],
)
def test_compiled_training_on_two_processes_ends_with_the_plain_losses_and_weights(tmp_path, zero, backend):
    manifest = small.world(tmp_path / "world")
    for (losses, moved), (again, compiled) in run_distributed(three_steps, 2, 400, manifest, tmp_path, zero, backend):
        assert again == pytest.approx(losses, rel=1e-5)
        assert compiled.keys() == moved.keys()
        for name, value in moved.items():
            # AdamW divides a gradient by its own size, so that one of the size of a rounding error moves a single
            # weight by any part of the learning rate. The norm over a tensor does not depend on such weights.
            assert (compiled[name] - value).norm() <= 1e-3 * value.norm(), name
