"""DeepSpeed: the process group, the engine around a module, and access to its fp32 weights."""

import functools
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keye.checkpoint.shards import Stored
from stages.distributed.hosts import threads_each
from stages.distributed.ranks import waiting_group
from stages.distributed.zero3 import gather_by_units, read_partitioned
from stages.optimizer import OptimizerConfig, build_optimizer

BUCKET = 500_000_000  # most gradients that one collective reduces
PERSISTENT = 100_000  # elements up to which ZeRO-3 keeps a complete parameter on every rank

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def start(threads: int | None = None) -> None:
    """Join the process group that torchrun or deepspeed launched, or create one of this process alone.

    threads: of torch's CPU work; by default this process's share of the machine's cores.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    torch.set_num_threads(threads or threads_each(devices=torch.cuda.device_count()))
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Only inference uses the shared-memory all-reduce, and its compilation delays the first start by minutes.
    __compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend, limit = ("nccl" if cuda else "gloo"), timedelta(minutes=30)
        if os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        else:
            dist.init_process_group(backend, timeout=limit)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def stop() -> None:
    """Leave the process group and end its threads.

    A thread of gloo that frees a tensor of the last collective while the interpreter ends aborts the process after all
    work. The threads end with the last reference to their group.
    """
    if dist.is_initialized():
        waiting_group.cache_clear()
        dist.destroy_process_group()
        # An engine of DeepSpeed that still exists refers to the group. Without the interpreter's lock, which the sleep
        # releases, its threads cannot free what they hold.
        time.sleep(0.1)


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def resolve_precision(precision: str) -> str:
    """ "auto" → "bf16" on a GPU, "fp32" on a CPU."""
    return ("bf16" if torch.cuda.is_available() else "fp32") if precision == "auto" else precision


def build(
    module: nn.Module,
    optimizer: OptimizerConfig,
    steps: int,
    *,
    zero: int = 2,
    accumulation: int = 1,
    precision: str = "auto",
    sources: Mapping[nn.Parameter, Stored] | None = None,
    hpz: int = 1,
    offload_optimizer: bool = False,
) -> Any:
    """A DeepSpeed engine that trains the parameters of `module` that require gradients.

    In bf16 the optimizer keeps fp32 weights. Gradients are then summed in fp32, over micro-batches and over ranks, and
    `zero` is at least 2: without ZeRO there are no fp32 weights, and ZeRO-1 would keep the fp32 gradients of all
    parameters on every rank.

    Args:
        module: the module to train.
        optimizer: AdamW's settings.
        steps: optimizer steps of the schedule.
        zero: stage of ZeRO, 0 to 3.
        accumulation: calls of `backward` per step. `backward` divides by it and averages over all ranks;
            `trainer.Trainer` reverts both.
        precision: "auto", "fp32" or "bf16".
        sources: files of the parameters of a bf16 `module`; the fp32 weights start with their values, and a rank reads
            its share. Other parameters start with the values of `module`. With ZeRO-3, parameters may be on the meta
            device: each is read from its file and partitioned before the next one.
        hpz: neighbouring ranks that keep a second copy of the weights of ZeRO-3, see `StageRecipe`.
        offload_optimizer: keep fp32 weights and moments in host memory and step there; needs ZeRO.
    """
    import deepspeed

    half = resolve_precision(precision) == "bf16"
    zero = max(zero, 2) if half else zero
    trained = [p for p in module.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.max_grad_norm if zero else 0.0,
        "zero_optimization": {
            "stage": zero,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            # DeepSpeed allocates complete buckets, even for few trained parameters.
            "reduce_bucket_size": min(BUCKET, sum(p.numel() for p in trained)),
            "stage3_param_persistence_threshold": PERSISTENT,
        },
        "zero_allow_untested_optimizer": True,
        # Without the check ZeRO takes a step with non-finite gradients in bf16, but not in fp32.
        "bf16": {"enabled": half, "check_grad_overflow": True},
        "steps_per_print": 1 << 30,
    }
    if half:
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    if hpz > 1:
        config["zero_optimization"]["zero_hpz_partition_size"] = hpz
    if offload_optimizer:
        # torch's AdamW steps on the host as well; DeepSpeed's own is compiled at its first use.
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        config["zero_force_ds_cpu_optimizer"] = False
    stored = {p: source for p, source in (sources or {}).items() if p.requires_grad}
    # The engine moves the parameters to other memory, in bf16.
    initial = {p: p.detach() for p in trained if half and p not in stored and p.dtype == torch.float32}
    if zero == 3 and any(p.is_meta for p in module.parameters()):
        read_partitioned(module, sources or {}, config, device())
    adam, scheduler = build_optimizer(module, optimizer, steps)
    engine, *_ = deepspeed.initialize(model=module, optimizer=adam, lr_scheduler=scheduler, config=config)
    if zero == 0:
        if optimizer.max_grad_norm:
            adam.register_step_pre_hook(functools.partial(_clip, trained, optimizer.max_grad_norm))
        skip_steps_when(engine, lambda norm: not math.isfinite(norm))  # ZeRO does so itself
    if zero == 3:
        gather_by_units(engine)
    if half:  # otherwise the fp32 weights would have been rounded to bf16
        for parameter in trained:
            if parameter in initial:
                set_master_weight(parameter, initial.pop(parameter))
            elif parameter in stored and stored[parameter].dtype != torch.bfloat16:
                set_master_weight(parameter, stored[parameter].mapped())
    return engine


def _clip(parameters: list[nn.Parameter], limit: float, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Clip the gradients before the optimizer's step. DeepSpeed without ZeRO would clip before `skip_steps_when`.

    The optimizer keeps the norm like that of ZeRO.
    """
    optimizer._global_grad_norm = nn.utils.clip_grad_norm_(parameters, limit)


