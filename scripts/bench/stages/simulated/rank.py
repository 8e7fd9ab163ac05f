"""One simulated rank: the real trainer takes a real step, on shapes alone, in torch's fake process group.

Everything between the batch and the optimizer's step is what a run executes: the stage, `shard`, the model, activation
checkpointing, DeepSpeed's engine and ZeRO with the recipe's own configuration, AdamW. A process simulates one rank.
"""

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from keye.model import attention, backends
from keye.model.config import KeyeConfig
from keye.model.keye import KeyeForConditionalGeneration
from scripts.bench.stages.simulated.shapes import Memory, Shapes
from stages import trainer as training
from stages.cost.footprint import Share
from stages.distributed.activation_memory import apply_memory_options
from stages.distributed.collectives import Collective, recorded
from stages.distributed.parallel import ParallelDims, build_parallel_dims, vision_shares
from stages.metrics import Peak
from stages.recipe import StageRecipe, stage_of
from stages.run import STAGE_CLASSES
from stages.trainer import Trainer

os.environ.setdefault("DS_ACCELERATOR", "cpu")


@dataclass
class Measured:
    """Bytes of a rank in one step.

    weights, optimizer: held all the time. gradients: held when the backward passes are done. buckets: of gradients on
    their way to other ranks, with what one takes that is reduced (not those of a parameter larger than a bucket).
    kept: activations at the loss. logits: what the loss and its backward pass add. vision: what a chunk of
    frames has at most, from when it is recomputed to the next one. pixels: of all micro-batches. at_loss, in_backward,
    in_step: all that is held at the three moments of `Footprint.moments`.
    """

    weights: int = 0
    optimizer: int = 0
    gradients: int = 0
    pixels: int = 0
    kept: int = 0
    logits: int = 0
    buckets: int = 0
    vision: int = 0
    at_loss: int = 0
    in_backward: int = 0
    in_step: int = 0

    @property
    def peak(self) -> int:
        return max(self.at_loss, self.in_backward, self.in_step)


@dataclass
class Simulated:
    """What a rank did in one step."""

    rank: int
    calls: list[Collective]
    memory: Measured
    operators: int
    share: Share  # the most of its micro-batches


class Prepared:
    """A loader of given batches."""

    stalled = 0.0

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = list(batches)

    def next(self) -> dict[str, Any]:
        return self.batches.pop(0)


def join(rank: int, world: int) -> None:
    """Make this process rank `rank` of `world` in a group that sends nothing."""
    places = {"RANK": rank, "LOCAL_RANK": rank % 8, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in places.items()})
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


class NormAsKernel(torch.autograd.Function):
    """The kernel of an RMS norm, without values: it keeps input, weight, and an fp32 number for each row.

    torch takes the norm of the meta device apart, which keeps more.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = context.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The choices that the code makes by the device: a GPU's attention kernel, overlapped reduction, fused AdamW."""
    import deepspeed
    from torch.optim import adam

    begin = deepspeed.initialize
    attend = torch.nn.functional.scaled_dot_product_attention
    replaced = (
        (torch.nn.functional, "scaled_dot_product_attention"), (torch.nn.functional, "rms_norm"),
        (deepspeed, "initialize"), (attention, "choose"), (torch, "is_autocast_enabled"),
        (adam, "_device_dtype_check_for_fused"), (torch, "tensor"),
    )  # fmt: skip
    own = [(place, name, getattr(place, name)) for place, name in replaced]
    backends.obstacle("torch", torch.device("cpu"))  # loads the kernel's module

    def initialize(*, config: dict[str, Any], optimizer: Any, **more: Any) -> Any:
        config["zero_optimization"]["overlap_comm"] = True
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
        return begin(config=config, optimizer=optimizer, **more)

    deepspeed.initialize = initialize

    def attend_as_kernel(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any
    ) -> Tensor:
        """The text tower's attention. Without values torch takes it apart, which keeps all weights in fp32."""
        if attn_mask is not None or not query.is_meta:
            return attend(query, key, value, attn_mask, **more)
        more = {"scale": more.get("scale"), "is_causal": more.get("is_causal", False)}
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, **more)[0]

    torch.nn.functional.scaled_dot_product_attention = attend_as_kernel
    torch.nn.functional.rms_norm = lambda x, shape, weight, eps: NormAsKernel.apply(x, weight)
    attention.choose = lambda *_: "torch"
    make = torch.tensor
    torch.tensor = lambda *args, device=None, **more: make(*args, **more)  # what is made of numbers keeps them
    # Neither knows the meta device.
    torch.is_autocast_enabled = lambda *_: False
    adam._device_dtype_check_for_fused = lambda *_, **__: None
    try:
        yield
    finally:
        for place, name, value in own:
            setattr(place, name, value)


