"""DeepSpeed around the policy: the processes, the engine, and what is the same on every rank."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rl.recipe import Gspo


def join() -> tuple[int, int]:
    """Join the processes that torchrun or deepspeed started, or stand alone; (rank, world)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update(alone)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def make_engine(model: nn.Module, recipe: Gspo) -> Any:
    """The DeepSpeed engine over the weights that are not frozen, with AdamW. Losses are averaged over the ranks."""
    import deepspeed

    for name in recipe.freeze:
        model.get_submodule(name).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, recipe.learning_rate, recipe.betas, weight_decay=recipe.weight_decay)
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and torch.cuda.is_available())
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.clip,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": recipe.zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def gather(value: Any) -> list[Any]:
    """Every rank's `value`, on every rank, in order of rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
