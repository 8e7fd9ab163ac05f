"""Values and errors of all ranks, exchanged on the host, where a rank may wait for the others as long as it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from keye.errors import KeyeError
from stages.distributed import ranks
from stages.distributed.ranks import first_rank, waiting_group

Result = TypeVar("Result")


def gather(value: Any) -> list[Any]:
    """Every rank's `value`, on every rank, in order of rank; collective."""
    return ranks.gather(value, waiting_group(dist.group.WORLD))


def agree(action: Callable[[], Result]) -> Result:
    """Run this rank's `action`; when it fails on any rank, all ranks raise the first error. Collective.

    Without this, a rank that raises leaves the others waiting in their next collective until its time limit. `action`
    must not call a collective.

    Raises:
        KeyeError: what the action raised, on this or another rank. Other exceptions are not shared; they end the
            process.
    """
    error: KeyeError | None = None
    result: Any = None
    try:
        result = action()
    except KeyeError as caught:
        error = caught
    ranks.agree(error, waiting_group(dist.group.WORLD))
    return result


def from_first(action: Callable[[], Result]) -> Result:
    """What rank 0's `action` returns, on every rank; only rank 0 runs it. Collective.

    For decisions about the next collectives that depend on files, which ranks may see differently.

    Raises:
        KeyeError: on all ranks, what the action raised; an OSError as CheckpointError.
    """
    found: list[Any] = []
    first_rank(lambda: found.append(action()), OSError)
    return ranks.broadcast(found[0] if found else None, waiting_group(dist.group.WORLD))