def build(config: KeyeConfig, dtype: torch.dtype) -> KeyeForConditionalGeneration:
    """The model without memory, in the dtype in which a run loads it."""
    with torch.device("meta"):
        return KeyeForConditionalGeneration(config).to(dtype)


def step(
    name: str,
    settings: StageRecipe,
    config: KeyeConfig,
    processor: Any,
    make_batches: Any,
) -> Simulated:
    """Take one optimizer step of phase `name` on this rank; `make_batches(grid)` gives its micro-batches."""
    grid = build_parallel_dims(settings.sequence_parallel)
    batches = make_batches(grid)
    stage = STAGE_CLASSES[stage_of(name)](settings, processor)
    shapes, found = Shapes(), Measured()
    with recorded() as calls, as_on_a_gpu(), shapes, tempfile.TemporaryDirectory() as folder:
        model = build(config, torch.bfloat16)
        apply_memory_options(model, settings.checkpointing, settings.offload, settings.mlp_tiles)
        with torch.device("meta"):
            module = stage.prepare(model).train()
        for parameter in module.parameters():
            shapes.memory.see(parameter.data)
        trained = {id(parameter) for parameter in module.parameters()}
        for parameter in model.parameters():  # stage 0 reads the tower's weights and no others
            if id(parameter) not in trained:
                shapes.memory.forget(parameter.data)
        training.find_peak = lambda precision: Peak(1.0, "simulated")
        training.load_checkpoint = lambda *_: None
        trainer = Trainer(stage, module, Prepared(batches), grid, settings, Path(folder), len(batches), "bf16")
        _forget_metadata(trainer.engine.optimizer, shapes.memory)
        found.weights, masters = _bytes(module.parameters()), _optimizer(trainer.engine)
        watch(trainer, model, shapes.memory, found)
        calls.clear()
        trainer.train_step()
        found.optimizer = _optimizer(trainer.engine)
    # The first step makes the moments; any other one has them from its beginning.
    moments = found.optimizer - masters
    found.at_loss, found.in_backward = found.at_loss + moments, found.in_backward + moments
    found.gradients -= found.weights + masters + found.pixels
    return Simulated(grid.rank, list(calls), found, shapes.operators, _share(batches, grid))


def _forget_metadata(optimizer: Any, memory: Memory) -> None:
    """DeepSpeed keeps the shapes of all parameters as meta tensors, which are none of the memory."""
    for group in getattr(optimizer, "round_robin_bit16_meta", []):
        for tensor in group:
            memory.forget(tensor)


