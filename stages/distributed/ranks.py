"""What one rank does for all of them while they wait."""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

import keye.errors
from keye.errors import KeyeError

PATIENCE = timedelta(days=7)


def first_rank(action: Callable[[], Any], *kinds: type[Exception]) -> None:
    """Call `action` on rank 0 while the others wait; its mistake (a KeyeError or one of these kinds) is everybody's.

    The others wait on the host, however long it takes: not in the group of the training, whose collectives are given up
    after half an hour. When rank 0 dies they fail at once, because its connections close.

    Raises:
        KeyeError: on all ranks, of the class and with the message that rank 0 met; CheckpointError for the `kinds`.
    """
    box: list[tuple[str, str] | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except KeyeError as error:
            box[0] = type(error).__name__, str(error)
        except kinds as error:
            box[0] = "CheckpointError", str(error)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=waiting_group(dist.group.WORLD))
    if box[0] is not None:
        raise getattr(keye.errors, box[0][0], KeyeError)(box[0][1])


@functools.lru_cache(maxsize=1)
def waiting_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of all ranks on the host that waits as long as it takes; made anew for another `world`."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)
