"""The cores that the processes of one machine share. Imports only the standard library: limits must be set first."""

import os
from collections.abc import Mapping

LOCAL = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
"""Variables with the processes of a machine: of torchrun, DeepSpeed's launcher, Open MPI and MPICH."""
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def local_ranks(environment: Mapping[str, str] = os.environ, devices: int = 0) -> int:
    """Processes of this run on this machine.

    devices: GPUs of this machine. Without a launcher's variable each process has one of them.
    """
    for name in LOCAL:
        if name in environment:
            return max(1, int(environment[name]))
    world = int(environment.get("WORLD_SIZE", "1"))
    return max(1, min(world, devices) if devices else world)


def threads_each(environment: Mapping[str, str] = os.environ, devices: int = 0) -> int:
    """This process's share of the cores on which it may run."""
    return max(1, len(os.sched_getaffinity(0)) // local_ranks(environment, devices))


def limit_threads() -> None:
    """Limit the thread pools of libraries that are not loaded yet to this process's share of the cores.

    Existing limits stay. torchrun sets one, DeepSpeed's launcher does not: each process would start a thread for every
    core.
    """
    for name in POOLS:
        os.environ.setdefault(name, str(threads_each()))
