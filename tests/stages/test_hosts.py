"""The cores that processes of one machine share, and waiting for the first rank."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from keye.errors import KeyeError, ManifestError
from stages.data.sources.parquet import NotReadableNow
from stages.distributed import engine
from stages.distributed.hosts import POOLS, local_ranks, threads_each
from stages.distributed.ranks import first_rank
from tests.distributed import run_distributed


@pytest.mark.parametrize(
    ("environment", "devices", "ranks"),
    [
        ({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "64"}, 8, 8),  # torchrun
        ({"LOCAL_SIZE": "8", "WORLD_SIZE": "64"}, 8, 8),  # deepspeed --hostfile
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "WORLD_SIZE": "64"}, 8, 4),
        ({"WORLD_SIZE": "64"}, 8, 8),  # not set: one process per GPU
        ({"WORLD_SIZE": "2"}, 0, 2),
        ({}, 8, 1),
    ],
)
def test_processes_of_a_machine(environment, devices, ranks):
    assert local_ranks(environment, devices) == ranks


def test_cores_are_shared_among_the_processes_of_a_machine_not_of_all(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    assert threads_each({"LOCAL_SIZE": "8", "WORLD_SIZE": "64"}) == 12
    assert threads_each({"LOCAL_SIZE": "200", "WORLD_SIZE": "200"}) == 1


def under_deepspeed() -> int:
    for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    os.environ |= {"LOCAL_SIZE": "2", "WORLD_SIZE": "1"}
    os.sched_getaffinity = lambda _: set(range(12))
    engine.start()
    return torch.get_num_threads()


def test_engine_takes_its_share_under_deepspeeds_launcher():
    assert run_distributed(under_deepspeed, 1, 120) == [6]


def test_pools_of_libraries_are_limited_before_they_are_loaded():
    script = "import sys; from stages.distributed.hosts import limit_threads; limit_threads(); import os\n"
    script += "assert not {'torch', 'numpy', 'deepspeed'} & set(sys.modules), sorted(sys.modules)\n"
    script += f"print(*(os.environ[name] for name in {POOLS!r}))"
    cores = len(os.sched_getaffinity(0))
    environment = {name: value for name, value in os.environ.items() if name not in POOLS}
    for own, wanted in (({}, str(max(1, cores // 2))), ({"OMP_NUM_THREADS": "7"}, "7")):
        given = environment | {"LOCAL_SIZE": "2", "WORLD_SIZE": "4"} | own
        result = subprocess.run([sys.executable, "-c", script], env=given, capture_output=True, text=True, check=True)
        assert result.stdout.split() == [wanted, str(max(1, cores // 2)), str(max(1, cores // 2))]


def wait_long(store: Path) -> tuple[float, list[tuple[str, str]]]:
    # The time limit of the training's group is short, as half an hour is for a conversion of 100 GB. The ranks meet in
    # a file, because a rank that comes first could still reach the other's former server at the same port.
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    limit = timedelta(seconds=3)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world, timeout=limit)
    began = time.monotonic()
    first_rank(lambda: time.sleep(8))
    waited = time.monotonic() - began

    messages = []
    for error in (
        ManifestError("line 3 is torn"),
        NotReadableNow("later"),
        IndexError("3"),
        PermissionError("of root"),
    ):
        try:
            first_rank(partial(fail, error), PermissionError)
        except KeyeError as raised:
            messages.append((type(raised).__name__, str(raised)))
    return waited, messages


def fail(error: Exception) -> None:
    raise error


def test_others_wait_for_the_first_rank_beyond_the_time_out_of_collectives(tmp_path):
    for waited, messages in run_distributed(wait_long, 2, 60, tmp_path / "store"):
        assert waited >= 7.5
        assert messages == [
            ("ManifestError", "line 3 is torn"),
            ("ManifestError", "later"),
            ("KeyeError", "rank 0: IndexError: 3"),
            ("CheckpointError", "of root"),
        ]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in /proc")
def test_the_threads_of_the_group_end_with_it():
    # A thread that survives can abort the process while the interpreter ends.
    script = "import pathlib; from stages.distributed import engine, ranks; import torch.distributed as dist\n"
    script += "engine.start(); ranks.gather(1, ranks.waiting_group(dist.group.WORLD)); engine.stop()\n"
    script += "print(*(path.read_text() for path in pathlib.Path('/proc/self/task').glob('*/comm')))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "python" in result.stdout and "gloo" not in result.stdout