def watch(trainer: Trainer, model: nn.Module, memory: Memory, found: Measured) -> None:
    """Have the parts of the step write what they hold to `found`."""
    held, optimizer = {"before": 0, "backward": 0}, trainer.engine.optimizer

    def begin(run: Any, module: nn.Module, batches: list[dict[str, Any]], grid: ParallelDims) -> None:
        found.pixels = _bytes(x for batch in batches for x in batch.values() if isinstance(x, Tensor) and x.is_meta)
        memory.restart()
        run(module, batches, grid)
        found.at_loss = memory.peak

    def loss(run: Any, *args: Any) -> Any:
        held["before"] = memory.now
        memory.restart()
        out = run(*args)
        found.at_loss = max(found.at_loss, memory.peak)
        if not found.logits:  # stage 0 has no head
            found.kept = max(found.kept, memory.now - held["before"])
        return out

    def head(run: Any, *args: Any) -> Any:
        begun, before = memory.now, memory.peak
        found.kept = max(found.kept, begun - held["before"])
        memory.restart()
        out = run(*args)
        found.logits = max(found.logits, memory.peak - begun)
        memory.peak = max(memory.peak, before)
        if args[0].requires_grad:
            args[0].register_hook(head_is_done)
        return out

    def head_is_done(_: Tensor) -> None:
        """The backward pass of the loss is through: what follows is that of the layers."""
        found.logits = max(found.logits, memory.peak - held["backward"])
        found.at_loss = max(found.at_loss, memory.peak)
        memory.restart()

    def frames(run: Any, *args: Any) -> Any:
        chunk_is_done()
        held["chunk"] = memory.window = memory.now
        return run(*args)

    def chunk_is_done() -> None:
        if "chunk" in held:
            found.vision = max(found.vision, memory.window - held.pop("chunk"))

    def backward(run: Any, *args: Any, **kwargs: Any) -> Any:
        held["backward"] = memory.now
        held.pop("chunk", None)  # of the forward pass, whose window has all that follows
        memory.restart()
        out = run(*args, **kwargs)
        chunk_is_done()
        found.in_backward = max(found.in_backward, memory.peak)
        return out

    def held_by_buckets() -> int:
        return _bytes(x for bucket in optimizer.ipg_buckets.values() for x in bucket.buffer if x is not None)

    def reduce(run: Any, *args: Any, **kwargs: Any) -> Any:
        begun, before, alone = memory.now, (memory.peak, memory.window), not optimizer.extra_large_param_to_reduce
        memory.restart()
        out = run(*args, **kwargs)
        if alone:
            found.buckets = max(found.buckets, held_by_buckets() + memory.peak - begun)
        # A chunk of frames is not charged with the reduction; the step is.
        memory.peak, memory.window = max(memory.peak, before[0]), max(memory.now, before[1])
        return out

    def step(run: Any, *args: Any, **kwargs: Any) -> Any:
        found.gradients = max(found.gradients, memory.now - held_by_buckets())
        memory.restart()
        out = run(*args, **kwargs)
        found.in_step = max(found.in_step, memory.peak)
        return out

    for place, name, around in (
        (trainer.stage, "begin", begin), (trainer.stage, "loss", loss), (model, "_loss", head),
        (model.base_model.visual, "_encode", frames), (trainer.engine, "backward", backward),
        (trainer.engine, "step", step), (optimizer, "reduce_ipg_grads", reduce),
    ):  # fmt: skip
        setattr(place, name, partial(around, getattr(place, name)))


def _bytes(tensors: Any) -> int:
    """Of the storages of tensors, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _optimizer(engine: Any) -> int:
    """Master weights and moments."""
    inner = engine.optimizer.optimizer
    masters = [p for group in inner.param_groups for p in group["params"]]
    moments = [x for state in inner.state.values() for x in state.values() if isinstance(x, Tensor)]
    return _bytes([*masters, *moments])


def _share(batches: list[dict[str, Any]], grid: ParallelDims) -> Share:
    """The most tokens, patches and labels of this rank's micro-batches, and the patches of its largest frame."""
    shares = []
    for batch in batches:
        names = ("pixel_values", "pixel_values_videos", "pixel_values_mine", "pixels")
        patches = sum(len(batch[name]) for name in names if name in batch)
        frame = _largest_frame(batch, grid)
        if "captions" in batch:
            shares.append((batch["captions"].numel(), patches, 0, frame))
            continue
        labels = batch["shift_labels"].chunk(grid.sequence, dim=-1)[grid.sequence_rank]
        shares.append((labels.numel(), patches, int((labels != -100).sum()), frame))
    return Share(*map(max, zip(*shares, strict=True)))


def _largest_frame(batch: dict[str, Any], grid: ParallelDims) -> int:
    """Patches of the largest frame that this rank encodes whole, or of its largest part of one."""
    grids = [batch[name] for name in ("grids", "image_grid_thw", "video_grid_thw") if name in batch]
    if not grids:
        return 0
    rows = torch.cat(grids)
    if grid.sequence == 1:
        return int(rows[:, 1:].prod(1).max())
    return max((4 * piece.tokens for piece in vision_shares(rows, grid.sequence)[grid.sequence_rank]), default=0)
