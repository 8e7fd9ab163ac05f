"""DeepSpeed: processes, the engine around a module, and the weights that come out of it."""

import functools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if threads is None and not torch.cuda.is_available():
        threads = max(1, len(os.sched_getaffinity(0)) // local)
    if threads is not None:
        torch.set_num_threads(threads)
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


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Factor on the learning rate at `step` (from 0): linear rise over `warmup` steps, "cosine" to 0 or "constant"."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def build(
    module: nn.Module,
    *,
    lr: float,
    steps: int,
    warmup: int = 0,
    schedule: str = "constant",
    weight_decay: float = 0.0,
    betas: Iterable[float] = (0.9, 0.95),
    clip: float = 1.0,
    zero: int = 2,
    accumulation: int = 1,
    precision: str = "auto",
) -> Any:
    """A DeepSpeed engine that trains the parameters of `module` that want gradients, with AdamW.

    Biases, norms and other vectors are not decayed. `accumulation`: calls of `backward` a step. `backward` divides by
    that and averages over all ranks; `trainer.Trainer` undoes both. In bf16 the optimizer keeps fp32 weights, which
    begin as `module` has them; without ZeRO DeepSpeed has none, so that `zero` is 1 at least.
    """
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    half = resolve_precision(precision) == "bf16"
    zero = max(zero, 1) if half else zero
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=lr, betas=tuple(betas), fused=torch.cuda.is_available()
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, warmup, schedule)
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": zero, "overlap_comm": torch.cuda.is_available(), "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        # Without the check ZeRO would step on gradients that are not finite in bf16, though not in fp32.
        "bf16": {"enabled": half, "check_grad_overflow": True},
        "steps_per_print": 1 << 30,
    }
    begun = [p.detach() for p in trained]  # the engine gives the parameters other memory
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    if half:  # else the fp32 weights would be those that were rounded to bf16
        for parameter, value in zip(trained, begun, strict=True):
            safe_set_full_fp32_param(parameter, value.to(engine.device, torch.float32))
    return engine


def hold_steps(engine: Any, hold: Callable[[float], bool]) -> None:
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
    """Norm of the whole gradient of the last step; without ZeRO, of the one that lies in the parameters now."""
    if hasattr(engine.optimizer, "_global_grad_norm"):
        return float(engine.optimizer._global_grad_norm or 0.0)
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(nn.utils.get_total_norm(gradients)) if gradients else 0.0


def master_weights(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """A model's state in the fp32 of the optimizer, as bf16 training keeps it beside the weights it computes with.

    Collective; on rank 0 the state, on the CPU, on the others None. before: `{name: tensor}` of what does not train,
    taken before the engine made it bf16.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    main = dist.get_rank() == 0
    state = dict(model.state_dict()) if main else {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
            value = before[name] if name in before else safe_get_full_fp32_param(parameter)
        else:
            value = before.get(name, parameter.detach())
        if main and value is not None:
            state[name] = value.detach().to("cpu", torch.float32)
    return state if main else None
