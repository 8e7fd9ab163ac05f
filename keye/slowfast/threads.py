"""How many threads torch's operations use, changed for the calling thread alone; work on frames spread over threads.

`torch.set_num_threads` changes the number for the process: a thread that starts while it is lowered keeps the low one
for good, and two threads that lower and restore it overlap. OpenMP itself keeps the number per thread, so it is set
there. Where torch's OpenMP runtime is not found (a build without it) the number stays as it is, which is slower only.
"""

import ctypes
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

_OPENMP = re.compile(r"lib(g|i)?omp[^/]*\.(so|dylib)")
_allowed = threading.local()  # .threads: what torch may use, in a thread that is inside `one_thread`


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch's operations in this thread run in it alone; `over_threads` goes on to use all that torch may.

    Threads that decode video want the same cores. Those of torch wait for one another by spinning, so that an operation
    on a small tensor, which they share out as well, takes milliseconds instead of microseconds.
    """
    set_threads, before = _openmp_setter(), allowed_threads()
    if set_threads is None or hasattr(_allowed, "threads"):
        yield
        return
    _allowed.threads = before
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)
        del _allowed.threads


def allowed_threads() -> int:
    """How many threads the work on frames may be spread over."""
    return getattr(_allowed, "threads", None) or torch.get_num_threads()


def over_threads(work: Callable[..., None], *tensors: torch.Tensor) -> None:
    """Call `work` for each row of the tensors together, over as many threads as torch may use, on the CPU.

    For kernels that do one frame after the other by themselves. The threads are of this call alone: a pool that
    outlived it would be missing in a process forked from this one. Each runs torch's operations in itself alone.
    """
    threads = min(allowed_threads(), len(tensors[0])) if tensors[0].device.type == "cpu" else 1
    if threads < 2:
        for rows in zip(*tensors, strict=True):
            work(*rows)
        return
    with ThreadPoolExecutor(threads, initializer=_stay_alone) as pool:
        list(pool.map(work, *tensors))


def _stay_alone() -> None:
    """For a thread of a pool: torch's operations in it start no threads."""
    torch.get_num_threads()  # torch sets a thread's number when the thread first asks; it must not do so later
    if set_threads := _openmp_setter():
        set_threads(1)


@functools.cache
def _openmp_setter() -> Callable[[int], None] | None:
    """`omp_set_num_threads` of the runtime that torch uses; None when there is none to be found."""
    before = torch.get_num_threads()
    for path in _runtimes():
        try:
            set_threads = ctypes.CDLL(path, mode=os.RTLD_NOLOAD).omp_set_num_threads
        except (AttributeError, OSError):  # not loaded, not OpenMP, or no such flag on this system
            continue
        set_threads.argtypes, set_threads.restype = [ctypes.c_int], None
        set_threads(before + 1)
        found = torch.get_num_threads() == before + 1  # a process may hold runtimes that torch does not use
        set_threads(before)
        if found:
            return set_threads
    return None


def _runtimes() -> list[str]:
    """Paths of the OpenMP runtimes that may be loaded."""
    paths = {str(path) for path in Path(torch.__file__).parent.glob("lib/*omp*")}
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            paths |= {line.split(maxsplit=5)[-1].strip() for line in maps if "omp" in line}
    except OSError:
        pass  # not Linux
    return sorted(path for path in paths if _OPENMP.search(Path(path).name))
