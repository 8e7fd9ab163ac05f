"""Number of threads of torch's operations, set for the calling thread only; parallel work on frames.

`torch.set_num_threads` sets the number for the process: a thread that starts while it is lowered keeps the low number,
and two threads that lower and restore it interfere. OpenMP keeps the number per thread, so it is set there. Where
torch's OpenMP runtime is not found (a build without it) the number does not change, which only costs speed.
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
_allowed = threading.local()  # .threads: how many torch may use, in a thread that is inside `one_thread`


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's operations in this thread without further threads; `over_threads` still uses as many as torch may.

    Threads that decode video compete for the same cores. Torch's threads wait for one another by spinning, so that a
    parallel operation on a small tensor takes milliseconds instead of microseconds.
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
    """How many threads may work on frames."""
    return getattr(_allowed, "threads", None) or torch.get_num_threads()


def over_threads(work: Callable[..., None], *tensors: torch.Tensor) -> None:
    """Call `work` with each row of the tensors, on the CPU in as many threads as torch may use.

    For kernels that process one frame after the other. The pool ends with this call: a longer-lived one would be
    missing in a process forked from this one. Torch's operations in these threads start no further threads.
    """
    threads = min(allowed_threads(), len(tensors[0])) if tensors[0].device.type == "cpu" else 1
    if threads < 2:
        for rows in zip(*tensors, strict=True):
            work(*rows)
        return
    with ThreadPoolExecutor(threads, initializer=_use_one_thread) as pool:
        list(pool.map(work, *tensors))


def _use_one_thread() -> None:
    """In a thread of a pool, run torch's operations without further threads."""
    torch.get_num_threads()  # torch sets a thread's number on its first query, which must not follow ours
    if set_threads := _openmp_setter():
        set_threads(1)


@functools.cache
def _openmp_setter() -> Callable[[int], None] | None:
    """`omp_set_num_threads` of the OpenMP runtime that torch uses; None where it is not found."""
    before = torch.get_num_threads()
    for path in _runtimes():
        try:
            set_threads = ctypes.CDLL(path, mode=os.RTLD_NOLOAD).omp_set_num_threads
        except (AttributeError, OSError):  # not loaded, not OpenMP, or no such flag on this system
            continue
        set_threads.argtypes, set_threads.restype = [ctypes.c_int], None
        set_threads(before + 1)
        found = torch.get_num_threads() == before + 1  # a process may have loaded runtimes that torch does not use
        set_threads(before)
        if found:
            return set_threads
    return None


def _runtimes() -> list[str]:
    """Paths of OpenMP runtimes that may be loaded."""
    paths = {str(path) for path in Path(torch.__file__).parent.glob("lib/*omp*")}
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            paths |= {line.split(maxsplit=5)[-1].strip() for line in maps if "omp" in line}
    except OSError:
        pass  # not Linux
    return sorted(path for path in paths if _OPENMP.search(Path(path).name))