def skip_steps_when(engine: Any, skip: Callable[[float], bool]) -> None:
    """Skip each optimizer step for which `skip(norm of the full gradient before clipping)` is true.

    ZeRO calls it once for each of its groups, with the same norm.
    """
    optimizer = engine.basic_optimizer
    step = optimizer.step

    @functools.wraps(step)  # with the attribute by which the schedule recognizes it
    def guarded(*args: Any, **kwargs: Any) -> Any:
        return None if skip(gradient_norm(engine)) else step(*args, **kwargs)

    optimizer.step = guarded


def gradient_norm(engine: Any) -> float:
    """Norm of the full gradient before clipping: of the last step, or of the coming one."""
    gradients = [] if engine.zero_optimization() else [p.grad for p in engine.module.parameters() if p.grad is not None]
    if gradients:
        return float(nn.utils.get_total_norm(gradients))
    return float(getattr(engine.optimizer, "_global_grad_norm", None) or 0.0)


def master_weight(parameter: nn.Parameter) -> Tensor:
    """The optimizer's fp32 value of a parameter in bf16 training; collective.

    The parameter itself if there is no such value, because it is in fp32 already or does not train.
    """
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    kept = hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
    if hasattr(parameter, "ds_id") and not parameter.requires_grad:
        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    value = safe_get_full_fp32_param(parameter) if kept and parameter.requires_grad else None
    return parameter.detach() if value is None else value.detach()


def set_master_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the optimizer's fp32 value of a parameter; a rank reads only its share of `value`."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not hasattr(parameter, "ds_id"):
        safe_set_full_fp32_param(parameter, value)
        return
    # ZeRO-3's shares have equal sizes, the last one padded. Its own function for full values does not allow for that.
    share, rank = parameter.partition_numel(), dist.get_rank(parameter.ds_process_group)
    mine = value.flatten()[rank * share : (rank + 1) * share].float()
    safe_set_local_fp32_param(parameter, nn.functional.pad(mine, (0, share - len(mine))))
