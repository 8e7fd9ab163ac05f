"""DeepSpeed: processes, the engine around a module, and the weights that come out of it."""

import functools
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keye.checkpoint.shards import Stored
from stages.distributed.hosts import threads_each
from stages.distributed.zero3 import gather_by_units
from stages.optimizer import OptimizerConfig, build_optimizer

BUCKET = 500_000_000  # gradients that are reduced in one collective, at most
PERSISTENT = 100_000  # elements up to which ZeRO-3 keeps a parameter whole on every rank

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def start(threads: int | None = None) -> None:
    """Join the process group that torchrun or deepspeed launched, or make one of this process alone.

    threads: of torch's CPU work; by default the cores are shared out among the processes of this machine.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    torch.set_num_threads(threads or threads_each(devices=torch.cuda.device_count()))
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Only inference uses the shared-memory all-reduce; left on, its compilation holds up the first start for minutes.
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
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
) -> Any:
    """A DeepSpeed engine that trains the parameters of `module` that require gradients.

    In bf16 the optimizer keeps fp32 weights. Gradients are then summed in fp32, over micro-batches and over ranks, and
    `zero` is 2 at least: without ZeRO there are no fp32 weights, and ZeRO-1 would keep the fp32 gradients of all
    parameters on every rank.

    Args:
        optimizer: AdamW's settings. steps: optimizer steps of the schedule. zero: stage of ZeRO, 0 to 3.
        accumulation: calls of `backward` a step. `backward` divides by that and averages over all ranks;
            `trainer.Trainer` undoes both.
        precision: "auto", "fp32" or "bf16".
        sources: where parameters of a bf16 `module` are on disk; the fp32 weights begin as they are there, and a rank
            reads its share. Others begin as `module` has them.
        hpz: neighbouring ranks that keep the weights of ZeRO-3 among them a second time, see `StageRecipe`.
    """
    import deepspeed

    half = resolve_precision(precision) == "bf16"
    zero = max(zero, 2) if half else zero
    trained = [p for p in module.parameters() if p.requires_grad]
    adam, scheduler = build_optimizer(module, optimizer, steps)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.max_grad_norm if zero else 0.0,
        "zero_optimization": {
            "stage": zero,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            # DeepSpeed allocates whole buckets, however few parameters train.
            "reduce_bucket_size": min(BUCKET, sum(p.numel() for p in trained)),
            "stage3_param_persistence_threshold": PERSISTENT,
        },
        "zero_allow_untested_optimizer": True,
        # Without the check ZeRO would step on gradients that are not finite in bf16, though not in fp32.
        "bf16": {"enabled": half, "check_grad_overflow": True},
        "steps_per_print": 1 << 30,
    }
    if half:
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    if hpz > 1:
        config["zero_optimization"]["zero_hpz_partition_size"] = hpz
    stored = {p: source for p, source in (sources or {}).items() if p.requires_grad}
    # The engine gives the parameters other memory, in bf16.
    begun = {p: p.detach() for p in trained if half and p not in stored and p.dtype == torch.float32}
    engine, *_ = deepspeed.initialize(model=module, optimizer=adam, lr_scheduler=scheduler, config=config)
    if zero == 0 and optimizer.max_grad_norm:
        adam.register_step_pre_hook(functools.partial(_clip, trained, optimizer.max_grad_norm))
    if zero == 3:
        gather_by_units(engine)
    if half:  # else the fp32 weights would be those that were rounded to bf16
        for parameter in trained:
            if parameter in begun:
                set_master_weight(parameter, begun.pop(parameter))
            elif parameter in stored and stored[parameter].dtype != torch.bfloat16:
                set_master_weight(parameter, stored[parameter].mapped())
    return engine


def _clip(parameters: list[nn.Parameter], limit: float, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Clip what the optimizer is about to step on; here, because DeepSpeed without ZeRO clips before the guard looks.

    The optimizer remembers the norm as ZeRO's does.
    """
    optimizer._global_grad_norm = nn.utils.clip_grad_norm_(parameters, limit)


def skip_steps_when(engine: Any, hold: Callable[[float], bool]) -> None:
    """Have the optimizer ask `hold(norm of the whole gradient, before clipping)` each time; True = nothing moves.

    ZeRO asks once for each of its groups, with the same norm.
    """
    optimizer = engine.basic_optimizer
    step = optimizer.step

    @functools.wraps(step)  # with the mark that the schedule knows it by
    def guarded(*args: Any, **kwargs: Any) -> Any:
        return None if hold(gradient_norm(engine)) else step(*args, **kwargs)

    optimizer.step = guarded


def gradient_norm(engine: Any) -> float:
    """Norm of the whole gradient before clipping: of the last step, or of the one that is about to be taken."""
    gradients = [] if engine.zero_optimization() else [p.grad for p in engine.module.parameters() if p.grad is not None]
    if gradients:
        return float(nn.utils.get_total_norm(gradients))
    return float(getattr(engine.optimizer, "_global_grad_norm", None) or 0.0)


def master_weight(parameter: nn.Parameter) -> Tensor:
    """A parameter in the fp32 of the optimizer, as bf16 training keeps it beside the one it computes with; collective.

    The parameter itself where there is no such value: it is fp32 already, or does not train.
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
    """Set a parameter's value in the fp32 of the optimizer; of `value` a rank reads no more than its share."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not hasattr(parameter, "ds_id"):
        safe_set_full_fp32_param(parameter, value)
        return
    # ZeRO-3's shares are of one size, the last one padded, which its own function for whole values does not allow for.
    share, rank = parameter.partition_numel(), dist.get_rank(parameter.ds_process_group)
    mine = value.flatten()[rank * share : (rank + 1) * share].float()
    safe_set_local_fp32_param(parameter, nn.functional.pad(mine, (0, share - len(mine))))
