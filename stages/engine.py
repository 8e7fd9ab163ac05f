"""DeepSpeed: processes, the engine around a module, and the weights that come out of it."""

import logging
import math
import os
import warnings
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

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
    that and averages over all ranks; `trainer.Trainer` undoes both.
    """
    import deepspeed

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
        "bf16": {"enabled": resolve_precision(precision) == "bf16"},
        "steps_per_print": 1 << 30,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine
