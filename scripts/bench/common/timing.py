"""Timing of calls on a device, alone and alternating with others, so that ratios are fair."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]


def seconds(call: Call, device: torch.device) -> float:
    """How long a call takes, on a GPU by its own events, so that what is still queued counts.

    On a CPU it is the processor time of all threads of this process: other work on the machine does not count. Threads
    that wait for each other by spinning do count, so compare calls with OMP_NUM_THREADS=1 on a machine with other work.
    """
    if device.type != "cuda":
        began = time.process_time()
        call()
        return time.process_time() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def in_turn(calls: Mapping[str, Call], rounds: int, device: torch.device, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every call in each round, after a warm-up. Rounds run the calls in alternating order."""
    for call in calls.values():
        for _ in range(warm_up):
            call()
    names, times = list(calls), {name: [] for name in calls}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            times[name].append(seconds(calls[name], device))
    return times


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median over rounds of `times` divided by `others` in the same round."""
    return statistics.median(mine / other for mine, other in zip(times, others, strict=True))
