"""Plain values and errors between ranks: gather, broadcast, agree on an error, let rank 0 act for all."""

import functools
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

import keye.errors
from keye.errors import CheckpointError, KeyeError

T = TypeVar("T")

PATIENCE = timedelta(days=7)


class Failure(NamedTuple):
    """An error as it travels between ranks: its class if it is a KeyeError, and its message."""

    name: str
    text: str

    @classmethod
    def of(cls, error: Exception, rank: int) -> "Failure":
        """The failure for an error of this rank; an error that is no KeyeError is named in the message."""
        for kind in type(error).__mro__:
            if getattr(keye.errors, kind.__name__, None) is kind:
                return cls(kind.__name__, str(error))
        return cls("KeyeError", f"rank {rank}: {type(error).__name__}: {error}")

    @property
    def error(self) -> KeyeError:
        """The error to raise."""
        return getattr(keye.errors, self.name)(self.text)


def gloo_group(ranks: int) -> dist.ProcessGroup | None:
    """A gloo group of all ranks; collective. None for a single process."""
    return dist.new_group(backend="gloo") if ranks > 1 else None


def gather(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Plain values of every rank, by rank, on every rank; collective. `group` None: a single process."""
    if group is None:
        return [mine]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found


def gather_to_first(mine: Any, group: dist.ProcessGroup | None) -> list[Any] | None:
    """Plain values of every rank, by rank, on rank 0; None on the others. Collective."""
    if group is None:
        return [mine]
    found = [None] * dist.get_world_size(group) if dist.get_rank() == 0 else None
    dist.gather_object(mine, found, dst=0, group=group)
    return found


def broadcast(mine: Any, group: dist.ProcessGroup | None) -> Any:
    """The value of rank 0, on every rank; collective."""
    if group is None:
        return mine
    box = [mine]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def agree(error: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank the error of the first rank that has one; without an error one number is exchanged.

    Raises:
        KeyeError: of the original class, or with rank and class in the message if it was no KeyeError.
    """
    if group is None:
        if error is not None:
            raise error
        return
    if error is not None and not isinstance(error, KeyeError):  # a defect: the message alone does not show the place
        logging.getLogger("stages").error("rank %d failed", dist.get_rank(), exc_info=error)
    failed = torch.tensor([error is not None], dtype=torch.int32)
    dist.all_reduce(failed, group=group)
    if not failed:
        return
    failures = gather(None if error is None else Failure.of(error, dist.get_rank()), group)
    raise next(failure for failure in failures if failure is not None).error from error


def on_every_rank(action: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """What this rank's `action` returns; when it fails on any rank, all ranks raise the first error. Collective.

    Without this, a rank that raises leaves the others waiting in their next collective until its time limit. `action`
    must not call a collective. `group` None: a single process.

    Raises:
        KeyeError: on all ranks, of the original class, or with rank and class in the message if it was no KeyeError.
    """
    error, result = None, []
    try:
        result.append(action())
    except Exception as caught:
        error = caught
    agree(error, group)
    return result[0]


def first_rank(action: Callable[[], Any], *kinds: type[Exception]) -> None:
    """Call `action` on rank 0 while the others wait; its error (a KeyeError or one of `kinds`) is raised on all ranks.

    The others wait in a group of their own without a time limit. The group of the training gives up a collective after
    half an hour.

    Raises:
        KeyeError: on all ranks, with rank 0's class and message; CheckpointError for the `kinds`.
    """
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except kinds as caught:
            error = CheckpointError(str(caught))
        except Exception as caught:
            error = caught
    agree(error, waiting_group(dist.group.WORLD) if dist.get_world_size() > 1 else None)


@functools.lru_cache(maxsize=1)
def waiting_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of all ranks without a practical time limit; created again for another `world`."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)
