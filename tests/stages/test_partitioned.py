"""ZeRO-3 reads a model's weights one parameter at a time; what is trained, resumed and saved is the same to the bit."""

import gc
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import SiglipTextConfig, SiglipTextModel

from keye.errors import KeyeError
from stages.contrastive import Contrast
from stages.data.collate import pack
from stages.distributed import engine
from stages.distributed.checkpoints import load_checkpoint, save_checkpoint
from stages.distributed.parallel import build_parallel_dims, shard
from stages.distributed.weights import open_start, write_model
from stages.distributed.zero3 import read_partitioned
from stages.optimizer import OptimizerConfig
from tests.distributed import run_distributed
from tests.stages import small
from tests.stages.test_parallel import IMAGE, VIDEO, packs

STEPS = 3


def begin(start: Path, device: str, precision: str, frozen: bool = False, hpz: int = 1) -> tuple[Any, Any]:
    """(model, engine) of ZeRO-3 that keeps no parameter complete; on "meta" the engine reads the weights."""
    engine.PERSISTENT = 0
    engine.start(threads=1)
    opened = open_start(start)
    model = opened.build(torch.bfloat16 if precision == "bf16" else torch.float32, device).train()
    model.visual.requires_grad_(not frozen)
    adam = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, lr_scale={"vision": 0.5})
    sources = opened.sources(model)
    built = engine.build(model, adam, steps=STEPS, zero=3, precision=precision, sources=sources, hpz=hpz)
    return model, built


def train(built: Any, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step; the ranks have different packs, one of them without a picture."""
    grid = build_parallel_dims(1)
    row = pack(packs()["stills and frames"][:2] if grid.rank == 0 else packs()["text alone"], 2)
    curve = []
    for _ in range(steps):
        loss = built(**shard(row, grid, IMAGE, VIDEO), num_items_in_batch=1.0).loss / 40
        built.backward(loss * grid.world)
        built.step()
        curve.append((float(loss.detach()), float(built.get_global_grad_norm())))
    return curve


def whole(start: Path, out: Path, device: str, precision: str, frozen: bool, hpz: int) -> tuple[Any, dict[str, Tensor]]:
    model, built = begin(start, device, precision, frozen, hpz)
    curve = train(built, STEPS)
    write_model(model, model, open_start(start), out, lambda folder: None)
    return curve, small.master_weights(model)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start") / "model"
    small.model(seed=5, tie_word_embeddings=False).save_pretrained(path)
    return path


@pytest.mark.parametrize(("precision", "frozen", "tied", "hpz"), [("fp32", False, True, 1), ("bf16", True, False, 2)])
def test_weights_read_one_by_one_train_and_are_saved_to_the_same_bits(tmp_path, precision, frozen, tied, hpz):
    start = tmp_path / "start"
    small.model(seed=5, tie_word_embeddings=tied).save_pretrained(start)
    cases = [run_distributed(whole, 2, 200, start, tmp_path / d, d, precision, frozen, hpz) for d in ("cpu", "meta")]
    for (curve, weights), (wanted, before) in zip(cases[1], cases[0], strict=True):
        assert curve == wanted and weights.keys() == before.keys()
        assert all(torch.equal(weights[name], before[name]) for name in before)
    files = [sorted((tmp_path / d).glob("*.safetensors")) for d in ("cpu", "meta")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    name = "model.projector.linear_2.weight"
    trained, begun = (open_start(path).stored[name].read() for path in (tmp_path / "meta", start))
    assert not torch.equal(trained, begun)


def stop_and_resume(start: Path, folder: Path) -> Any:
    _, built = begin(start, "meta", "bf16")
    train(built, 1)
    save_checkpoint(built, folder, 1, {}, shared=True)
    wanted = train(built, STEPS - 1)
    _, again = begin(start, "meta", "bf16")
    assert load_checkpoint(again, folder) == (1, {})
    return train(again, STEPS - 1), wanted


def test_a_run_whose_weights_were_read_one_by_one_resumes(start, tmp_path):
    for resumed, wanted in run_distributed(stop_and_resume, 2, 200, start, tmp_path):
        assert resumed == wanted


class Alive(TorchDispatchMode):
    """Bytes of all tensors of this process that are not on the meta device, whenever a parameter is agreed on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "broadcast" in str(func):
            self.seen.append(alive())
        return func(*args, **kwargs or {})


def alive() -> int:
    every = [x for x in gc.get_objects() if isinstance(x, Tensor) and not x.is_meta]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in every}.values())


def watch(start: Path) -> tuple[list[int], int, int]:
    """(bytes alive, one figure for each parameter that is read; bytes of the model; of its largest tensor)."""
    engine.start(threads=1)
    sizes = [2 * p.numel() for p in open_start(start).build(torch.bfloat16, "meta").parameters()]
    gc.collect()
    gc.freeze()  # what was alive before is not counted, nor looked through each time
    with Alive() as mode:
        begin(start, "meta", "bf16")
    return mode.seen[: len(sizes)], sum(sizes), max(sizes)


def test_a_rank_keeps_its_share_and_one_complete_parameter(start):
    for seen, total, largest in run_distributed(watch, 2, 200, start):
        padded = total / 2 + 2 * len(seen)
        assert len(seen) > 40 and padded + 2 * largest < 0.9 * total
        assert total / 2 <= max(seen) <= padded + 2 * largest, (max(seen), total, largest)


def contrast(start: Path, device: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Stage 0 with a tower from a file, and a text tower and a head that are drawn in fp32.

    Returns:
        Weights, and the devices of the buffers.
    """
    engine.PERSISTENT = 0
    engine.start(threads=1)
    opened = open_start(start)
    model = opened.build(torch.bfloat16, device, ("visual",))
    width = model.visual.config.hidden_size
    torch.manual_seed(11)
    text = SiglipTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, projection_size=width, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    module: nn.Module = Contrast(model.visual, SiglipTextModel(text)).requires_grad_(True)
    adam = OptimizerConfig(learning_rate=1e-3)
    engine.build(module, adam, steps=1, zero=3, precision="bf16", sources=opened.sources(model))
    assert {p.ds_tensor.dtype for p in module.parameters()} == {torch.bfloat16}
    return small.master_weights(module), {name: b.device.type for name, b in module.named_buffers()}


def test_parts_that_are_drawn_keep_their_values_next_to_parts_that_are_read(start):
    for (weights, places), (wanted, before) in zip(
        *(run_distributed(contrast, 2, 200, start, device) for device in ("meta", "cpu")), strict=True
    ):
        assert places == before and weights.keys() == wanted.keys()
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def without_a_file(start: Path, folder: Path) -> str:
    """Rank 1 has a copy of the start model whose weights end too early."""
    rank = torch.distributed.get_rank()
    own = folder / str(rank)
    shutil.copytree(start, own)
    found = open_start(own)
    if rank == 1:
        for path in own.glob("*.safetensors"):
            os.truncate(path, path.stat().st_size // 2)
    engine.start(threads=1)
    module = found.build(torch.float32, "meta")
    config = {"bf16": {"enabled": False}}
    with pytest.raises(KeyeError) as refused:
        read_partitioned(module, found.sources(module), config, torch.device("cpu"))
    return str(refused.value)


def test_a_file_that_one_rank_cannot_map_is_an_error_of_all(start, tmp_path):
    one, two = run_distributed(without_a_file, 2, 60, start, tmp_path)
    assert one == two and "rank 1" in one
