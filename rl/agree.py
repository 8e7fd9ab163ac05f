"""Collectives for Python values and for errors of a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from keye.errors import KeyeError
from stages.distributed.ranks import first_rank

Result = TypeVar("Result")


def gather(value: Any) -> list[Any]:
    """Every rank's `value`, on every rank, in order of rank; collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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
    failures = gather(None if error is None else (type(error), str(error)))
    first = next((failure for failure in failures if failure is not None), None)
    if first is not None:
        kind, message = first
        raise kind(message) from error
    return result


def from_first(action: Callable[[], Result]) -> Result:
    """What rank 0's `action` returns, on every rank; only rank 0 runs it. Collective.

    For decisions about the next collectives that depend on files, which ranks may see differently.

    Raises:
        KeyeError: on all ranks, what the action raised; an OSError as CheckpointError.
    """
    box: list[Any] = [None]

    def run() -> None:
        box[0] = action()

    first_rank(run, OSError)
    dist.broadcast_object_list(box, src=0)
    return box[0]
