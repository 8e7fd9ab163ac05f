"""Values and errors of all ranks, exchanged on the host, where a rank may wait for the others as long as it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from stages.distributed import ranks
from stages.distributed.ranks import first_rank, waiting_group

Result = TypeVar("Result")


def gather(value: Any) -> list[Any]:
    """Every rank's `value`, on every rank, in order of rank; collective."""
    return ranks.gather(value, waiting_group(dist.group.WORLD))


def agree(action: Callable[[], Result]) -> Result:
    """`on_every_rank` of all ranks, without a time limit. Collective."""
    return ranks.on_every_rank(action, waiting_group(dist.group.WORLD))


def from_first(action: Callable[[], Result]) -> Result:
    """What rank 0's `action` returns, on every rank; only rank 0 runs it. Collective.

    For decisions about the next collectives that depend on files, which ranks may see differently.

    Raises:
        KeyeError: on all ranks, what the action raised; an OSError as CheckpointError.
    """
    found: list[Any] = []
    first_rank(lambda: found.append(action()), OSError)
    return ranks.broadcast(found[0] if found else None, waiting_group(dist.group.WORLD))
